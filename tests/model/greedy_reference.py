"""What the decoders are compared with, token for token: transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def greedy_answers(folder: Path, prompts: Iterable[Sequence[int]], new_tokens: int) -> list[tuple[int, ...]]:
    """Continuations of so many tokens, in fp32, the end of sequence ignored."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(new_tokens):
                tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
            answers.append(tuple(tokens[len(prompt) :]))
    return answers
