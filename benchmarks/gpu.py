"""Proof on a GPU, in one command: every op against its specification, the backend, then the times.

    python benchmarks/gpu.py --out DIR                       everything, in less than nine minutes
    python benchmarks/gpu.py --out DIR --stages prefill,decode
    python benchmarks/gpu.py --out DIR --wheels FOLDER       wheels of what the machine lacks, e.g. msgspec
    python benchmarks/gpu.py --out DIR --smoke               no GPU: the same code on tiny shapes, interpreted

Each stage is a process of its own with a time limit, which grows by what those before it left over; one that fails or
is stopped leaves the rows it had, and the next goes on. The kernels' stages need torch, triton and numpy alone, and
what Triton needs to launch: a C compiler, Python.h and a cache folder, which are looked for first. `DIR/rows.jsonl` has
one JSON object per row, with card, driver and versions; the table comes last. Ends with 0 only where every row of every
stage passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 530.0  # the sum of the plans' seconds: no stage takes time from a later one
SMOKE_FACTOR = 10  # an interpreter on a shared CPU is slow
THE_MACHINES = ("numpy", "torch", "triton")  # what is measured is the machine's own, whatever wheels bring along
MISSING = 3  # exit code of a stage that lacks a module


@dataclass(frozen=True, slots=True)
class Plan:
    """A group of stages: run side by side where they only check, one by one where they measure."""

    stages: tuple[str, ...]
    seconds: float  # that it has in any case; the limit is more where earlier ones left time


CHECKS = (
    *(f"correct-attention-{part}" for part in range(1, 7)), "correct-ops", "correct-backend", "correct-formats",
)  # fmt: skip
# What the other results rest on, then what has targets, the cheapest first.
PLANS = (
    Plan(CHECKS, 130),
    Plan(("decode",), 40),
    Plan(("prefill",), 45),
    Plan(("beams",), 35),
    Plan(("ops",), 50),
    Plan(("step",), 70),
    Plan(("search",), 80),
    Plan(("server",), 80),
)
STAGES = tuple(stage for plan in PLANS for stage in plan.stages)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a stage ended."""

    stage: str
    outcome: str  # passed | failed | stopped | skipped
    seconds: float
    note: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, separated by commas; default: all")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use; nothing is installed")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, under Triton's interpreter")
    parser.add_argument("--total-seconds", type=float, default=TOTAL_SECONDS, help="later stages get what is left")
    options = parser.parse_args(arguments)
    wanted = options.stages.split(",")
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        parser.error(f"unknown stages {', '.join(unknown)}; there are {', '.join(STAGES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for stage in wanted:
        (options.out / f"{stage}.jsonl").unlink(missing_ok=True)
    environment = stage_environment(options.out, options.wheels, options.smoke)
    if not options.smoke and (problem := launch_problem(environment)):
        print(problem)
        return 1
    alone = not options.smoke and takes_one_process()
    patience = SMOKE_FACTOR if options.smoke else 1
    deadline = time.monotonic() + options.total_seconds * patience
    ended: list[Ended] = []
    plans = [plan for plan in PLANS if set(plan.stages) & set(wanted)]
    for at, plan in enumerate(plans):
        stages = [stage for stage in plan.stages if stage in wanted]
        limit = limit_seconds(plans[at:], (deadline - time.monotonic()) / patience) * patience
        last = time.monotonic() + limit
        for group in [[stage] for stage in stages] if alone else [stages]:
            left = last - time.monotonic()
            ended += run_together(group, options.out, environment, left, smoke=options.smoke)
    rows = read_rows(options.out, wanted)
    with (options.out / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows, ended))
    good = all(end.outcome in ("passed", "skipped") for end in ended) and all(
        row["passed"] is not False for row in rows
    )
    return 0 if good else 1


def limit_seconds(plans: Sequence[Plan], left: float) -> float:
    """For the first of the plans still to run: all that is `left` but the later ones' own seconds, and no less than its
    own while there is as much."""
    first, *later = plans
    return min(left, max(first.seconds, left - sum(plan.seconds for plan in later)))


def takes_one_process() -> bool:
    """Whether the card is set to the compute mode in which a second process cannot use it."""
    command = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return "Exclusive" in found.stdout


