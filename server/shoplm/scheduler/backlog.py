"""How much admitted work is due by when: what a new request finds ahead of it."""

from __future__ import annotations

_BUCKET_SECONDS = 0.01
_BUCKETS = 1024  # what is due later counts in the last one


class Backlog:
    """Seconds of work in buckets of due times. Adding and removing are constant; a sum is one slice, or known."""

    def __init__(self) -> None:
        self._ring = [0.0] * _BUCKETS
        self._later = 0.0  # sum of the ring
        self._first = 0  # absolute number of the ring's first bucket
        self._overdue = 0.0
        self._entries = 0

    def add(self, due_seconds: float, work_seconds: float) -> int:
        """Count work; returns the bucket that `remove` needs."""
        bucket = min(int(due_seconds / _BUCKET_SECONDS), self._first + _BUCKETS - 1)
        self._change(bucket, work_seconds)
        self._entries += 1
        return bucket

    def remove(self, bucket: int, work_seconds: float) -> None:
        """Count work no more."""
        self._change(bucket, -work_seconds)
        self._entries -= 1
        if not self._entries:
            # Sums of differences drift; an empty backlog is the moment to be exact again.
            self._ring, self._later, self._overdue = [0.0] * _BUCKETS, 0.0, 0.0

    def advance(self, now: float) -> None:
        """Forget which buckets have passed: their work is overdue."""
        current = int(now / _BUCKET_SECONDS)
        for bucket in range(self._first, min(current, self._first + _BUCKETS)):
            at = bucket % _BUCKETS
            self._overdue += self._ring[at]
            self._later -= self._ring[at]
            self._ring[at] = 0.0
        self._first = max(self._first, current)

    def until(self, due_seconds: float) -> float:
        """Seconds of work that is due no later."""
        count = min(int(due_seconds / _BUCKET_SECONDS) - self._first + 1, _BUCKETS)
        if count <= 0:
            return max(self._overdue, 0.0)
        if count == _BUCKETS or not self._entries:
            return self.total
        start = self._first % _BUCKETS
        ring = sum(self._ring[start : start + count]) + sum(self._ring[: max(0, start + count - _BUCKETS)])
        return max(self._overdue + ring, 0.0)

    @property
    def total(self) -> float:
        """Seconds of all work."""
        return max(self._overdue + self._later, 0.0)

    def _change(self, bucket: int, seconds: float) -> None:
        if bucket < self._first:
            self._overdue += seconds
        else:
            self._ring[bucket % _BUCKETS] += seconds
            self._later += seconds
