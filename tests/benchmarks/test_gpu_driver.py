"""The driver of the GPU proof: limits, failures, missing packages, the table. A script stands in for the stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import gpu
import pytest
import roofline
import torch
from gpu_stages import common
from gpu_stages.__main__ import STAGES
from gpu_stages.common import L2_BYTES, Stage, copies
from shoplm.kernels.beam_step_types import TrieTables

STAGE = """
import json, sys, time
stage, out = sys.argv[1], sys.argv[3]
row = {"stage": stage, "name": "one", "value": 1.0, "unit": "us", "passed": stage != "decode", "target": None,
       "note": "", "details": {}, "machine": {"card": "none"}}
open(f"{out}/{stage}.jsonl", "w").write(json.dumps(row) + "\\n" + "{half a row")
print("Traceback\\nValueError: broken" if stage == "beams" else "msgspec, grpc")
time.sleep(60 if stage == "prefill" else 0)
sys.exit({"decode": 1, "beams": 1, "server": 3}.get(stage, 0))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "stages" / "gpu_stages"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "__main__.py").write_text(STAGE)
    return {**os.environ, "PYTHONPATH": str(folder.parent)}


def test_a_stage_that_fails_or_hangs_does_not_end_the_others(tmp_path: Path, environment: dict[str, str]) -> None:
    ended = gpu.run_together(["ops", "decode", "beams", "server"], tmp_path, environment, 30, smoke=False)
    ended += gpu.run_together(["prefill"], tmp_path, environment, 5, smoke=False)
    ended += gpu.run_together(["search"], tmp_path, environment, 0, smoke=False)
    outcomes = {end.stage: (end.outcome, end.note) for end in ended}
    assert outcomes["ops"] == ("passed", "")
    assert outcomes["decode"] == ("failed", "a row failed")
    assert outcomes["beams"] == ("failed", "ValueError: broken")
    assert outcomes["server"] == ("skipped", "needs msgspec, grpc: carry the wheels and pass --wheels")
    assert outcomes["prefill"] == ("stopped", "limit 5 s")
    assert outcomes["search"] == ("stopped", "no time was left")
    # A stopped stage keeps the rows it had; the half-written one is dropped.
    rows = gpu.read_rows(tmp_path, ["prefill", "decode"])
    assert [(row["stage"], row["value"]) for row in rows] == [("prefill", 1.0), ("decode", 1.0)]
    lines = gpu.table(rows, ended).splitlines()
    assert "MISSED" in lines[1] and "MISSED" not in lines[0]
    assert lines[-1] == "card none"


