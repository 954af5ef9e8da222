"""What is trained on a GPU meets nothing of the host. No GPU is needed: fake tensors have a device and no values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shoplm.errors import ConfigurationError
from shoplm.model.base import Base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.tokenizer import Tokenizer
from shoplm.prompt import PromptBuilder
from shoplm.retrieval import Knowledge
from shoplm.training import pipeline
from shoplm.training.adapt.causal import CPU, training_device, trunk_dtype
from shoplm.training.adapt.conversations import FactWriter
from shoplm.training.adapt.model import AdaptedModel, JointModel, TunedModel
from shoplm.training.adapt.replay import Replay
from shoplm.training.adapt.scratch_model import SIZES, ScratchModel
from shoplm.training.adapt.trainer import AdaptSettings, JointTrainer, Losses, Talk
from shoplm.training.log import ShopLog
from shoplm.training.ranker import CountPrior, OutputRows
from shoplm.training.shop import Shop
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

# Tells itself from the host as a GPU does: fake tensors of two devices refuse to be added or multiplied.
DEVICE = torch.device("meta")
_TEXTS = [[3], [4, 5]]
Make = Callable[[Base, Shop], JointModel]


def adapted(base: Base, shop: Shop) -> JointModel:
    return AdaptedModel(base.folder, _TEXTS, _rows(base, shop), 1.0, _horizons(shop), rank=2, device=DEVICE)


def tuned(base: Base, shop: Shop) -> JointModel:
    return TunedModel(base.folder, _TEXTS, _rows(base, shop), 1.0, _horizons(shop), device=DEVICE)


def scratch(base: Base, shop: Shop) -> JointModel:
    prior = CountPrior(1.0, torch.zeros(len(shop.items.row_item)))
    types = shop.items.row_types, len(shop.items.types)
    size, dtype = SIZES["small"], torch.bfloat16
    return ScratchModel(size, base.folder, base.config.vocab_size, *types, prior, _horizons(shop), dtype, DEVICE)


def _rows(base: Base, shop: Shop) -> OutputRows:
    items = len(shop.items.row_item)
    return OutputRows(torch.zeros(items, base.config.hidden_size), torch.zeros(items))


def _horizons(shop: Shop) -> int:
    return len(shop.timeline.horizons)


@pytest.mark.parametrize("make", [adapted, tuned, scratch])
def test_a_step_meets_nothing_of_the_host(
    make: Make, tiny_base: Base, tiny_shop_log: ShopLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = pipeline.prepare(tiny_shop_log)
    schema = pipeline.prompt_schema(shop, "A shop.", 64, 32, adapted=True)
    catalog = pipeline.write_items(shop.items, tmp_path / "items")
    tokenizer = Tokenizer.from_folder(tiny_base.folder)
    vocabulary = shop.items.vocabulary(tiny_base.config.vocab_size)
    builder = PromptBuilder(tokenizer, ChatTemplate.from_folder(tiny_base.folder), schema, vocabulary)
    found: dict[str, set[torch.device]] = {}

    def add(self: Losses, name: str, value: Tensor) -> Tensor:
        found.setdefault(name, set()).add(value.device)
        return value

    monkeypatch.setattr(Losses, "add", add)
    model, talk = make(tiny_base, shop), None
    if make is not scratch:
        talk = Talk(FactWriter(catalog, Knowledge([]), "USD"), [Replay((5, 6), (7, 8, 9))], tokenizer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = JointTrainer(model, builder, shop, AdaptSettings(2), tmp_path, talk)
        for _ in range(4):
            trainer._learn(Losses())
        trainer._update()
        assert {parameter.device for parameter in model.parameters()} == {DEVICE}
    shop_parts = {"loss", "basket", "purchase"}
    chat_parts = {"fact", "talk"} if talk else set()
    assert found == {part: {DEVICE} for part in shop_parts | chat_parts}


def test_the_device_is_chosen_or_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_device("auto") == training_device("cpu") == CPU
    for name in ("cuda", "cuda:0", "gpu", "mps", "cuda:x"):
        with pytest.raises(ConfigurationError, match=name):
            training_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training_device("auto") == torch.device("cuda")
    assert training_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigurationError, match=r"cuda:2.* 2 GPUs"):
        training_device("cuda:2")


@pytest.mark.parametrize(
    ("device", "has_bf16", "dtype"),
    [
        ("cuda", False, torch.bfloat16),
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
    ],
)
def test_a_cpu_without_bf16_trains_in_fp32(
    device: str, has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoplm.training.adapt.causal.packing_supported", lambda: has_bf16)
    assert trunk_dtype(torch.device(device)) is dtype
