"""The comparison with other engines: rows, ratios, the table, and the driver with scripted workers."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import compare_peers
import psutil
import pytest
from peers.contestants import CONTESTANTS, FULL, INT8, Entry, Setting, fitting
from peers.process import Worker
from peers.report import Cell, agreement, as_json, median_ratio, ratios, table
from peers.rows import ROWS, TRIE_ITEMS, Row, check_counts, trie_items
from peers.worker import measure

RATE = Row("rate", requests=2, prompt_tokens=8, output_tokens=3, counted=6)
TIME = Row("time", requests=3, prompt_tokens=8, output_tokens=1, shared=5)

# Answers as a worker does; what goes wrong is its argument.
WORKER = """
import json, os, sys, time
fault = sys.argv[1]
if fault == "start":
    sys.exit("no such model")
print(json.dumps({"ready": {"computes": "f32"}}), flush=True)
for line in sys.stdin:
    row = json.loads(line)["row"]
    if fault == "spin":
        print(json.dumps({"seconds": 1.0, "digest": "", "firsts": []}), flush=True)
        while True:
            pass
    if fault == "hang" and row == "8x128-64":
        time.sleep(60)
    if fault == "end" and row == "8x128-64":
        sys.exit("out of memory")
    if row == "beams":
        print(json.dumps({"unsupported": "no beams"}), flush=True)
    elif fault == "counts" and row == "8x128-64":
        print(json.dumps({"failed": "ValueError: 7 tokens"}), flush=True)
    else:
        seconds = (float(fault) if fault[0].isdigit() else 1.0) * (100 if row.startswith("32x") else 1)
        print(json.dumps({"seconds": seconds, "digest": "ab", "firsts": [1]}), flush=True)
