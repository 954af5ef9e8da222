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


@pytest.mark.parametrize("start", [0.0, 1e6])
def test_work_that_is_due_far_ahead_is_not_overdue_before(start: float) -> None:
    backlog = Backlog()
    backlog.advance(start)
    dues = (9.0, 30.0, 60.0, 3600.0)
    buckets = [backlog.add(start + due, 1.0) for due in dues]
    for ahead in (0.0, 5.0, 10.3, 29.5, 45.0, 3599.5):
        backlog.advance(start + ahead)
        due_by = sum(due <= ahead + 1.0 for due in dues)
        assert backlog.until(start + ahead + 1.0) == pytest.approx(due_by)
        assert backlog.total == pytest.approx(len(dues))
    for number, bucket in enumerate(buckets, 1):
        backlog.remove(bucket, 1.0)
        assert backlog.total == pytest.approx(len(dues) - number)


def test_far_work_that_is_removed_before_it_is_near_leaves_nothing() -> None:
    backlog = Backlog()
    backlog.advance(0.0)
    stays = backlog.add(20.0, 2.0)
    for number in range(1_000):
        backlog.remove(backlog.add(1e4 + number, 1.0), 1.0)
    backlog.remove(backlog.add(20.0, 1.0), 1.0)
    assert backlog.total == pytest.approx(2.0)
    assert len(backlog._next_beyond) < 100
    backlog.advance(2e4)
    assert backlog.until(2e4) == pytest.approx(2.0)
    backlog.remove(stays, 2.0)
    assert backlog.total == 0.0
