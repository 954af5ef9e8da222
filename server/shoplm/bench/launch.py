"""A server of the bench's own, on free ports of loopback, stopped at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120.0
STOP_SECONDS = 45.0


class LaunchError(Exception):
    """The server did not start; the message ends with what it wrote."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server's addresses and process; None where there are no metrics, or the process is not to be seen."""

    address: str
    metrics_url: str | None
    pid: int | None


@contextlib.contextmanager
def own_server(arguments: Sequence[str], log: Path, start_seconds: float = START_SECONDS) -> Iterator[RunningServer]:
    """Run `shoplm serve` with `arguments` and the engine API, wait until it is ready, and stop it with SIGTERM.

    Its output goes to `log`. Raises LaunchError when it ends or is not ready within `start_seconds`.
    """
    port, metrics_port = free_ports(2)
    # Ended by SIGTERM, this process must not leave the server behind: as an exception, it passes through `finally`.
    # While the server is being started there is nothing yet to stop: the exception waits until there is.
    started, terminated = False, False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True
        if started:
            sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, terminate)
    command = [
        *(sys.executable, "-m", "shoplm.cli", "serve", "--engine-api"),
        *("--port", str(port), "--metrics-port", str(metrics_port), "--lame-duck-seconds", "0", *arguments),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        started = True
        if terminated:
            sys.exit(128 + signal.SIGTERM)
        _wait_until_ready(process, f"http://127.0.0.1:{metrics_port}/readyz", log, start_seconds)
        yield RunningServer(f"127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics", process.pid)
    finally:
        _stop(process)
        signal.signal(signal.SIGTERM, before)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise LaunchError(f"the server ended with exit code {process.returncode}:\n{_tail(log)}")
        try:
            with urllib.request.urlopen(url, timeout=1.0) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise LaunchError(f"the server was not ready within {seconds:g} s:\n{_tail(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    """Free ports of loopback; held together while they are chosen, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _tail(log: Path, characters: int = 2000) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-characters:].strip() or f"(nothing in {os.fspath(log)})"
