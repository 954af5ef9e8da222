"""What an adapter did to ordinary talk: perplexity of the base's own answers to prompts that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import torch
from shoplm.prompt import PromptBuilder
from shoplm.training.adapt.model import TalkingModel
from shoplm.training.adapt.replay import Replay
from torch.nn import functional


class ChatKept(msgspec.Struct, frozen=True):
    """Perplexities per token of the same answers."""

    answers: int
    tokens: int
    base: float  # the base alone, without a history: it wrote them
    adapted: float  # adapted, without a history
    adapted_behind_history: float
    base_behind_history: float  # why an adapter is needed


@torch.inference_mode()
def measure_kept(
    model: TalkingModel, builder: PromptBuilder, replays: Sequence[Replay], histories: Sequence[tuple[int, ...]]
) -> ChatKept:
    """`histories` are customers' prefixes, used in turn."""
    model.train(False)
    bare = builder.prefix(None).tokens
    sums = {"base": 0.0, "adapted": 0.0, "adapted_behind_history": 0.0, "base_behind_history": 0.0}
    tokens = 0
    for index, replay in enumerate(replays):
        history = histories[index % len(histories)]
        tokens += len(replay.answer)
        for name in sums:
            prefix = history if name.endswith("history") else bare
            logits = model.answer_logits(prefix, replay, adapted=name.startswith("adapted"))
            sums[name] += float(functional.cross_entropy(logits, torch.tensor(replay.answer), reduction="sum"))
    means = {name: math.exp(total / max(tokens, 1)) for name, total in sums.items()}
    return ChatKept(len(replays), tokens, **means)
