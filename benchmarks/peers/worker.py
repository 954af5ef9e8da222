"""A contestant's process: loads once, then measures a row for each line on standard input. Standard library only.

Answers are JSON lines: first {"ready": {...}} with versions and what is really computed; then for each
{"row": name, "seed": n} a {"seconds": s, "digest": sha256 of the tokens, "firsts": first token of each request}. Either
may be {"failed": reason} instead, the second also {"unsupported": reason}.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from importlib import metadata
from typing import Any, Protocol

from peers.rows import ROWS, WARM_UPS, Row, check_counts

Tokens = Sequence[Sequence[int]]


class Contestant(Protocol):
    """One loaded model. `described` says versions, settings and the precision that is really used."""

    described: dict[str, str]

    def generate(self, prompts: Tokens, output_tokens: int) -> Tokens:
        """Greedy tokens of all prompts, run together; the end of sequence is ignored."""
        ...

    def search(self, prompt: Sequence[int], beams: int, tokens: int) -> None:
        """One beam search. Raises NotImplementedError where there is none."""
        ...


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by package."""
    return {package: metadata.version(package) for package in packages}


def measure(contestant: Contestant, row: Row, seed: int) -> dict[str, Any]:
    """Runs one row. Raises ValueError where the tokens are not as many as were asked for."""
    prompts = row.prompts(seed)
    outputs: Tokens = []
    start = time.perf_counter()
    if row.beams:
        contestant.search(prompts[0], row.beams, row.output_tokens)
    else:
        outputs = contestant.generate(prompts, row.output_tokens)
    seconds = time.perf_counter() - start
    if not row.beams:
        check_counts(row, outputs)
    plain = [list(map(int, tokens)) for tokens in outputs]
    digest = hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]
    return {"seconds": seconds, "digest": digest, "firsts": [tokens[0] for tokens in plain]}


def serve(load: Callable[[], AbstractContextManager[Contestant]]) -> None:
    """The process's main loop. What libraries print goes to standard error, so that only answers are on the pipe."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")

    try:
        with load() as contestant:
            for row in WARM_UPS:
                with suppress(NotImplementedError):
                    measure(contestant, row, 0)
            answer({"ready": contestant.described})
            for line in sys.stdin:
                asked = json.loads(line)
                try:
                    answer(measure(contestant, ROWS[asked["row"]], asked["seed"]))
                except NotImplementedError as error:
                    answer({"unsupported": str(error)})
    except Exception as error:
        answer({"failed": f"{type(error).__name__}: {error}"[:500]})
        raise
