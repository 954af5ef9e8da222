"""An engine's process. It is started before anybody can say what it will serve: its imports take seconds, in which the
API process makes its own and reads its settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

from shoplm.engine.channel import socket_pair

# Called with a descriptor. -P: no module of the working directory, as for the command that starts this.
PROGRAM = (sys.executable, "-P", "-m", "shoplm.engine.process")
_ENVIRONMENT = {
    # Threads that spin while they wait take the cores from whoever shares them, the API process first. But a step has
    # hundreds of waits of some microseconds, and to be woken takes longer: they spin for a tenth of a millisecond.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "20000",
}


class EngineProcess:
    """Starts at once, loads when it is told what, and ends with the API process or when the channel is closed."""

    def __init__(self, program: Sequence[str] = PROGRAM) -> None:
        self.connection, its = socket_pair()
        with its:
            self._process = subprocess.Popen(
                [*program, str(its.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=(its.fileno(),),
                env={**_ENVIRONMENT, **os.environ},
            )

    @property
    def id(self) -> int:
        """The process id."""
        return self._process.pid

    def load(self, spec: bytes) -> None:
        """Send what to load, an `EngineSpec` as JSON. An engine that has died is no error here; `wait` returns then."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(spec + b"\n")
            self._process.stdin.flush()

    def send_shop_texts(self, shop_texts: bytes) -> None:
        """`ShopTexts` as MessagePack; where that is empty, the engine reads what it needs from the bundle. Blocks until
        the engine has taken them."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(shop_texts)

    async def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        return await asyncio.to_thread(self._process.wait)

    def kill(self) -> None:
        """Kill it at once, whatever it is doing."""
        self._process.kill()

    def discard(self) -> None:
        """End a process that is not wanted, and wait for its end."""
        self.connection.close()
        self.kill()
        self._process.communicate()