"""


def cell(*seconds: float) -> Cell:
    return Cell(seconds=dict(enumerate(seconds)))


def scripted(name: str, precision: str, fault: str) -> Entry:
    return Entry(name, precision, lambda _: [sys.executable, "-c", WORKER, fault])


def test_prompts_are_equal_for_all_and_new_in_each_repeat() -> None:
    first, again, other = TIME.prompts(1), TIME.prompts(1), TIME.prompts(2)
    assert first == again
    assert [len(prompt) for prompt in first] == [8, 8, 8]
    assert len({tuple(prompt[:5]) for prompt in first}) == 1
    assert len({tuple(prompt[5:]) for prompt in first}) == 3
    assert not {tuple(prompt[:5]) for prompt in first} & {tuple(prompt[:5]) for prompt in other}
    assert ROWS["shared-warm"].prompts(3) == ROWS["shared-cold"].prompts(3)
    assert ROWS["32x512-1"].prompts(3) != ROWS["32x512-32"].prompts(3)


def test_trie_items_are_different_and_sorted() -> None:
    items = trie_items()
    assert len(set(items)) == TRIE_ITEMS and items == sorted(items)
    assert len({item[0] for item in items}) == 256


def test_rates_and_times_both_say_ahead_above_one() -> None:
    assert RATE.value(2.0) == 3.0 and RATE.unit == "tokens/s"
    assert TIME.value(2.0) == 2.0 and TIME.unit == "s"
    assert RATE.ratio(ours=6.0, peers=3.0) == 2.0
    assert TIME.ratio(ours=1.0, peers=2.0) == 2.0


def test_counts_must_be_exact() -> None:
    check_counts(RATE, [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match=r"lengths \[3, 2\]"):
        check_counts(RATE, [[1, 2, 3], [4, 5]])
    with pytest.raises(ValueError, match=r"lengths \[3\]"):
        check_counts(RATE, [[1, 2, 3]])


def test_a_measured_row_names_its_tokens() -> None:
    class Echo:
        described: dict[str, str] = {}  # noqa: RUF012

        def generate(self, prompts: object, output_tokens: int) -> list[list[int]]:
            return [[7] * output_tokens, [8] * output_tokens]

        def search(self, prompt: object, beams: int, tokens: int) -> None:
            raise AssertionError("no search was asked for")

    found = measure(Echo(), RATE, 1)
    assert found["firsts"] == [7, 8] and found["seconds"] > 0
    with pytest.raises(ValueError, match="time: expected 3"):
        measure(Echo(), TIME, 1)


def test_ratios_are_taken_within_a_repeat() -> None:
    # The machine was slow in the second repeat, and the peer missed the fourth.
    assert median_ratio(TIME, cell(1.0, 10.0, 1.0, 9.0), cell(2.0, 20.0, 3.0)) == 2.0
    assert median_ratio(TIME, cell(1.0), Cell(seconds={1: 1.0})) is None


def test_only_equal_precision_is_compared() -> None:
    entries = [scripted("shoplm-x", FULL, ""), scripted("a-full", FULL, ""), scripted("a-int8", INT8, "")]
    cells = {"shoplm-x": {"time": cell(1.0)}, "a-full": {"time": cell(3.0)}, "a-int8": {"time": cell(0.1)}}
    assert ratios([TIME], cells, entries) == [{"row": "time", "ours": "shoplm-x", "peer": "a-full", "ratio": 3.0}]


def test_agreement_shows_who_ran_another_model() -> None:
    cells = {
        name: {"time": Cell(firsts={0: tokens})} for name, tokens in {"a": [1, 2], "b": [1, 2], "c": [1, 9]}.items()
    }
    assert agreement(TIME, cells) == {"a": 1.0, "b": 1.0, "c": 0.5}


def test_the_table_has_values_ratios_and_reasons() -> None:
    entries = [scripted("shoplm-x", FULL, ""), scripted("fast", FULL, ""), scripted("slow", FULL, "")]
    cells = {
        "shoplm-x": {"rate": cell(2.0), "time": cell(2.0)},
        "fast": {"rate": cell(1.0), "time": Cell(failed="broken")},
        "slow": {"rate": cell(4.0), "time": Cell(unsupported=True)},
    }
    lines = table([RATE, TIME], cells, entries).splitlines()
    assert lines[2] == "| shoplm-x | bf16/f32 | 3.00 | 2.00 |"
    assert lines[3] == "| fast | bf16/f32 | 6.00 | failed |"
    assert lines[4] == "| slow | bf16/f32 | 1.50 | - |"
    assert lines[5] == "| **shoplm-x / best peer** | bf16/f32 | 0.50 (fast) |  |"
    assert lines[-1] == "fast failed in 1 rows: broken"
    assert as_json([RATE, TIME], cells, entries)["contestants"]["fast"]["time"]["failed"] == "broken"


def test_one_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_peers, "ROW_SECONDS", 3.0)
    faults = {"shoplm-a": "1.0", "fast": "0.5", "unstarted": "start", "hung": "hang", "ended": "end", "short": "counts"}
    entries = [scripted(name, FULL, fault) for name, fault in faults.items()]
    rows = [ROWS["1x128-64"], ROWS["8x128-64"], ROWS["beams"]]
    cells = {name: {row.name: Cell() for row in rows} for name in faults}
    setting = Setting(tmp_path, tmp_path, tmp_path, threads=1)
    described: dict[str, object] = {}
    with compare_peers.started(entries, setting, cells, described) as workers:
        compare_peers.measure(compare_peers.schedule(rows, 2), workers, cells, time.monotonic() + 60)
    assert "unstarted" not in described and described["fast"] == {"computes": "f32"}
    assert {name: of["8x128-64"].failed for name, of in cells.items()} == {
        "shoplm-a": None,
        "fast": None,
        "unstarted": "start: ended with code 1: no such model",
        "hung": "8x128-64: no answer within 3 s",
        "ended": "8x128-64: ended with code 1: out of memory",
        "short": "8x128-64: ValueError: 7 tokens",
    }
    assert cells["hung"]["1x128-64"].seconds == {0: 1.0} and cells["fast"]["beams"].unsupported
    assert cells["fast"]["8x128-64"].seconds == {0: 0.5, 1: 0.5}
    assert {one["ratio"] for one in ratios(rows, cells, entries) if one["peer"] == "fast"} == {0.5}


def test_a_turn_that_would_end_after_the_limit_is_left_out_for_all(tmp_path: Path) -> None:
    entries = [scripted("a", FULL, "1.0"), scripted("b", FULL, "0.5")]
    rows = [ROWS["1x128-64"], ROWS["32x128-64"]]  # the script says of the second that it took 100 and 50 seconds
    cells = {entry.name: {row.name: Cell() for row in rows} for entry in entries}
    with compare_peers.started(entries, Setting(tmp_path, tmp_path, tmp_path, 1), cells, {}) as workers:
        compare_peers.measure(compare_peers.schedule(rows, 3), workers, cells, time.monotonic() + 120)
    for of in cells.values():
        assert list(of["1x128-64"].seconds) == [0, 1, 2]
        assert list(of["32x128-64"].seconds) == [0]


def test_every_row_comes_once_before_any_comes_again() -> None:
    rows = [ROWS[name] for name in ("1x128-64", "shared-cold", "shared-warm", "32x512-1")]
    turns = [(repeat, row.name) for repeat, row in compare_peers.schedule(rows, 2)]
    assert turns == [
        *((0, row.name) for row in rows),
        *((1, name) for name in ("1x128-64", "shared-cold", "shared-warm", "32x512-1")),
    ]
    again = [name for repeat, name in ((r, row.name) for r, row in compare_peers.schedule(rows, 3)) if repeat > 0]
    assert again[2:6] == ["shared-cold", "shared-warm", "shared-cold", "shared-warm"]


def test_peers_take_the_type_that_the_processor_multiplies() -> None:
    assert {"vllm-f32", "llamacpp-f16"} < set(fitting(["avx2"]))
    assert {"vllm-bf16", "llamacpp-bf16"} < set(fitting(["avx2", "avx512_bf16"]))
    assert set(fitting(["avx2"])) < CONTESTANTS.keys()
    assert [name for name in CONTESTANTS if CONTESTANTS[name].runs(ROWS["8x128-64"]) and "int4" in name] == []
    assert not CONTESTANTS["transformers-f32"].runs(ROWS["1x128-64"])


def test_a_waiting_contestant_cannot_spin(tmp_path: Path) -> None:
    worker = Worker([sys.executable, "-c", WORKER, "spin"], tmp_path / "log", dict(os.environ))
    try:
        worker.answer(30)
        worker.ask({"row": "1x128-64", "seed": 1}, 30)
        change = os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WNOWAIT)
        assert change is not None and change.si_code == os.CLD_STOPPED
    finally:
        worker.close(seconds=0.1)
    assert not psutil.pid_exists(worker.pid)


def test_every_contestant_has_a_worker(tmp_path: Path) -> None:
    setting = Setting(tmp_path, tmp_path / "base", tmp_path, threads=2)
    folder = Path(compare_peers.__file__).parent
    for entry in CONTESTANTS.values():
        command = entry.command(setting)
        assert command[1] == "-m" and (folder / f"{command[2].replace('.', '/')}.py").is_file()
        assert "2" in command[3:]
