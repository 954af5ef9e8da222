"""The default base model: greedy chat equals transformers token for token, whatever else the engine does."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from real_engine import answer, answers, request, running, tasks
from shoplm.engine.spec import EngineSpec
from shoplm.model.tokenizer import Tokenizer
from shoplm.request import Generate, StepStats
from transformers import AutoModelForCausalLM, PreTrainedModel

# Around the pages (16 tokens), the chunks of a mixed step (128) and of a whole one (512).
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 65, 100, 127, 129, 200, 257, 400, 513, 1_500)
NEW_TOKENS = 8
GREETINGS = ("Our customer", "Yesterday a family", "The old baker", "Nobody in the shop", "My neighbour")
VERBS = ("bought", "returned", "asked for", "did not find", "recommended", "weighed", "paid for", "forgot")
THINGS = ("milk", "two loaves of bread", "a bag of apples", "frozen pizza", "oat flakes", "dark chocolate", "rice")
ENDS = ("before noon.", "because of the discount.", "and went home.", "with a coupon.", "for the weekend.")


def prompts(folder: Path) -> list[tuple[int, ...]]:
    """English of exactly these lengths: the model is sure of its next tokens, as it is in use."""
    tokenizer = Tokenizer.from_folder(folder)
    found = []
    for number, length in enumerate(LENGTHS):
        words = random.Random(number)
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += tokenizer.encode(" ".join(map(words.choice, (GREETINGS, VERBS, THINGS, ENDS))) + " ")
        found.append(tuple(tokens[:length]))
    return found


def reference(folder: Path, asked: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedy continuations by transformers; the end of the text ends nothing."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for prompt in asked:
            produced: list[int] = []
            output = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            for _ in range(NEW_TOKENS):
                produced.append(int(output.logits[0, -1].argmax()))
                step = torch.tensor([produced[-1:]])
                output = model(step, past_key_values=output.past_key_values, use_cache=True)
            found.append(tuple(produced))
    return found


@pytest.mark.real_base
async def test_greedy_chat_equals_transformers(default_base: Path) -> None:
    asked = prompts(default_base)
    expected = reference(default_base, asked)
    assert len(set(expected)) > 10
    spec = EngineSpec(base_folder=str(default_base), dtype="float32", kv_cache_bytes=1 << 29)
    stats: list[StepStats] = []
    async with running(spec) as client:
        client.on_stats(stats.append)
        for index, (prompt, tokens) in enumerate(zip(asked, expected, strict=True)):
            got = await answer(client, request(f"alone {index}", prompt, Generate(NEW_TOKENS), root=f"root {index}"))
            assert got.tokens == tokens, f"alone, {len(prompt)} tokens"
            assert got.end.cached_tokens == 0
        mixed_before = sum(each.mixed_steps for each in stats)
        others = [request(f"task {i}", asked[i][:60], task) for i, task in enumerate(tasks(len(asked)))]
        for name in ("mixed", "warm"):
            chats = [request(f"{name} {i}", prompt, Generate(NEW_TOKENS)) for i, prompt in enumerate(asked)]
            company = [request(f"{name} {each.request_id}", each.tokens, each.task) for each in others]
            together = [each for pair in itertools.zip_longest(chats, company) for each in pair if each is not None]
            ends = dict(zip((each.request_id for each in together), await answers(client, together), strict=True))
            for index, (prompt, tokens) in enumerate(zip(asked, expected, strict=True)):
                got = ends[f"{name} {index}"]
                assert got.tokens == tokens, f"{name}, {len(prompt)} tokens"
                if name == "warm":
                    assert got.end.cached_tokens == min(len(prompt) // 16 * 16, len(prompt) - 1)
    assert sum(each.mixed_steps for each in stats) - mixed_before > 5
