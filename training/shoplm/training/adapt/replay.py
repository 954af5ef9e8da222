"""The base's own answers to ordinary prompts: what an adapter has to keep saying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from shoplm.prompt import PromptBuilder
from shoplm.training.adapt.causal import CPU, load_causal

_BATCH = 24
_MAX_ANSWER_TOKENS = 72


class Replay(msgspec.Struct, frozen=True):
    """A prompt and its answer, as tokens behind a prefix."""

    suffix: tuple[int, ...]
    answer: tuple[int, ...]


@torch.inference_mode()
def replays_of(
    path: Path,
    base: Path,
    builder: PromptBuilder,
    prompts: Sequence[str],
    end_tokens: Sequence[int],
    *,
    seed: int,
    progress: Callable[[int, int], None],
    device: torch.device = CPU,
) -> list[Replay]:
    """The base's answers to `prompts` (temperature 0.8), from `path` where it has them, else written there."""
    if path.exists():
        return msgspec.json.decode(path.read_bytes(), type=list[Replay])
    torch.manual_seed(seed)
    model = load_causal(base, checkpointing=False).to(device).train(False)
    prefix = builder.prefix(None)
    full = [builder.chat(prefix, [("user", prompt)]) for prompt in prompts]
    order = sorted(range(len(full)), key=lambda index: len(full[index]))  # little padding
    replays: list[Replay] = []
    for start in range(0, len(order), _BATCH):
        batch = [full[index] for index in order[start : start + _BATCH]]
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for at, tokens in enumerate(batch):
            ids[at, width - len(tokens) :] = torch.tensor(tokens)
            mask[at, width - len(tokens) :] = 1
        answers = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=True,
            temperature=0.8,
            max_new_tokens=_MAX_ANSWER_TOKENS,
            eos_token_id=list(end_tokens),
            pad_token_id=end_tokens[0],
        )[:, width:]
        for tokens, answer in zip(batch, answers.tolist(), strict=True):
            ends = [at for at, token in enumerate(answer) if token in end_tokens]
            kept = answer[: ends[0] + 1] if ends else answer
            replays.append(Replay(tokens[len(prefix.tokens) :], tuple(kept)))
        progress(len(replays), len(order))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(msgspec.json.encode(replays))
    temporary.replace(path)
    return replays
