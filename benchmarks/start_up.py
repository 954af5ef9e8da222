"""How long a start takes: from the command to the ready line and to the first answer, of several installs in turns.

    python benchmarks/start_up.py --install now=.venv/bin/shoplm --install before=../other/.venv/bin/shoplm

The client is there before the server and asks at once, so nothing of its own is counted but the call. The first start
of each install, which reads files, does not count. Servers listen on loopback.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from shoplm.bench.launch import free_ports
from shoplm.bench.report import machine, write_json_of
from shoplm.client import Client

_TIMEOUT_SECONDS = 120.0


class Start(NamedTuple):
    """One start; seconds since the command."""

    ready: float
    answered: float
    memory_mib: float  # resident sets of both processes after the answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/complete-journey"))
    parser.add_argument(
        "--install", action="append", metavar="NAME=COMMAND", help="a shoplm command and what to call it"
    )
    parser.add_argument("--starts", type=int, default=5, help="of each install")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    options, before = parser.parse_args(), machine()
    installs = dict(each.split("=", 1) for each in options.install or [f"shoplm={shutil.which('shoplm')}"])
    found: dict[str, list[Start]] = {name: [] for name in installs}
    for number in range(options.starts + 1):
        for name, command in installs.items():
            start = measure(command, options.bundle.resolve())
            if number:
                found[name].append(start)
    rows = {name: median(starts) for name, starts in found.items()}
    for name, row in rows.items():
        print(
            f"{name}: ready after {row.ready:.2f} s, answered after {row.answered:.2f} s "
            f"({min(each.answered for each in found[name]):.2f} to {max(each.answered for each in found[name]):.2f}), "
            f"{row.memory_mib:.0f} MiB"
        )
    if options.out is not None:
        result = {name: {"median": row._asdict(), "starts": found[name]} for name, row in rows.items()}
        write_json_of({"start_up": result}, before, options.out)
    return 0


def measure(command: str, bundle: Path) -> Start:
    """One start of `command`, and one prediction for the bundle's first demo customer."""
    port, metrics_port = free_ports(2)
    ports = ("--port", str(port), "--metrics-port", str(metrics_port))
    begun = time.perf_counter()
    server = subprocess.Popen([command, "serve", "--bundle", str(bundle), *ports], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        if not any("is ready" in line for line in server.stdout):
            raise SystemExit(f"{command} serve ended with exit code {server.wait()}")
        ready = time.perf_counter() - begun
        with Client(f"127.0.0.1:{port}", timeout=_TIMEOUT_SECONDS) as client:
            client.predict(client.get_model().demo_customer_ids[0])
            answered = time.perf_counter() - begun
        processes = [found := psutil.Process(server.pid), *found.children()]
        return Start(ready, answered, sum(each.memory_info().rss for each in processes) / 2**20)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()


def median(starts: list[Start]) -> Start:
    return Start(*(statistics.median(values) for values in zip(*starts, strict=True)))


if __name__ == "__main__":
    raise SystemExit(main())
