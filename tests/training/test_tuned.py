"""All layers of a base are trained, activations may be computed again, and the result is a base that is served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shoplm.engine.shop_texts import token_texts
from shoplm.model.base import Base, resolve_base
from shoplm.model.origin import Origin
from shoplm.training import pipeline
from shoplm.training.adapt import trainer
from shoplm.training.adapt.model import AdaptedModel, TunedModel
from shoplm.training.adapt.tensors import pass_inputs
from shoplm.training.adapt.trainer import AdaptSettings, JointTrainer
from shoplm.training.log import ShopLog
from shoplm.training.ranker import OutputRows
from shoplm.training.reader import make_reader
from shoplm.training.watch import LOSS, NDCG, Watch

_ROWS = OutputRows(torch.zeros(3, 32), torch.zeros(3))


def tuned(base: Base, *, checkpointing: bool = False) -> TunedModel:
    torch.manual_seed(0)
    rows = OutputRows(torch.zeros(3, base.config.hidden_size), torch.zeros(3))
    return TunedModel(base.folder, [[3], [4, 5]], rows, 1.0, 2, checkpointing=checkpointing)


@pytest.mark.parametrize("kind", ["all layers", "adapter"])
def test_computing_activations_again_changes_no_gradient(tiny_base: Base, kind: str) -> None:
    found = []
    for checkpointing in (False, True):
        if kind == "adapter":
            torch.manual_seed(0)
            rows = OutputRows(torch.zeros(3, tiny_base.config.hidden_size), torch.zeros(3))
            model: AdaptedModel | TunedModel = AdaptedModel(
                tiny_base.folder, [[3], [4, 5]], rows, 1.0, 2, rank=2, checkpointing=checkpointing
            )
        else:
            model = tuned(tiny_base, checkpointing=checkpointing)
        model.train()
        assert model._trunk[0].gradient_checkpointing == checkpointing
        hidden = model.hidden(pass_inputs((3, 4, 5, 6), ()))
        (hidden.float().square().sum() + model.purchase_logits(hidden).sum()).backward()
        found.append([None if p.grad is None else p.grad.clone() for p in model.trunk_parameters()])
    assert any(grad is not None and bool(grad.any()) for grad in found[0])
    for one, two in zip(*found, strict=True):
        assert (one is None) == (two is None) and (one is None or two is None or torch.equal(one, two))


def test_a_tuned_base_is_saved_as_it_computes_and_the_teacher_stays(
    tiny_base: Base, tiny_shop_log: ShopLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_STEPS", 2)
    shop = pipeline.prepare(tiny_shop_log)
    schema = pipeline.prompt_schema(shop, "A shop.", 64, 32, adapted=True)
    catalog = pipeline.write_items(shop.items, tmp_path / "items")
    vocabulary = shop.items.vocabulary(tiny_base.config.vocab_size)
    reader = make_reader(tiny_base, catalog, vocabulary, schema, torch.float32)
    items = len(shop.items.row_item)

    def run(folder: Path, steps: int) -> tuple[TunedModel, Watch]:
        folder.mkdir()
        torch.manual_seed(0)
        rows = OutputRows(torch.zeros(items, tiny_base.config.hidden_size), torch.zeros(items))
        texts = [[3 + index % 50] for index in range(len(token_texts(catalog)))]
        model = TunedModel(tiny_base.folder, texts, rows, 1.0, len(shop.timeline.horizons))
        watch = Watch()
        JointTrainer(model, reader.builder, shop, AdaptSettings(steps, learning_rate=1e-3), folder, None).run(watch)
        return model, watch

    model, watch = run(tmp_path / "out", 4)
    assert [set(point.values) for point in watch.points] == [{LOSS, NDCG, "basket", "purchase"}] * 2
    inputs = pass_inputs((3, 4, 5, 6, 7), ())
    with torch.no_grad():
        assert not torch.equal(model.hidden(inputs), model.base_hidden(inputs))
        saved = resolve_base(str(tmp_path / "out" / "base"))
        assert saved.origin is Origin.ADAPTED and saved.fingerprint != tiny_base.fingerprint
        again = TunedModel(saved.folder, [[3]], _ROWS, 1.0, 2)
        assert torch.equal(again.hidden(inputs), model.hidden(inputs))
        assert torch.equal(tuned(tiny_base).hidden(inputs), model.base_hidden(inputs))
