"""Work that is due by a moment, at clocks that have run for long."""

from __future__ import annotations

import pytest
from shoplm.scheduler.backlog import Backlog


@pytest.mark.parametrize("start", [0.0, 3.0, 1e6])
def test_what_is_due_later_is_not_counted(start: float) -> None:
    backlog = Backlog()
    backlog.advance(start)
    soon = backlog.add(start + 0.5, 1.0)
    backlog.add(start + 2.0, 10.0)
    far = backlog.add(start + 1000.0, 100.0)
    assert backlog.until(start + 0.2) == 0.0
    assert backlog.until(start + 1.0) == pytest.approx(1.0)
    assert backlog.until(start + 5.0) == pytest.approx(11.0)
    assert backlog.total == pytest.approx(111.0)
    backlog.remove(soon, 1.0)
    assert backlog.until(start + 5.0) == pytest.approx(10.0)
    backlog.remove(far, 100.0)
    assert backlog.total == pytest.approx(10.0)


def test_what_was_due_is_overdue_until_it_is_removed() -> None:
    backlog = Backlog()
    backlog.advance(100.0)
    due = backlog.add(100.5, 1.0)
    for now in (100.2, 101.0, 150.0, 1e4):
        backlog.advance(now)
        assert backlog.until(now) == pytest.approx(1.0 if now > 100.5 else 0.0)
        assert backlog.until(now + 1.0) == pytest.approx(1.0)
    backlog.remove(due, 1.0)
    assert backlog.total == 0.0
