"""OpenVINO GenAI's ContinuousBatchingPipeline. Arguments: the exported model's folder, the number of threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import openvino
import openvino_genai

from peers.rows import MOST_REQUESTS
from peers.worker import Tokens, serve, versions

CACHE_GIB = 2


class OpenVino:
    def __init__(self, folder: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_seqs = 2 * MOST_REQUESTS
        scheduler.max_num_batched_tokens = 512
        scheduler.enable_prefix_caching = True
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", settings)
        core = openvino.Core()
        compiled = core.compile_model(f"{folder}/openvino_model.xml", "CPU", settings)
        self.described = {
            **versions("openvino", "openvino-genai"),
            "computes": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
            "kv_cache": compiled.get_property("KV_CACHE_PRECISION").get_type_name(),
        }

    def generate(self, prompts: Tokens, output_tokens: int) -> Tokens:
        config = openvino_genai.GenerationConfig(max_new_tokens=output_tokens, ignore_eos=True, do_sample=False)
        return [list(result.m_generation_ids[0]) for result in self._run(prompts, config)]

    def search(self, prompt: Sequence[int], beams: int, tokens: int) -> None:
        config = openvino_genai.GenerationConfig(
            max_new_tokens=tokens, ignore_eos=True, num_beams=beams, num_return_sequences=beams
        )
        found = self._run([prompt], config)[0].m_generation_ids
        if [len(one) for one in found] != [tokens] * beams:
            raise ValueError(f"expected {beams} x {tokens} tokens, got {found}")

    def _run(self, prompts: Tokens, config: openvino_genai.GenerationConfig) -> Any:
        inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        return self._pipeline.generate(inputs, [config] * len(inputs))


@contextmanager
def load() -> Iterator[OpenVino]:
    yield OpenVino(sys.argv[1], int(sys.argv[2]))


if __name__ == "__main__":
    serve(load)
