"""How the training commands talk to the terminal: problems and errors with exit codes, and how far a run is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from shoplm.bundle_cli import table
from shoplm.errors import ShopLMError
from shoplm.training.problems import LogError, Problem
from shoplm.training.watch import Advance, Pace, Point, Watch, event_log

EXIT_WRONG = 2


@contextmanager
def errors(console: Console) -> Iterator[None]:
    """What is raised on purpose becomes a line of red text and exit code 2."""
    try:
        yield
    except LogError as error:
        print_problems(console, error.problems)
        fail(console, "the log cannot be used: see the rows above that say what to do")
    except ShopLMError as error:
        fail(console, str(error))
    except (OSError, SafetensorError) as error:
        fail(console, f"{error}: is the disk full, or not to be written? A run that is started again goes on")


def fail(console: Console, message: str) -> NoReturn:
    """Say what is wrong and leave."""
    console.print(f"[red]error:[/red] {escape(message)}", highlight=False, markup=True)
    raise typer.Exit(EXIT_WRONG)


def print_problems(console: Console, problems: Sequence[Problem]) -> None:
    """What is wrong with the files, one row per finding."""
    if problems:
        rows = [(p.table, p.column, f"{p.rows:,}", p.found, p.done) for p in problems]
        console.print(table("the log's problems", ("file", "column", "rows", "found", "done"), rows))


class LiveView:
    """Bars that show loss, validation NDCG, tokens per second and time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._pace = progress, Pace(time.monotonic)
        self._tasks: dict[str, TaskID] = {}

    def say(self, text: str) -> None:
        self._progress.console.print(text, style="dim", markup=False, highlight=False)

    def advance(self, advance: Advance) -> None:
        self._pace.advance(advance)
        self._draw(advance.stage, completed=advance.done, total=advance.total)

    def record(self, point: Point) -> None:
        self._pace.record(point)
        self._draw(point.stage)

    def _draw(self, stage: str, **amounts: float) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=None, text="")
        self._progress.update(self._tasks[stage], text=self._pace.text(stage), **amounts)  # type: ignore[arg-type]


class PlainView:
    """The same as lines, for log files: one every `seconds` and one at the end of a stage."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic, seconds: float = 10.0) -> None:
        self._console, self._pace, self._seconds = console, Pace(clock), seconds

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, advance: Advance) -> None:
        self._pace.advance(advance)
        if self._pace.line_due(advance.stage, self._seconds):
            left = self._pace.seconds_left(advance.stage)
            end = f", {_clock_text(left)} left" if left else ""
            values = self._pace.text(advance.stage)
            text = f"{advance.stage} {advance.done:,}/{advance.total:,}{', ' if values else ''}{values}{end}"
            self.say(text)

    def record(self, point: Point) -> None:
        self._pace.record(point)


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def watching(console: Console, logs: Path | None = None) -> Iterator[Watch]:
    """A watch that draws on the console, and writes TensorBoard's files to `logs`."""
    with event_log(logs) as views:
        if not console.is_terminal:
            yield Watch((PlainView(console), *views))
            return
        text = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        columns = (*text, TextColumn("[cyan]{task.fields[text]}"), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            yield Watch((LiveView(progress), *views))
