"""How far a run is and how well it does: one reporter, to which views (terminal, TensorBoard) listen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

LOSS, NDCG = "loss", "NDCG@10"


@dataclass(frozen=True, slots=True)
class Advance:
    """A stage of a run went on."""

    stage: str
    done: int
    total: int
    tokens: int  # read by the model since this process began the stage; 0: the stage reads none


@dataclass(frozen=True, slots=True)
class Point:
    """Measured at a step of a stage."""

    stage: str
    step: int
    values: dict[str, float]


class View(Protocol):
    """Something that shows or keeps what is reported."""

    def say(self, text: str) -> None:
        """A line for people."""

    def advance(self, advance: Advance) -> None:
        """Called often: must be cheap."""

    def record(self, point: Point) -> None:
        """Values to keep."""


class Watch:
    """What a run reports to. Keeps the points, for the learning curve of the report; without views it is silent."""

    def __init__(self, views: Sequence[View] = ()) -> None:
        self._views = views
        self.points: list[Point] = []

    def say(self, text: str) -> None:
        """Say what is going on."""
        for view in self._views:
            view.say(text)

    def advance(self, stage: str, done: int, total: int, tokens: int = 0) -> None:
        """`done` of `total` units of a stage are through."""
        for view in self._views:
            view.advance(Advance(stage, done, total, tokens))

    def record(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Values at a step: losses, validation NDCG."""
        self.points.append(Point(stage, step, values))
        for view in self._views:
            view.record(self.points[-1])

    def curve(self, stage: str, name: str, most: int = 60) -> list[tuple[float, float]]:
        """(step, value) of a stage, at most `most` of them: neighbours are averaged."""
        found = [
            (point.step, point.values[name]) for point in self.points if point.stage == stage and name in point.values
        ]
        width = -(-len(found) // most)
        runs = [found[start : start + width] for start in range(0, len(found), max(width, 1))]
        return [(float(run[-1][0]), sum(value for _, value in run) / len(run)) for run in runs]


class EventLog:
    """Writes what TensorBoard reads: one scalar per stage and name."""

    def __init__(self, folder: Path) -> None:
        # A writer of 90 KB; TensorBoard itself is needed only to look at the logs.
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def say(self, text: str) -> None:
        """Words are for the terminal."""

    def advance(self, advance: Advance) -> None:
        """TensorBoard shows values, not bars."""

    def record(self, point: Point) -> None:
        for name, value in point.values.items():
            self._writer.add_scalar(f"{point.stage}/{name}".replace(" ", "_").replace("@", "_"), value, point.step)

    def close(self) -> None:
        self._writer.close()


@contextmanager
def event_log(folder: Path | None) -> Iterator[Sequence[View]]:
    """The views that `--logs` asks for: one, or none."""
    if folder is None:
        yield ()
        return
    log = EventLog(folder)
    try:
        yield (log,)
    finally:
        log.close()


@dataclass(slots=True)
class _Stage:
    begun: float
    last_line: float
    first: Advance
    now: Advance


class Pace:
    """Turns reports into a text per stage: values, tokens per second, time left. A stage begins with its first advance;
    what was done before that, such as shards of a stopped run, does not count for the pace."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._stages: dict[str, _Stage] = {}
        self._values: dict[str, dict[str, float]] = {}

    def advance(self, advance: Advance) -> None:
        if advance.stage not in self._stages:
            now = self._clock()
            self._stages[advance.stage] = _Stage(now, now, advance, advance)
        self._stages[advance.stage].now = advance

    def record(self, point: Point) -> None:
        self._values.setdefault(point.stage, {}).update(point.values)

    def line_due(self, name: str, seconds: float) -> bool:
        """Whether the stage had no line for so many seconds, or is through; the next one is counted from now."""
        stage, now = self._stages[name], self._clock()
        due = now - stage.last_line >= seconds or stage.now.done >= stage.now.total
        if due:
            stage.last_line = now
        return due

    def text(self, name: str) -> str:
        """Such as `loss 7.412, NDCG@10 0.2253, 812 tokens/s`."""
        values = self._values.get(name, {})
        parts = [f"{key} {value:.4f}" if key == NDCG else f"{key} {value:.3f}" for key, value in values.items()]
        stage = self._stages.get(name)
        if stage is not None and stage.now.tokens > stage.first.tokens:
            tokens = stage.now.tokens - stage.first.tokens
            parts.append(f"{tokens / max(self._clock() - stage.begun, 1e-9):,.0f} tokens/s")
        return ", ".join(parts)

    def seconds_left(self, name: str) -> float | None:
        """None before the pace is known."""
        stage = self._stages[name]
        through, left = stage.now.done - stage.first.done, stage.now.total - stage.now.done
        return (self._clock() - stage.begun) * left / through if through > 0 else None
