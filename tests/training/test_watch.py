"""What a run reports reaches the terminal as lines, TensorBoard as scalars, and the report as a curve."""

from __future__ import annotations

import io
import struct
from pathlib import Path

from rich.console import Console
from shoplm.training.terminal import PlainView, watching
from shoplm.training.watch import LOSS, NDCG, Watch, event_log
from tensorboardX.proto.event_pb2 import Event


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_file_gets_a_line_every_ten_seconds_and_one_at_the_end() -> None:
    said, clock = io.StringIO(), FakeClock()
    view = PlainView(Console(file=said, width=40), clock)
    watch = Watch([view])
    watch.say("[adapting] a base with a rather long name of its own")
    for step in range(1, 31):
        clock.now += 1.0
        watch.record("steps", step, {LOSS: 8.0 - step / 10, NDCG: 0.25})
        watch.advance("steps", step, 30, tokens=100 * step)
    lines = said.getvalue().splitlines()
    assert lines[0] == "[adapting] a base with a rather long name of its own"
    assert lines[1] == "steps 11/30, loss 6.900, NDCG@10 0.2500, 100 tokens/s, 0:00:19 left"
    assert [line.split(",")[0] for line in lines[1:]] == ["steps 11/30", "steps 21/30", "steps 30/30"]
    assert lines[-1].endswith("100 tokens/s")


def test_time_left_counts_from_where_a_stopped_run_went_on() -> None:
    said, clock = io.StringIO(), FakeClock()
    watch = Watch([PlainView(Console(file=said, width=200), clock, seconds=4.0)])
    watch.advance("shards", 80, 100)  # found on the disk
    clock.now = 10.0
    watch.advance("shards", 90, 100)
    assert said.getvalue() == "shards 90/100, 0:00:10 left\n"


def test_a_terminal_gets_bars_with_values() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with watching(console) as watch:
        watch.record("output rows", 3, {LOSS: 7.25})
        watch.advance("output rows", 3, 12)
        watch.say("not [markup]")
    assert "loss 7.250" in screen.getvalue() and "3/12" in screen.getvalue()
    assert "not [markup]" in screen.getvalue()


def test_a_curve_averages_neighbours() -> None:
    watch = Watch()
    for step in range(1, 7):
        watch.record("rows", step, {LOSS: float(step)})
    watch.record("rows", 6, {NDCG: 0.5})
    assert watch.curve("rows", LOSS, most=3) == [(2.0, 1.5), (4.0, 3.5), (6.0, 5.5)]
    assert watch.curve("rows", NDCG) == [(6.0, 0.5)]
    assert watch.curve("rows", "unknown") == []


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Of the one event file there. A record is its length, a checksum, the event, a checksum."""
    (path,) = folder.iterdir()
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        at += 12 + size + 4
    return found


def test_tensorboard_gets_every_value(tmp_path: Path) -> None:
    with event_log(tmp_path / "logs") as views:
        watch = Watch(views)
        watch.record("output rows", 2, {LOSS: 7.5})
        watch.record("output rows", 4, {LOSS: 6.5, NDCG: 0.25})
    assert scalars(tmp_path / "logs") == [
        ("output_rows/loss", 2, 7.5),
        ("output_rows/loss", 4, 6.5),
        ("output_rows/NDCG_10", 4, 0.25),
    ]
