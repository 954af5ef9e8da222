"""What formats of fewer bits may cost a bundle."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shoplm.model.base import Base, resolve_base
from shoplm.model.native.backend import native_refusal
from shoplm.training.format_gate import losses, perplexity
from shoplm.training.formats import UNROUNDED, Formats
from shoplm.training.report import OURS, Difference, Estimate, ProbabilityRow, RankingResult, RankingRow, Report
from shoplm.training.watch import Watch
from transformers import AutoModelForCausalLM

UNKNOWN, NO_ESTIMATE = Difference(None, None, None), Estimate(None, None, None)


def report(ndcg: float, brier: float, **changes: Any) -> Report:
    rows = (RankingRow("popularity", 0.1, 0.9, None, None), RankingRow(OURS, 0.1, ndcg, None, None))
    ranking = RankingResult("by time", 10, rows, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, None, (), ())
    chance = ProbabilityRow(
        "buys", 10, 0.5, 0.8, brier, 0.0, NO_ESTIMATE, NO_ESTIMATE, None, None, 0.0, 0.0, None, UNKNOWN, UNKNOWN, ()
    )  # fmt: skip
    fields: dict[str, Any] = {"seed": 0, "customers": 10, "log": "", "customers_in_log": 20} | changes
    return Report(
        **fields, rankings=(ranking,), probabilities=(chance,), amounts=(), count_weights={}, tifu_settings={}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ndcg", "brier", "holds"),
    [
        (0.1981, 0.1019, [True, True]),
        (0.1979, 0.1, [False, True]),
        (0.2, 0.1021, [True, False]),
        (0.3, 0.05, [True, True]),
    ],
)
def test_a_share_of_ndcg_and_a_rise_of_brier_are_allowed(ndcg: float, brier: float, holds: list[bool]) -> None:
    found = losses(report(0.2, 0.1), report(ndcg, brier))
    assert [loss.metric for loss in found] == ["NDCG@10, by time", "Brier, buys"]
    assert [loss.holds for loss in found] == holds


def test_other_customers_are_not_compared() -> None:
    with pytest.raises(ValueError, match="of 10 and 11 customers"):
        losses(report(0.2, 0.1), report(0.2, 0.1, customers=11))


def test_perplexity_is_the_models_own_of_the_answers_alone(tiny_base: Base) -> None:
    talk = [((5, 9, 200, 17), (30, 31, 7)), ((1,), (2, 3, 4, 5, 6))]
    model = AutoModelForCausalLM.from_pretrained(tiny_base.folder, dtype=torch.float32).eval()
    nats = 0.0
    with torch.inference_mode():
        for prompt, answer in talk:
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
            nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
    found = {
        formats: perplexity(tiny_base, None, talk, formats, Watch())
        for formats in (UNROUNDED, Formats("fp8"), Formats(kv="int8"))
    }
    assert found[UNROUNDED] == pytest.approx(math.exp(nats / 8), rel=0.01)  # the files' fp32 is read as bf16
    assert len(set(found.values())) == 3
    assert Formats("int4", "int8").perplexity_rise == 0.05
    assert Formats("int4", "int8").reference == Formats(kv="model")


def test_a_format_of_the_cpu_is_judged_by_the_decoder_that_serves_it(tiny_model: Callable[[str], Path]) -> None:
    base = resolve_base(str(tiny_model("native")))
    if (refusal := native_refusal(base.config, torch.bfloat16, 16)) is not None:
        pytest.skip(refusal)
    talk = [((5, 9, 200, 17), (30, 31, 7)), ((1,), (2, 3, 4, 5, 6))]
    rounded = [Formats(name, of_cpu=True) for name in ("model", "int8", "int4")]
    rounded.append(Formats("int8", "int8", of_cpu=True))
    found = [perplexity(base, None, talk, formats, Watch()) for formats in rounded]
    assert found[0] == pytest.approx(perplexity(base, None, talk, UNROUNDED, Watch()), rel=0.02)
    assert found[1:] == pytest.approx([found[0]] * 3, rel=0.2)
    assert len(set(found)) == 4
