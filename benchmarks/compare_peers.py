"""ShopLM through its own gRPC server beside OpenVINO GenAI, llama.cpp, vLLM and transformers, on CPUs, in one run.

    benchmarks/peers/setup.sh FOLDER                                   # once: environments and models of the peers
    python benchmarks/compare_peers.py --peers FOLDER --out FILE.json  # prints a table, writes JSON

SmolLM2-135M, random token ids, greedy, the end of sequence ignored. Each contestant is loaded once, in a process and an
environment of its own, and they take turns in each row of each repeat: one runs, all others are stopped by a signal.
Ratios are taken within a repeat, then the median over repeats. A contestant that fails or hangs is reported as failed,
and the others go on; what would not end within `--minutes` is left out for all. `benchmarks/peers/README.md` says
with which settings the peers run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers.contestants import CONTESTANTS, Entry, Setting, cpu_flags, fitting
from peers.process import Worker, WorkerError
from peers.report import Cell, as_json, table
from peers.rows import ROWS, Row
from shoplm.bench.report import machine
from shoplm.model.base import resolve_base

START_SECONDS, ROW_SECONDS = 400.0, 180.0
Cells = dict[str, dict[str, Cell]]


def environment(threads: int) -> dict[str, str]:
    """Of the workers: this folder on the path, as many OpenMP threads as all are given."""
    path = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": str(threads)}


@contextmanager
def started(
    entries: Sequence[Entry], setting: Setting, cells: Cells, described: dict[str, Any]
) -> Iterator[dict[str, Worker]]:
    """Loads all contestants, one after another. One that does not start is failed in all its rows."""
    workers: dict[str, Worker] = {}
    try:
        for entry in entries:
            say(f"starting {entry.name}")
            try:
                worker = Worker(
                    entry.command(setting), setting.logs / f"{entry.name}.log", environment(setting.threads)
                )
                workers[entry.name] = worker
                described[entry.name] = worker.answer(START_SECONDS)["ready"]
                worker.pause()
            except (OSError, WorkerError) as error:
                drop(entry.name, f"start: {error}", workers, cells)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def drop(name: str, reason: str, workers: dict[str, Worker], cells: Cells) -> None:
    """Ends a contestant; rows that it has not measured yet are failed."""
    say(f"{name} failed: {reason}")
    if name in workers:
        workers.pop(name).close(seconds=1.0)
    for cell in cells[name].values():
        cell.failed = cell.failed or reason


def schedule(rows: Sequence[Row], repeats: int) -> list[tuple[int, Row]]:
    """Each row once, then its further repeats, cheap rows first: what a limit of time cuts off is the dearest rows'
    repeats. A warm row stays behind its cold one."""
    groups: list[list[Row]] = []
    for row in rows:
        if row.warm and groups:
            groups[-1].append(row)
        else:
            groups.append([row])
    further = [(repeat, row) for group in groups for repeat in range(1, repeats) for row in group]
    return [(0, row) for row in rows] + further


def measure(turns: Sequence[tuple[int, Row]], workers: dict[str, Worker], cells: Cells, deadline: float) -> None:
    """Fills `cells`, one contestant after another in each turn, in an order that rotates. A turn is left out for all
    where it would not end in time for all."""
    for repeat, row in turns:
        names = [name for name in workers if row.name in cells[name] and not cells[name][row.name].unsupported]
        expected = sum(max(cells[name][row.name].seconds.values(), default=0.0) for name in names)
        if time.monotonic() + expected > deadline:
            say(f"no time for repeat {repeat + 1} of {row.name}: {expected:.0f} s")
            continue
        split = repeat % max(1, len(names))
        for name in names[split:] + names[:split]:
            limit = min(ROW_SECONDS, max(1.0, deadline - time.monotonic()))
            try:
                answer = workers[name].ask({"row": row.name, "seed": repeat + 1}, limit)
            except WorkerError as error:
                drop(name, f"{row.name}: {error}", workers, cells)
                continue
            cell = cells[name][row.name]
            if "unsupported" in answer:
                cell.unsupported = True
                continue
            cell.seconds[repeat], cell.cpu_seconds[repeat] = answer["seconds"], answer["cpu_seconds"]
            cell.digests[repeat], cell.firsts[repeat] = answer["digest"], answer["firsts"]
            say(f"{row.name} {repeat + 1} {name}: {row.value(answer['seconds']):.2f} {row.unit}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    flags = cpu_flags()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="folder that setup.sh filled")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=fitting(flags), metavar="NAME")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="cores that each contestant gets")
    parser.add_argument("--minutes", type=float, default=24.0, help="limit of the whole run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; logs go beside it")
    arguments = parser.parse_args()
    if "shared-warm" in arguments.rows and "shared-cold" not in arguments.rows:
        parser.error("shared-warm needs shared-cold before it")
    deadline = time.monotonic() + 60 * arguments.minutes
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    logs = arguments.out.with_suffix(".logs")
    logs.mkdir(parents=True, exist_ok=True)
    setting = Setting(arguments.peers.resolve(), resolve_base().folder, logs.resolve(), arguments.threads)
    entries = [CONTESTANTS[name] for name in arguments.contestants]
    rows = [ROWS[name] for name in ROWS if name in arguments.rows]
    cells = {entry.name: {row.name: Cell() for row in rows if entry.runs(row)} for entry in entries}
    described: dict[str, Any] = {}
    where = machine()
    with started(entries, setting, cells, described) as workers:
        measure(schedule(rows, arguments.repeats), workers, cells, deadline)
    report = {
        "machine": {**where, "cpu_flags": flags},
        "threads": arguments.threads,
        "described": described,
        **as_json(rows, cells, entries),
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(table(rows, cells, entries))


if __name__ == "__main__":
    main()
