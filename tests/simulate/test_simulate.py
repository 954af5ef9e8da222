"""Traces, cost curves and fleets: what `shoplm simulate` says is what happened."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from xml.etree import ElementTree

import pytest
from shoplm.request import Service
from shoplm.scheduler.config import SchedulerConfig, SchedulingPolicy
from shoplm.scheduler.cost import StepLoad
from shoplm.simulate.cli import simulate, with_deadline
from shoplm.simulate.curve import CostCurve, CurveError, read_curve
from shoplm.simulate.fleet import Fleet, find_capacity, quantiles
from shoplm.simulate.plot import Chart, page
from shoplm.simulate.trace import Arrival, Shape, TraceError, draw, faster, read_trace, write_trace
from typer import Typer
from typer.testing import CliRunner

CURVE = CostCurve(step_seconds=2e-3, token_seconds=5e-5, kv_token_seconds=1e-8, row_seconds=5e-5)
TARGETS = {Service.RECOMMENDATION: 0.1, Service.PREDICTION: 0.1, Service.CHAT: 0.2}


def fleet(order: str = "slack", **changes: object) -> Fleet:
    policy = SchedulingPolicy(order, dict(TARGETS), 0.05)  # type: ignore[arg-type]
    return dataclasses.replace(Fleet(SchedulerConfig(policy=policy), CURVE), **changes)  # type: ignore[arg-type]


def arrivals(rate: float, seconds: float = 10.0, seed: int = 1) -> list[Arrival]:
    policy = fleet().config.policy
    return [with_deadline(each, policy) for each in draw(Shape(rate=rate, seconds=seconds, seed=seed))]


# ---- traces ----------------------------------------------------------------------------------------------------------


def test_a_drawn_trace_has_the_rate_and_the_mix_it_was_asked_for_and_repeats() -> None:
    shape = Shape(rate=50.0, seconds=100.0, seed=3)
    drawn = list(draw(shape))
    assert drawn == list(draw(shape))
    assert len(drawn) == pytest.approx(5_000, rel=0.05)
    chats = sum(each.service is Service.CHAT for each in drawn)
    assert chats / len(drawn) == pytest.approx(0.3, abs=0.03)
    assert drawn != list(draw(dataclasses.replace(shape, seed=4)))


@pytest.mark.parametrize(("burstiness", "expected"), [(1.0, 1.0), (3.0, 9.0)])
def test_gaps_vary_as_much_as_they_are_told_to(burstiness: float, expected: float) -> None:
    moments = [each.seconds for each in draw(Shape(rate=100.0, seconds=100.0, burstiness=burstiness))]
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance / mean**2 == pytest.approx(expected, rel=0.2)


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    written = arrivals(20.0)
    write_trace(written, path)
    assert read_trace(path) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no arrivals"),
        ('{"seconds": 1, "service": "chess"}', "line 1"),
        ('{"seconds": 1, "service": "prediction", "colour": 1}', "colour"),
        ('{"seconds": 1, "service": "chat"}', "at least 1"),
        ('{"seconds": 2, "service": "prediction"}\n{"seconds": 1, "service": "prediction"}', "line 2"),
    ],
)
def test_a_trace_that_cannot_be_read_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_twice_as_fast_is_the_same_requests_in_half_the_time() -> None:
    slow = arrivals(20.0)
    fast = faster(slow, 2.0)
    assert [each.customer for each in fast] == [each.customer for each in slow]
    assert fast[-1].seconds == slow[-1].seconds / 2


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_a_curve_is_read_from_a_text_and_from_the_file_that_was_measured() -> None:
    assert read_curve("step=0.002, token=5e-5,kv=1e-8,row=5e-5") == CURVE
    measured = read_curve(str(Path(__file__).parents[2] / "benchmarks" / "results" / "cost-cpu.json"))
    assert 0.01 < measured.seconds(StepLoad(128, 20_000, 8)) < 1.0


@pytest.mark.parametrize("text", ["step=a", "stop=1", "step=-1,token=1", "step=0,token=0", "/does/not/exist.json"])
def test_a_curve_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(CurveError):
        read_curve(text)


# ---- fleets ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_outcomes() -> None:
    first, second = (fleet(seed=5).run(arrivals(60.0)) for _ in range(2))
    assert [(each.end_seconds, each.reason) for each in first.outcomes] == [
        (each.end_seconds, each.reason) for each in second.outcomes
    ]


def test_every_request_has_one_end_and_the_counts_add_up() -> None:
    result = fleet().run(arrivals(200.0))
    for service in result.services().values():
        served = service.in_time + service.late
        assert service.offered == served + service.refused + service.expired
    assert all(each.end_seconds is not None for each in result.outcomes)
    assert sum(each.refused for each in result.services().values()) > 0


def test_a_light_load_is_served_in_time_by_the_latency_of_its_steps() -> None:
    result = fleet(noise=0.0).run(arrivals(2.0, 60.0))
    assert result.holds()
    prediction = next(each for each in result.outcomes if each.arrival.service is Service.PREDICTION)
    length = prediction.arrival.history_tokens + prediction.arrival.suffix_tokens
    alone = CURVE.seconds(StepLoad(length, length * (length + 1) // 2, 1))
    assert prediction.end_seconds == pytest.approx(alone)


def test_more_replicas_share_the_load_and_a_sample_of_them_stands_for_all() -> None:
    trace = arrivals(600.0)
    whole = fleet(replicas=4).run(trace)
    assert len(whole.outcomes) == len(trace)
    one = fleet().run(trace)
    assert whole.goodput() > 1.5 * one.goodput()
    sample = fleet(replicas=4, sample=2).run(trace)
    assert sample.goodput() == pytest.approx(whole.goodput(), rel=0.15)


def test_an_overload_costs_all_services_alike_and_none_has_less_in_time_than_before() -> None:
    calm, over = (fleet().run(arrivals(rate, 20.0)).services(4.0) for rate in (220.0, 440.0))
    assert all(each.in_time_share >= 0.9 for each in calm.values())
    shares = [each.in_time_share for each in over.values()]
    assert max(shares) < 0.9 and max(shares) - min(shares) < 0.1
    assert all(over[service].goodput >= calm[service].goodput for service in Service)


def test_requests_of_a_customer_meet_their_prefix_in_one_replica() -> None:
    again = [Arrival(float(second), Service.PREDICTION, customer=7, history_tokens=320) for second in range(20)]
    result = fleet(replicas=8, noise=0.0).run(again)
    times = [each.end_seconds for each in result.outcomes]
    assert max(times[1:]) < 0.5 * times[0]  # type: ignore[type-var, operator]


def test_three_engines_with_a_third_each_hold_less_than_one_with_all() -> None:
    trace = arrivals(100.0, 20.0)
    assert fleet().run(trace).goodput() > fleet().run_split(trace).goodput()


def test_capacity_is_found_between_what_holds_and_what_does_not() -> None:
    assert find_capacity(lambda rate: rate <= 7.3, 1.0) == pytest.approx(7.3, rel=0.03)
    assert find_capacity(lambda rate: rate <= 0.05, 1.0) == pytest.approx(0.05, rel=0.03)
    assert find_capacity(lambda rate: False, 1.0) == 0.0


def test_a_quantile_without_enough_values_beyond_it_is_not_given() -> None:
    found = quantiles([float(number) for number in range(250)])
    assert found["p50"] == 125 and found["p95"] == 237
    assert found["p99"] is None
    assert quantiles([])["p50"] is None


# ---- output ----------------------------------------------------------------------------------------------------------


def test_a_chart_is_well_formed_and_has_a_point_for_each_value() -> None:
    chart = Chart("Goodput & <more>", "x", "y", (1.0, 2.0, 3.0), {"a": (1.0, None, 3.0), "b": (0.0, 0.0, 0.0)})
    text = page("title", "note", [chart])
    root = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + len("</svg>")])
    assert len(root.findall("circle")) == 5
    assert "<script" not in text


def run_command(*arguments: str) -> tuple[int, str]:
    app = Typer()
    app.command()(simulate)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_the_command_prints_each_load_and_writes_the_plot(tmp_path: Path) -> None:
    plot, trace = tmp_path / "plot.html", tmp_path / "trace.jsonl"
    options = ("--cost", "step=0.002,token=5e-5,row=5e-5", "--seconds", "5", "--rate", "20", "--warm-up", "0")
    code, output = run_command(*options, "--load", "0.5,2", "--plot", str(plot), "--save-trace", str(trace))
    assert code == 0, output
    assert output.count("recommendation") == output.count("an answer in time costs") == 2
    assert plot.read_text("utf-8").count("<svg") == 4
    again = run_command(*options, "--load", "0.5,2", "--trace", str(trace))
    assert again[1].splitlines()[:8] == output.splitlines()[:8]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cost", "step=x"),
        ("--cost", "step=1,token=1", "--policy", "best"),
        ("--cost", "step=1,token=1", "--trace", "/no/such/file"),
        ("--cost", "step=1,token=1", "--sample", "3"),
        ("--cost", "step=1,token=1", "--load", "0"),
        ("--cost", "step=1,token=1", "--load", "1,inf"),
        ("--cost", "step=1,token=1", "--load", "foo"),
    ],
)
def test_what_the_command_cannot_use_is_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    code, output = run_command(*arguments)
    assert code == 2
    assert output.startswith("shoplm simulate: ") and output.count("\n") == 1


def test_no_fleet_is_busier_than_all_the_time() -> None:
    patient = [Arrival(0.001 * number, Service.PREDICTION, number, history_tokens=200) for number in range(50)]
    assert 0.9 < fleet().run(patient).utilisation <= 1.0
