"""What an explanation adds to a call: the same calls with and without, in turn, one at a time, through gRPC.

    python benchmarks/explanations.py --bundle bundles/complete-journey --out explanations.json

Demo customers, their histories in the cache after the first round, as on a page that is looked at. Starts a server of
its own, unless --address names one.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shoplm.bench.launch import own_server
from shoplm.bench.report import machine, write_json_of
from shoplm.client import Client

_TIMEOUT_SECONDS = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/complete-journey"))
    parser.add_argument("--address", help="of a running server")
    parser.add_argument("--forks", type=int, default=32, help="explanation_forks of the own server")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each kind per customer")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    options = parser.parse_args()
    before = machine()
    with _address(options) as address, Client(address, timeout=_TIMEOUT_SECONDS) as client:
        customers = client.get_model().demo_customer_ids
        rows = {service: measure(client, service, customers, options.rounds) for service in ("recommend", "predict")}
        result = {"customers": len(customers), "rounds": options.rounds, "explanation_forks": options.forks, **rows}
    for service, row in rows.items():
        print(
            f"{service}: {row['plain_ms']:.1f} ms, explained {row['explained_ms']:.1f} ms "
            f"({row['explanation_tokens']:.0f} tokens more)"
        )
    if options.out is not None:
        write_json_of({"explanations": result}, before, options.out)
    return 0


def measure(client: Client, service: str, customers: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Medians over calls, in milliseconds; the customers' first calls are not counted."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    tokens = []
    for number in range(rounds + 1):
        for customer in customers:
            for explain in (False, True):
                begun = time.perf_counter()
                answer = getattr(client, service)(customer, explain=explain)
                passed = time.perf_counter() - begun
                if number:
                    seconds[explain].append(passed)
                    tokens += [answer.usage.explanation_tokens] if explain else []
    return {
        "plain_ms": 1e3 * statistics.median(seconds[False]),
        "explained_ms": 1e3 * statistics.median(seconds[True]),
        "explanation_tokens": statistics.fmean(tokens),
    }


@contextlib.contextmanager
def _address(options: argparse.Namespace) -> Iterator[str]:
    if options.address is not None:
        yield options.address
        return
    flags = ["--bundle", str(options.bundle), "--explanation-forks", str(options.forks)]
    with tempfile.TemporaryDirectory() as folder, own_server(flags, Path(folder) / "server.log") as server:
        yield server.address


if __name__ == "__main__":
    sys.exit(main())
