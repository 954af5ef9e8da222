"""When an engine counts as silent."""

from __future__ import annotations

from shoplm.engine.silence import Silence


def test_an_engine_that_owes_nothing_may_be_silent() -> None:
    silence = Silence()
    assert [silence.look(calls_wait=False) for _ in range(3)] == [0, 0, 0]


def test_looks_without_a_word_add_up_until_something_is_received() -> None:
    silence = Silence()
    assert [silence.look(calls_wait=True) for _ in range(3)] == [1, 2, 3]
    silence.received()
    assert [silence.look(calls_wait=True) for _ in range(2)] == [0, 1]


def test_calls_that_come_and_go_between_looks_count() -> None:
    silence = Silence()
    silence.sent()  # of a request, and then of its end
    assert [silence.look(calls_wait=False) for _ in range(2)] == [1, 2]
    silence.received()
    assert [silence.look(calls_wait=False) for _ in range(2)] == [0, 0]
