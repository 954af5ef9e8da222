"""What integer weights cost the language model: perplexity of two texts in each format of the C++ decoder.

    python benchmarks/perplexity_cpu.py
    python benchmarks/perplexity_cpu.py --formats int8 int4 --base FOLDER --output results.json

The texts are the start of this project's documentation and what the model writes itself (temperature 1). Exit code 1:
a format costs more than its bound over bf16, 2 % for int8 and 5 % for int4.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from shoplm.bench.report import machine, versions
from shoplm.engine.direct import DirectRunner, Output
from shoplm.model.base import resolve_base
from shoplm.model.config import ModelConfig
from shoplm.model.native.backend import NativeBackend, native_refusal
from shoplm.model.native.linear import WeightFormat
from shoplm.model.tokenizer import Tokenizer
from shoplm.model.weights import DecoderWeights, load_weights
from shoplm.request import Generate, Sampling
from shoplm.training.native_scorer import NativeScorer

ROOT = Path(__file__).parent.parent
BOUNDS = {WeightFormat.INT8: 0.02, WeightFormat.INT4: 0.05}
CHUNK = 512  # tokens that are scored together, each from those before it in the chunk
DOCUMENTATION_TOKENS = 10_240
OPENINGS = ("The", "In the morning", "Question:", "A shop", "def main", "Once", "Dear customer,", "1.")


def mean_nats(scorer: NativeScorer, tokens: Sequence[int]) -> float:
    """Of all tokens but the first of each chunk."""
    chunks = [tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK)]
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    return sum(map(scorer.nats, chunks)) / sum(len(chunk) - 1 for chunk in chunks)


def documentation(tokenizer: Tokenizer) -> list[int]:
    """The first tokens of README.md and docs/*.md."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return tokenizer.encode("\n".join(path.read_text() for path in files))[:DOCUMENTATION_TOKENS]


def own_text(config: ModelConfig, weights: DecoderWeights, tokenizer: Tokenizer) -> list[int]:
    """What the model writes behind the openings in bf16, one after the other."""
    backend = NativeBackend(config, weights, pages=1024, state_slots=16)
    openings = [tokenizer.encode(text) for text in OPENINGS]
    tasks = [Generate(CHUNK - len(opening), Sampling(temperature=1.0, seed=i)) for i, opening in enumerate(openings)]
    answers = DirectRunner(backend).run(list(zip(openings, tasks, strict=True)))
    return [token for opening, answer in zip(openings, answers, strict=True) for token in (*opening, *_tokens(answer))]


def _tokens(answer: Output) -> list[int]:
    assert isinstance(answer, tuple)
    return [int(token) for token in answer]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a base model, as `shoplm serve --base` takes it; unset: the packaged default")
    parser.add_argument("--formats", nargs="+", choices=("int8", "int4"), default=["int8", "int4"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    folder = resolve_base(arguments.base).folder
    config = ModelConfig.from_folder(folder)
    refusal = native_refusal(config, torch.bfloat16, page_size=16)
    if refusal is not None:
        sys.exit(f"the C++ decoder cannot run here: {refusal}")
    weights, tokenizer = load_weights(folder, config, torch.bfloat16), Tokenizer.from_folder(folder)
    with torch.inference_mode():
        texts = {"documentation": documentation(tokenizer), "own text": own_text(config, weights, tokenizer)}
        formats = [WeightFormat.BF16, *(WeightFormat[name.upper()] for name in arguments.formats)]
        scorers = ((format, NativeScorer(config, weights, format, CHUNK)) for format in formats)
        nats = {
            format.name.lower(): {name: mean_nats(scorer, text) for name, text in texts.items()}
            for format, scorer in scorers
        }
    reference = nats.pop("bf16")
    rises = {
        format: {name: round(math.expm1(value - reference[name]), 5) for name, value in by_text.items()}
        for format, by_text in nats.items()
    }
    report = {
        "machine": machine(),
        "versions": versions(),
        "base": folder.name,
        "tokens": {name: len(text) for name, text in texts.items()},
        "perplexity_bf16": {name: round(math.exp(value), 4) for name, value in reference.items()},
        "rise": rises,
    }
    print(json.dumps(report, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(max(rise.values()) > BOUNDS[WeightFormat[format.upper()]] for format, rise in rises.items()))


if __name__ == "__main__":
    sys.exit(main())
