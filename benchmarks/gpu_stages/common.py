"""What every stage needs: the device, rows of results, and times by CUDA events."""

from __future__ import annotations

import functools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

L2_BYTES = 128 << 20  # inputs are rotated through at least this much, more than any card's L2
MOST_COPIES = 1024  # of inputs, each with a launch of its own
Call = Callable[[], object]
NO_FP8 = "this card has no e4m3"
NOT_REACHED = "rows behind this were not reached"


@dataclass(frozen=True, slots=True)
class Row:
    """One result. `passed` None: nothing was promised; a row without a value says in `note` why."""

    stage: str
    name: str
    value: float | None
    unit: str
    passed: bool | None = None
    target: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Stage:
    """A running stage. Rows are written as they come, so that a stage that is killed leaves those it had."""

    name: str
    path: Path  # JSON lines
    smoke: bool  # tiny shapes on a CPU, under the interpreter: the code paths, not the times
    failed: int = 0

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU that interprets."""
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of activations: bf16, which the interpreter computes wrongly in silence."""
        return torch.float32 if self.smoke else torch.bfloat16

    @property
    def has_fp8(self) -> bool:
        """Whether the card has e4m3."""
        return self.smoke or torch.cuda.get_device_capability() >= (8, 9)

    def size(self, full: int, tiny: int) -> int:
        """A number of a measurement, and the one that the interpreter can afford."""
        return tiny if self.smoke else full

    def row(self, name: str, value: float | None, unit: str, **rest: Any) -> None:
        """Keep a result."""
        row = Row(self.name, name, value, unit, **rest)
        self.failed += row.passed is False
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row) | {"machine": machine(self.smoke)}) + "\n")

    def check(self, name: str, check: Call, *, fp8: bool = False) -> None:
        """A row that says whether `check` returned without an error; the others go on. `fp8`: it needs e4m3."""
        if fp8 and not self.has_fp8:
            self.row(name, None, "", note=NO_FP8)
            return
        start = time.perf_counter()
        try:
            check()
        except Exception as error:
            self._failure(name, "", error)
        else:
            self.row(name, time.perf_counter() - start, "s", passed=True)

    def measure(
        self, name: str, unit: str, measurement: Callable[[], float], *, fp8: bool = False, **rest: Any
    ) -> float | None:
        """A row with what `measurement` gives, or with the error that it raised; it makes its inputs itself, so that
        they may lack room. `target`: at least, for rates (units with "/"), at most for times. `fp8`: it needs e4m3."""
        if fp8 and not self.has_fp8:
            self.row(name, None, unit, note=NO_FP8)
            return None
        try:
            value = measurement()
        except Exception as error:
            self._failure(name, unit, error)
            return None
        target = rest.get("target")
        if target is not None and not self.smoke:
            rest["passed"] = value >= target if "/" in unit or unit == "share" else value <= target
        self.row(name, value, unit, **rest)
        return value

    def _failure(self, name: str, unit: str, error: Exception) -> None:
        """A failed row. Ends the stage where the card answers nothing any more, as after an illegal address: all rows
        behind this one would fail with the same words."""
        note = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        lost = not self.smoke and _is_lost()
        self.row(name, None, unit, passed=False, note=f"{note}; {NOT_REACHED}" if lost else note)
        if lost:
            raise SystemExit(1) from error


def _is_lost() -> bool:
    """Whether the process's context is broken; it then repeats its error at every call. Out of memory does not."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@functools.cache
def machine(smoke: bool) -> dict[str, str]:
    """Card, driver and versions; kept with every row."""
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    if smoke:
        return {"card": "interpreter on a CPU", "driver": "none"} | versions
    return {"card": torch.cuda.get_device_name(), "driver": _driver(), "cuda": str(torch.version.cuda)} | versions


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.split("\n")[0].strip()


def copies(bytes_of_one: int, smoke: bool) -> int:
    """How many sets of inputs it takes so that each is out of L2 when its turn comes again."""
    return 2 if smoke else max(2, min(MOST_COPIES, -(-L2_BYTES // max(1, bytes_of_one)) + 1))


def median_us(calls: Sequence[Call], *, smoke: bool, rounds: int = 20, graphed: bool = True) -> float:
    """Median microseconds of one of `calls`, which do the same work on inputs of their own, in turn.

    `graphed`: all calls are captured as one CUDA graph, so that launching from Python is not measured: for kernels of
    less than a few hundred microseconds. Otherwise each call is timed by its own pair of events.
    """
    for call in calls:
        call()  # compiles
    if smoke:
        start = time.perf_counter()
        calls[0]()
        return (time.perf_counter() - start) * 1e6
    torch.cuda.synchronize()
    if not graphed:
        return statistics.median(_event_us(calls[at % len(calls)]) for at in range(rounds))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(_event_us(graph.replay) for _ in range(rounds)) / len(calls)


_SLEEP_CYCLES = 2_000_000  # about a millisecond, in which the host queues all that is measured


def _event_us(call: Call) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]  # else the card would wait for the host between the events
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) * 1e3