@pytest.mark.parametrize(("mode", "together"), [("Exclusive_Process", 1), ("Default", 2)])
def test_on_an_exclusive_card_checks_run_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, together: int
) -> None:
    groups: list[int] = []
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho {mode}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu, "launch_problem", lambda _: "")
    monkeypatch.setattr(gpu, "run_together", lambda stages, *_, **__: groups.append(len(stages)) or [])
    assert gpu.main(["--out", str(tmp_path), "--stages", "correct-ops,correct-backend"]) == 0
    assert groups == [together] * (2 // together)


def test_the_limits_leave_time_within_nine_minutes() -> None:
    assert sum(plan.seconds for plan in gpu.PLANS) <= gpu.TOTAL_SECONDS < 540
    assert len(set(gpu.STAGES)) == len(gpu.STAGES)


def test_a_stage_gets_what_earlier_ones_left_and_takes_nothing_from_later_ones() -> None:
    plans = [gpu.Plan(("ops",), 50), gpu.Plan(("step",), 70), gpu.Plan(("server",), 80)]
    assert gpu.limit_seconds(plans, 200) == 50
    assert gpu.limit_seconds(plans, 260) == 110
    assert gpu.limit_seconds(plans[2:], 260) == 260
    assert gpu.limit_seconds(plans, 150) == 50  # a smaller whole: the last ones lack it
    assert gpu.limit_seconds(plans, 30) == 30


def test_nothing_is_started_where_triton_could_launch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says what to install."""
    monkeypatch.setenv("CC", "no-such-compiler")
    assert gpu.main(["--out", str(tmp_path), "--stages", "ops"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "no-such-compiler" in line and "install gcc" in line
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("CC", "true")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    problem = gpu.launch_problem(gpu.stage_environment(tmp_path, None, smoke=False))
    assert problem == "" or "Python.h" in problem


def test_what_has_a_target_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a stage that is stopped has lost what matters less."""
    monkeypatch.syspath_prepend(str(gpu.REPOSITORY / "tests" / "kernels"))
    from gpu_stages import backend, kernels, ops

    names: list[str] = []

    def keep(_: Stage, name: str, *rest: object, **keywords: object) -> float:
        names.append(name)
        return 1.0

    for module in (kernels, ops):
        monkeypatch.setattr(module, "timed", keep)
        monkeypatch.setattr(module, "paged_attention", lambda *_, **__: None)
    monkeypatch.setattr(Stage, "measure", keep)
    monkeypatch.setattr(Stage, "row", keep)

    def of(function: Callable[[Stage], None], smoke: bool = True) -> list[str]:
        names.clear()
        function(Stage("any", Path("nowhere"), smoke))
        return names.copy()

    beam_steps = ["beam_step flat 1 x 5000 children, top 16", "beam_step deep 1 x 128 children, top 16"]
    assert of(ops.ops)[:2] == beam_steps
    assert of(kernels.decode)[1] == "decode qwen3-1.7b 2 x 40 float32"
    assert of(kernels.prefill)[:2] == ["prefill d128 48", "prefill d64 48"]
    assert of(backend.steps, smoke=False)[0] == "decode step 135M 64 rows, context 512"


def test_every_measured_call_has_inputs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of them that none is in L2 when its turn comes again; a beam search's tables too."""
    for model in roofline.MODELS.values():
        for work in (roofline.norm(model, 64), roofline.swiglu(model, 64), roofline.kv_write(model, 64)):
            assert work.bytes * copies(work.bytes, smoke=False) >= L2_BYTES
    from gpu_stages import kernels, ops

    tables: list[TrieTables] = []
    build = TrieTables.build

    def kept(*arguments: torch.Tensor) -> TrieTables:
        tables.append(build(*arguments))
        return tables[-1]

    monkeypatch.setattr(TrieTables, "build", kept)
    monkeypatch.setattr(kernels, "median_us", lambda calls, **_: float(len(calls)))
    monkeypatch.setattr(Stage, "row", lambda *_, **__: None)
    ops._beam_steps(Stage("ops", Path("nowhere"), smoke=True))
    assert len(tables) == 8
    assert len({trie.child_code.data_ptr() for trie in tables}) == len(tables)


def test_the_stages_are_those_that_exist() -> None:
    assert set(gpu.STAGES) == set(STAGES)


def test_kernel_stages_import_nothing_but_torch_triton_and_numpy() -> None:
    """On a machine that has no more, what they import must not ask for it."""
    script = (
        "import sys\n"
        "for name in ('msgspec', 'pydantic', 'safetensors', 'grpc'): sys.modules[name] = None\n"
        "import gpu_stages.kernels, gpu_stages.ops, gpu_stages.correctness, gpu_stages.correctness_ops\n"
    )
    environment = gpu.stage_environment(Path("/nowhere"), None, smoke=True)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


def test_wheels_are_unpacked_and_come_behind_the_sources(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "carried-1-py3-none-any.whl", "w") as archive:
        archive.writestr("carried/__init__.py", "value = 1")
    with zipfile.ZipFile(tmp_path / "wheels" / "numpy-9-py3-none-any.whl", "w") as archive:
        archive.writestr("numpy/__init__.py", "value = 1")
    environment = gpu.stage_environment(tmp_path, tmp_path / "wheels", smoke=False)
    folders = environment["PYTHONPATH"].split(os.pathsep)
    carried = [at for at, folder in enumerate(folders) if (Path(folder) / "carried" / "__init__.py").exists()]
    assert carried and carried[0] > folders.index(str(gpu.REPOSITORY / "server"))
    assert not any((Path(folder) / "numpy").exists() for folder in folders)
    assert "TRITON_INTERPRET" not in environment


def test_a_time_of_inputs_that_may_stay_in_l2_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_stages import kernels

    notes: list[str] = []
    monkeypatch.setattr(kernels, "median_us", lambda *_, **__: 1.0)
    monkeypatch.setattr(kernels, "floor_share", lambda *_: {})
    monkeypatch.setattr(Stage, "row", lambda *_, note="", **__: notes.append(note))
    for kilobytes in (100, 128):  # of as many copies as there are at most
        kernels.timed(
            Stage("ops", Path("nowhere"), smoke=False), "norm", lambda: lambda: None, roofline.Work(kilobytes << 10)
        )
    assert notes == ["inputs may stay in L2", ""]


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A stage on a card that answers."""
    monkeypatch.setattr(common, "machine", lambda _: {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return Stage("ops", tmp_path / "ops.jsonl", smoke=False)


def rows_of(stage: Stage) -> list[tuple[str, bool | None, str]]:
    rows = [json.loads(line) for line in stage.path.read_text().splitlines()]
    return [(row["name"], row["passed"], row["note"]) for row in rows]


def test_inputs_that_have_no_room_end_their_row_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_stages import kernels

    def no_room(*_: object) -> Callable[[], object]:
        raise torch.OutOfMemoryError("no room")

    kernels.timed(stage, "norm", no_room, roofline.Work(1 << 30))
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda _: 1.0)
    for maker in ("queries", "pool"):
        monkeypatch.setattr(kernels, maker, no_room)
    monkeypatch.setattr(Stage, "device", torch.device("cpu"))
    monkeypatch.setattr(Stage, "has_fp8", True)
    kernels.decode(stage)
    kernels.prefill(stage)
    rows = rows_of(stage)
    assert len(rows) == 1 + 6 + 4 * 4
    assert {(passed, note) for _, passed, note in rows} == {(False, "OutOfMemoryError: no room")}


def test_a_card_without_e4m3_fails_no_row(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sm_86 card: what needs such numbers says so, and all else is checked and measured."""
    monkeypatch.syspath_prepend(str(gpu.REPOSITORY / "tests" / "kernels"))
    from gpu_stages import backend, correctness, correctness_ops, kernels, ops

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(Stage, "device", torch.device("cpu"))
    for module, name in ((correctness, "_rows"), (correctness, "_beams"), (backend, "_hidden")):
        monkeypatch.setattr(module, name, lambda *_: None)
    for name in ("_norm", "_swiglu", "_weight_only", "_sample", "_beam_step", "_kv_write"):
        monkeypatch.setattr(correctness_ops, name, lambda *_: None)
    monkeypatch.setattr(kernels, "median_us", lambda *_, **__: 1.0)
    monkeypatch.setattr(kernels, "floor_share", lambda *_: {})
    monkeypatch.setattr(kernels, "copies", lambda *_: 0)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda _: 1e-9)
    monkeypatch.setattr(torch, "set_default_device", lambda _: None)
    correctness.attention(stage)
    correctness_ops.ops(stage)
    backend.formats(stage)
    kernels.decode(stage)
    ops._quantise_rows(stage, 64)
    rows = rows_of(stage)
    lacking = [name for name, passed, note in rows if passed is None and note == "this card has no e4m3"]
    # Two shapes by two checks; three dtypes to an FP8 pool and quantised; two formats; two models; one measurement.
    assert len(lacking) == 4 + 6 + 2 + 2 + 1
    assert all("fp8" in name or "float8" in name or "quantise_rows" in name for name in lacking)
    assert not [name for name, _, _ in rows if name not in lacking and ("float8" in name or "fp8" in name)]
    assert not stage.failed