def launch_problem(environment: dict[str, str]) -> str:
    """Why Triton could launch nothing on this machine, in one line; empty where it can."""
    command = [sys.executable, "-m", "shoplm.launchers"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    return ended.stderr.strip() if ended.returncode else ""


def stage_environment(out: Path, wheels: Path | None, smoke: bool) -> dict[str, str]:
    """The stages' environment: the source folders before whatever is installed; unpacked wheels; no network."""
    folders = [REPOSITORY / part for part in ("benchmarks", "kernels", "server", "tests/kernels")]
    folders += [REPOSITORY / part for part in ("clients/python", "protos/gen")]
    if wheels is not None:
        folders.append(unpack(wheels, out / "site"))
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)  # some images set it: fp32 references would be off
    if smoke:
        environment |= {"TRITON_INTERPRET": "1"}
    return environment


def unpack(wheels: Path, target: Path) -> Path:
    """The wheels' contents, importable: a wheel is an archive, and importing compiled modules needs files.

    They come before what is installed, so those of `THE_MACHINES` are left out.
    """
    for wheel in sorted(wheels.glob("*.whl")):
        if wheel.name.split("-")[0] in THE_MACHINES:
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return target


def run_together(
    stages: Sequence[str], out: Path, environment: dict[str, str], limit_seconds: float, *, smoke: bool
) -> list[Ended]:
    """Run stages side by side; at the limit, what still runs is stopped with all its children."""
    if limit_seconds < 5:
        return [Ended(stage, "stopped", 0.0, "no time was left") for stage in stages]
    start = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    for stage in stages:
        command = [sys.executable, "-m", "gpu_stages", stage, "--out", str(out), *(["--smoke"] if smoke else [])]
        with (out / f"{stage}.log").open("wb") as log:
            running[stage] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True,
            )  # fmt: skip
    ended: list[Ended] = []
    while running:
        late = time.monotonic() - start > limit_seconds
        for stage, process in list(running.items()):
            if process.poll() is None and late:
                os.killpg(process.pid, 9)
                process.wait()
                ended.append(Ended(stage, "stopped", time.monotonic() - start, f"limit {limit_seconds:.0f} s"))
            elif process.poll() is None:
                continue
            else:
                ended.append(how_it_ended(stage, process.returncode, time.monotonic() - start, out))
            del running[stage]
            print(f"{ended[-1].seconds:5.0f} s  {stage}: {ended[-1].outcome} {ended[-1].note}", flush=True)
        time.sleep(0.1)
    return ended


def how_it_ended(stage: str, code: int, seconds: float, out: Path) -> Ended:
    """From the exit code and the log's last line."""
    lines = (out / f"{stage}.log").read_text("utf-8", "replace").strip().splitlines()
    last = lines[-1] if lines else ""
    if code == 0:
        return Ended(stage, "passed", seconds)
    if code == MISSING:
        return Ended(stage, "skipped", seconds, f"needs {last}: carry the wheels and pass --wheels")
    note = "a row failed" if code == 1 and (out / f"{stage}.jsonl").exists() and "Error" not in last else last[:200]
    return Ended(stage, "failed", seconds, note or f"exit code {code}")


def read_rows(out: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    """All rows, stage by stage; a line that a stopped stage left half is dropped."""
    rows: list[dict[str, Any]] = []
    for stage in stages:
        path = out / f"{stage}.jsonl"
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def table(rows: Sequence[dict[str, Any]], ended: Sequence[Ended]) -> str:
    """Checks in one line a stage unless they failed; measurements one by one."""
    lines = []
    for row in rows:
        checks = row["stage"].startswith("correct")
        if checks and row["passed"]:
            continue
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        share = row["details"].get("floor_share")
        judged = {True: "ok", False: "MISSED", None: ""}[row["passed"]]
        target = "" if row["target"] is None else f"target {row['target']:g}"
        floor = "" if share is None else f"{100 * share:.0f} % of floor"
        lines.append(
            f"{row['name'][:58]:58s} {value:>10s} {row['unit']:8s} {floor:15s} {target:12s} {judged} {row['note']}"
        )
    for end in ended:
        count = [row["passed"] for row in rows if row["stage"] == end.stage]
        checked = f"{sum(passed is True for passed in count)} ok, {sum(passed is False for passed in count)} not"
        lines.append(f"{end.stage:24s} {end.outcome:8s} {end.seconds:5.0f} s  {checked}  {end.note}")
    machine = rows[0]["machine"] if rows else {}
    lines.append(", ".join(f"{key} {value}" for key, value in machine.items()))
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
