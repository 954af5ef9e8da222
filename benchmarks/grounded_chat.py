"""Does chat answer from the shop's facts? Asks a running server a list of questions, and compares by string.

    shoplm serve --bundle bundles/complete-journey
    python benchmarks/grounded_chat.py benchmarks/questions/complete-journey.toml --customers 1800 441 569 --after 3

A question counts as right if the answer holds one of its expected strings, and as declined if it
holds `DECLINED`'s first words. Greedy, at most 40 tokens; asked with grounding, and once more without,
behind the history of each customer: one whom the shop does not know ends the run. With `--after N` each is asked a
third time, grounded, as the next turn behind N other questions and their answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from shoplm.client import Client, Message
from shoplm.retrieval import DECLINED

MAX_TOKENS = 40
_TIMEOUT_SECONDS = 300.0
_AT_ONCE = 8
_DECLINED = DECLINED.split(".")[0].lower()


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and what became of it."""

    question: str
    answer: str
    right: bool
    cited: tuple[str, ...]
    cached_tokens: int
    prompt_tokens: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="TOML: `answered`, with `expect`, and `unanswered`")
    parser.add_argument("--address", default="127.0.0.1:50051")
    parser.add_argument(
        "--customers", nargs="*", default=[], help="demo customers, whose history stands before each question"
    )
    parser.add_argument("--after", type=int, default=0, metavar="N", help="ask again behind N other turns; 0: do not")
    parser.add_argument("--out", type=Path, help="write all answers here, as JSON")
    options = parser.parse_args()
    questions = tomllib.loads(options.questions.read_text("utf-8"))
    with Client(options.address) as client:
        version = client.get_model().model.version
        rows = {
            f"{kind}, grounding {name}": [
                asked
                for customer in options.customers or [None]
                for asked in ask(client, questions[kind], customer, grounding)
            ]
            for name, grounding in (("on", True), ("off", False))
            for kind in ("answered", "unanswered")
        }
        for kind in ("answered", "unanswered") if options.after else ():
            alone = rows[f"{kind}, grounding on"]
            count = len(questions[kind])
            rows[f"{kind}, after {options.after} turns"] = [
                asked
                for at, customer in enumerate(options.customers or [None])
                for asked in ask(
                    *(client, questions[kind], customer, True),
                    turns_before(alone[at * count : (at + 1) * count], options.after),
                )
            ]
    print(f"bundle version {version}, customers {', '.join(options.customers) or 'none'}")
    for name, asked in rows.items():
        right = sum(each.right for each in asked)
        print(f"{name:28} {right:3} of {len(asked)} right ({100.0 * right / len(asked):.0f} %)")
    if options.out is not None:
        data = {name: [asdict(each) for each in asked] for name, asked in rows.items()}
        options.out.write_text(json.dumps({"version": version, **data}, indent=1, ensure_ascii=False) + "\n")
    return 0


def turns_before(asked: list[Asked], count: int) -> list[list[Message]]:
    """For each question `count` others of the list, with their answers: spread over it, for neighbours are alike."""
    step = max(1, len(asked) // (count + 1))
    return [
        [
            message
            for turn in range(1, count + 1)
            for other in [asked[(at + turn * step) % len(asked)]]
            for message in (Message("user", other.question), Message("assistant", other.answer))
        ]
        for at in range(len(asked))
    ]


def ask(
    client: Client,
    questions: list[dict[str, object]],
    customer: str | None,
    grounding: bool,
    before: Sequence[Sequence[Message]] = (),
) -> list[Asked]:
    """All questions, a few at once. Without `expect`, declining is right. `before`: the turns before each."""

    def one(entry: dict[str, object], turns: Sequence[Message]) -> Asked:
        question, expect = str(entry["question"]), entry.get("expect")
        stream = client.chat(
            [*turns, Message("user", question)],
            customer=customer,
            max_tokens=MAX_TOKENS,
            grounding=grounding,
            timeout=_TIMEOUT_SECONDS,
        )
        answer = stream.text()
        if customer is not None and not stream.summary.usage.history_tokens:
            raise SystemExit(f"customer {customer} has no history here")
        wanted = [str(each) for each in expect] if isinstance(expect, list) else [_DECLINED]
        right = any(each.lower() in answer.lower() for each in wanted)
        cited = tuple(each.title for each in stream.summary.citations)
        usage = stream.summary.usage
        return Asked(question, answer, right, cited, usage.cached_tokens, usage.prompt_tokens)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(one, questions, before or [()] * len(questions)))


if __name__ == "__main__":
    sys.exit(main())
