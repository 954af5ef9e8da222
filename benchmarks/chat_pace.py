"""How fast do answers come? Asks servers the same questions in turns: tokens a second from the first token on.

    shoplm serve --bundle bundles/complete-journey
    shoplm serve --bundle bundles/complete-journey --max-draft-tokens 0 --port 50052 --metrics-port 9465
    python benchmarks/chat_pace.py benchmarks/questions/complete-journey.toml --customer 1800 \\
        --addresses 127.0.0.1:50051 127.0.0.1:50052 --labels guesses none --at-once 1 8

Greedy, grounded. Each round asks every server some of the questions, so many at once; ratios are medians over the
rounds of the first server's rate to each other's. Ends with 1 where two servers answer a question differently.
"""

from __future__ import annotations

import argparse
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from shoplm.bench.report import machine, write_json_of
from shoplm.client import Client

_ROUND = 8  # questions
_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Pace:
    """One server, asked so many questions at once."""

    server: str
    at_once: int
    tokens: int
    seconds: float  # all rounds
    tokens_per_second: float  # median of the rounds
    ratio: float  # the first server's rate to this one's, median of the rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="TOML with `answered`, as in benchmarks/questions")
    parser.add_argument("--addresses", nargs="+", default=["127.0.0.1:50051"])
    parser.add_argument("--labels", nargs="+", help="what the servers are called, in their order; else their addresses")
    parser.add_argument("--customer", help="a demo customer, whose history stands before each question")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1])
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write the rates here, as JSON")
    options = parser.parse_args()
    questions = [str(each["question"]) for each in tomllib.loads(options.questions.read_text("utf-8"))["answered"]]
    labels = options.labels or options.addresses
    clients = {label: Client(address) for label, address in zip(labels, options.addresses, strict=True)}
    before = machine()
    paces, same = [], True
    for at_once in options.at_once:
        rates: dict[str, list[float]] = {label: [] for label in clients}
        tokens, seconds = dict.fromkeys(clients, 0), dict.fromkeys(clients, 0.0)
        for start in range(0, len(questions), _ROUND):
            texts = []
            for label, client in clients.items():
                count, taken, answers = _ask(client, questions[start : start + _ROUND], at_once, options)
                rates[label].append(count / taken)
                tokens[label] += count
                seconds[label] += taken
                texts.append(answers)
            same = same and all(each == texts[0] for each in texts)
        first = rates[labels[0]]
        for label, found in rates.items():
            ratio = median(one / other for one, other in zip(first, found, strict=True))
            paces.append(Pace(label, at_once, tokens[label], seconds[label], median(found), ratio))
            print(f"{label:22} {at_once:3} at once: {median(found):7.1f} tokens/s, first / this: {ratio:.2f}")
    print("all answers are the same" if same else "ANSWERS DIFFER")
    if options.out is not None:
        write_json_of({"same": same, "paces": list(map(asdict, paces))}, before, options.out)
    return 0 if same else 1


def _ask(
    client: Client, questions: list[str], at_once: int, options: argparse.Namespace
) -> tuple[int, float, list[str]]:
    """Tokens behind the first of each answer, the seconds in which they came, and the answers."""

    def one(question: str) -> tuple[int, float, float, str]:
        stream = client.chat(
            question, customer=options.customer, max_tokens=options.max_tokens, timeout=_TIMEOUT_SECONDS
        )
        pieces, begun = [], None
        for piece in stream:
            begun = begun or time.perf_counter()
            pieces.append(piece)
        ended = time.perf_counter()
        return stream.summary.usage.completion_tokens - 1, begun or ended, ended, "".join(map(str, pieces))

    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(one, questions))
    alone = at_once == 1
    seconds = (
        sum(ended - begun for _, begun, ended, _ in found)
        if alone
        else max(ended for *_, ended, _ in found) - min(begun for _, begun, _, _ in found)
    )
    return sum(count for count, *_ in found), seconds, [text for *_, text in found]


if __name__ == "__main__":
    sys.exit(main())
