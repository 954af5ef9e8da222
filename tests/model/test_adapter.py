"""An adapter that PEFT saved, merged at load or kept apart, equals PEFT's merge; one that does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from shoplm.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shoplm.engine.load import load_backend, load_tensors
from shoplm.engine.spec import EngineSpec
from shoplm.errors import BaseModelError
from shoplm.model.adapter import read_adapter
from shoplm.model.config import ModelConfig
from shoplm.model.weights import load_weights


def save_adapter(base: Path, folder: Path, **options: Any) -> Any:
    """A random adapter over every projection, saved by PEFT. Returns the model that it was made for."""
    import peft
    import transformers

    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options})
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 12}},
        {"target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["all", "rank-stabilised", "patterns", "two"],
)
@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
def test_equals_peft(tiny_model: Callable[[str], Path], tmp_path: Path, options: dict[str, Any], apart: bool) -> None:
    folder = tiny_model("qwen3")
    merged = save_adapter(folder, tmp_path, **options).merge_and_unload().state_dict()
    config = ModelConfig.from_folder(folder)
    weights = load_weights(folder, config, adapter=read_adapter(tmp_path), apart=apart)
    plain = load_weights(folder, config)
    for index, (layer, unchanged) in enumerate(zip(weights.layers, plain.layers, strict=True)):
        prefix = f"model.layers.{index}."
        for name, *modules in (
            ("qkv", *(f"self_attn.{part}_proj" for part in "qkv")),
            ("output", "self_attn.o_proj"),
            ("gate_up", "mlp.gate_proj", "mlp.up_proj"),
            ("down", "mlp.down_proj"),
        ):
            ours, path = getattr(layer, name), layer.paths.get(name)
            expected = torch.cat([merged[f"{prefix}{module}.weight"] for module in modules])
            if apart:
                assert torch.equal(ours, getattr(unchanged, name))
            if path is not None:
                ours = ours + path.up @ path.down
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        assert bool(layer.paths) == apart
        assert apart or not torch.allclose(layer.qkv, unchanged.qkv, atol=1e-3)


def _config(change: dict[str, Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / ADAPTER_CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return edit


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        change(tensors)
        save_file(tensors, folder / ADAPTER_WEIGHTS)

    return edit


_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("apart", [False, True], ids=["merged", "apart"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "does not exist"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"x"), "cannot be read as safetensors"),
        (_config({"peft_type": "IA3"}), "peft_type is 'IA3'"),
        (_config({"use_dora": True}), "use_dora is True"),
        (_config({"alora_invocation_tokens": [5]}), r"alora_invocation_tokens is \[5\]"),
        (_config({"init_lora_weights": "pissa_niter_4"}), "belongs to a base that was changed"),
        (_config({"bias": "all"}), "bias is 'all'"),
        (_tensors(lambda tensors: tensors[_KEY][0].fill_(torch.nan)), f"{_KEY} has values that are not finite"),
        (_tensors(lambda tensors: tensors.pop(_KEY)), "q_proj do not fit each other"),
        (_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(2)})), "model.norm.weight is not"),
        (_tensors(lambda tensors: tensors.update({_KEY: torch.ones(4, 3)})), "it belongs to another base"),
        (
            _tensors(
                lambda tensors: [
                    tensors.update({name.replace("layers.0.", "layers.9."): tensors.pop(name)})
                    for name in [*tensors]
                    if "layers.0." in name
                ]
            ),
            "changes model.layers.9.",
        ),
    ],
)
def test_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, edit: Callable[[Path], object], message: str, apart: bool
) -> None:
    folder = tiny_model("qwen3")
    save_adapter(folder, tmp_path)
    edit(tmp_path)
    with pytest.raises(BaseModelError, match=message):
        load_weights(folder, ModelConfig.from_folder(folder), adapter=read_adapter(tmp_path), apart=apart)


@pytest.mark.parametrize(
    ("mode", "weight_format", "apart"),
    [
        ("auto", "model", False),
        ("auto", "int8", False),
        ("auto", "int4", True),
        ("apart", "model", True),
        ("merged", "int4", False),
    ],
)
def test_the_mode_and_the_format_say_where_an_adapter_goes(
    tiny_model: Callable[[str], Path], tmp_path: Path, mode: str, weight_format: str, apart: bool
) -> None:
    folder = tiny_model("llama")
    save_adapter(folder, tmp_path)
    spec = EngineSpec(str(folder), None, str(tmp_path), adapter_mode=mode, weight_format=weight_format)
    weights, _ = load_tensors(spec, ModelConfig.from_folder(folder))
    assert [bool(layer.paths) for layer in weights.layers] == [apart] * 3


def test_an_engine_merges_the_adapter_of_its_spec(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    save_adapter(folder, tmp_path)
    (tmp_path / ADAPTER_CONFIG).unlink()
    with pytest.raises(BaseModelError, match=ADAPTER_CONFIG):
        load_backend(EngineSpec(base_folder=str(folder), dtype="float32", adapter_folder=str(tmp_path)))
