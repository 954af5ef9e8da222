"""A contestant's process, seen from the driver: asked over pipes, stopped while it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

END_SECONDS = 20.0


class WorkerError(Exception):
    """The worker failed or took too long; the message says how."""


class Worker:
    """One contestant. Between its turns all of its processes are held by SIGSTOP, so that none of them can spin."""

    def __init__(self, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
                bufsize=0,
            )
        self.pid = self._process.pid
        self._log = log
        self._unread = b""

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line, parsed. Raises WorkerError where none comes in time, or the process has ended."""
        deadline = time.monotonic() + seconds
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerError(f"no answer within {seconds:.0f} s")
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    raise WorkerError(f"ended with code {self._process.wait()}: {self._last_line()}")
                self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise WorkerError(answer["failed"])
        return answer

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """One row's answer, with the processor time of all its processes as `cpu_seconds`. Raises WorkerError."""
        assert self._process.stdin is not None
        before = self._cpu_seconds()
        self.resume()
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            answer = self.answer(seconds)
            return {**answer, "cpu_seconds": self._cpu_seconds() - before}
        except OSError as error:
            raise WorkerError(f"cannot be asked: {error}") from error
        finally:
            self.pause()

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self, seconds: float = END_SECONDS) -> None:
        """Ends it: the end of its input first, and after `seconds` SIGKILL for whatever of it is left."""
        self.resume()
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(seconds)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _cpu_seconds(self) -> float:
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            for process in (parent, *parent.children(recursive=True)):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _last_line(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return lines[-1][-300:] if lines else "it wrote nothing"
