"""transformers: one beam search, held to a trie by prefix_allowed_tokens_fn. Arguments: folder, dtype, threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM

from peers.rows import trie_items
from peers.worker import Tokens, serve, versions


class Transformers:
    def __init__(self, folder: str, dtype: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._next: dict[tuple[int, ...], list[int]] = {}
        for item in trie_items():
            for level in range(len(item)):
                following = self._next.setdefault(item[:level], [])
                if not following or following[-1] != item[level]:  # items are sorted
                    following.append(item[level])
        self.described = {**versions("transformers", "torch"), "computes": dtype, "kv_cache": dtype}

    def generate(self, prompts: Tokens, output_tokens: int) -> Tokens:
        raise NotImplementedError("measured for its constrained beam search only")

    def search(self, prompt: Sequence[int], beams: int, tokens: int) -> None:
        length = len(prompt)

        def allowed(_: int, sequence: torch.Tensor) -> list[int]:
            return self._next[tuple(sequence[length:].tolist())]

        with torch.inference_mode():
            inputs = torch.tensor([list(prompt)])
            # By itself, generate() would compute the prompt once for each beam.
            cache = self._model(inputs[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(beams)
            found = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                cache=cache,
                num_beams=beams,
                num_return_sequences=beams,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                prefix_allowed_tokens_fn=allowed,
            )
        items = [tuple(one) for one in found[:, length:].tolist()]
        if len(set(items)) != beams or any(item[-1] not in self._next[item[:-1]] for item in items):
            raise ValueError(f"expected {beams} different items of the trie, got {items}")


@contextmanager
def load() -> Iterator[Transformers]:
    torch.set_num_threads(int(sys.argv[3]))
    yield Transformers(sys.argv[1], sys.argv[2])


if __name__ == "__main__":
    serve(load)