def test_a_stage_ends_with_the_row_that_broke_the_card(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every later call would raise the same error; one that leaves the card alive ends nothing."""

    def broken() -> float:
        raise RuntimeError("an illegal memory access was encountered\nmore")

    stage.check("alive", broken)
    stage.measure("alive too", "us", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    for attempt in (lambda: stage.check("dead", broken), lambda: stage.measure("dead", "us", broken)):
        with pytest.raises(SystemExit) as ended:
            attempt()
        assert ended.value.code == 1
    note = "RuntimeError: an illegal memory access was encountered"
    assert rows_of(stage)[:2] == [("alive", False, note), ("alive too", False, note)]
    assert rows_of(stage)[2:] == [("dead", False, f"{note}; rows behind this were not reached")] * 2


def test_the_twin_compiles_its_own_kernel_alone(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page size is its length: other kernels would be compiled for each prompt, and launched for nothing."""
    from gpu_stages import kernels

    calls: list[str] = []
    monkeypatch.setattr(kernels, "paged_attention", lambda *_, **__: calls.append("all"))
    monkeypatch.setattr(kernels, "prefill_attention", lambda *_, **__: calls.append("prefill"))
    monkeypatch.setattr(kernels, "median_us", lambda found, **_: found[0]() or 1.0)
    kernels.prefill(Stage("prefill", stage.path, smoke=True))
    assert calls == ["all", "all", "prefill", "prefill"] and not stage.failed
