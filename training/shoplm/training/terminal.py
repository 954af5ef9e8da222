"""How the training commands talk to the terminal: errors with exit codes, and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from shoplm.errors import ShopLMError
from shoplm.training.problems import LogError
from shoplm.training.tables import print_problems

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


def fail(console: Console, message: str) -> NoReturn:
    """Say what is wrong and leave."""
    console.print(f"[red]error:[/red] {message}", highlight=False, markup=True)
    raise typer.Exit(EXIT_WRONG)


def dim(console: Console) -> Callable[[str], None]:
    """A function that says what is going on, so that results stand out."""
    return lambda text: console.print(f"[dim]{text}[/dim]")


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that draws one bar per kind of work."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        drawn: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in drawn:
                drawn[what] = progress.add_task(what, total=total)
            progress.update(drawn[what], completed=done, total=total)

        yield report
