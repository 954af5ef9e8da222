"""How much admitted work is due by when: what a new request finds ahead of it."""

from __future__ import annotations

from shoplm.lazy_heap import LazyHeap

_BUCKET_SECONDS = 0.01
_BUCKETS = 1024


class Backlog:
    """Seconds of work in buckets of due times, a ring of them for the next ten seconds. Adding and removing are
    constant; a sum is one slice, or known."""

    def __init__(self, now: float = 0.0) -> None:
        self._ring = [0.0] * _BUCKETS
        self._later = 0.0  # sum of the ring
        self._first = int(now / _BUCKET_SECONDS)  # absolute number of the ring's first bucket
        self._overdue = 0.0
        self._beyond: dict[int, tuple[float, int]] = {}  # seconds and entries of the buckets behind the ring
        self._beyond_seconds = 0.0
        self._next_beyond: LazyHeap[int] = LazyHeap(lambda _, bucket: bucket not in self._beyond)
        self._entries = 0

    def __len__(self) -> int:
        """Works that are counted."""
        return self._entries

    def add(self, due_seconds: float, work_seconds: float) -> int:
        """Count work; returns the bucket that `remove` needs."""
        bucket = int(due_seconds / _BUCKET_SECONDS)
        self._entries += 1
        self._change(bucket, work_seconds, 1)
        return bucket

    def remove(self, bucket: int, work_seconds: float) -> None:
        """Count work no more."""
        self._entries -= 1
        self._change(bucket, -work_seconds, -1)
        if not self._entries:
            # Sums of differences drift; an empty backlog is the moment to be exact again.
            self._ring, self._later, self._overdue = [0.0] * _BUCKETS, 0.0, 0.0

    def advance(self, now: float) -> None:
        """Forget which buckets have passed: their work is overdue. What was behind the ring comes into it."""
        current = int(now / _BUCKET_SECONDS)
        if current <= self._first:
            return
        for bucket in range(self._first, min(current, self._first + _BUCKETS)):
            at = bucket % _BUCKETS
            self._overdue += self._ring[at]
            self._later -= self._ring[at]
            self._ring[at] = 0.0
        self._first = current
        while (first := self._next_beyond.first()) is not None and first[1] < current + _BUCKETS:
            self._next_beyond.pop()
            seconds, _ = self._beyond.pop(first[1])
            self._beyond_seconds = self._beyond_seconds - seconds if self._beyond else 0.0
            self._change(first[1], seconds, 0)

    def until(self, due_seconds: float) -> float:
        """Seconds of work that is due no later; all of it, from the end of the ring on."""
        count = min(int(due_seconds / _BUCKET_SECONDS) - self._first + 1, _BUCKETS + 1)
        if count <= 0:
            return max(self._overdue, 0.0)
        if count > _BUCKETS or not self._entries:
            return self.total
        start = self._first % _BUCKETS
        ring = sum(self._ring[start : start + count]) + sum(self._ring[: max(0, start + count - _BUCKETS)])
        return max(self._overdue + ring, 0.0)

    @property
    def total(self) -> float:
        """Seconds of all work."""
        return max(self._overdue + self._later + self._beyond_seconds, 0.0)

    def _change(self, bucket: int, seconds: float, entries: int) -> None:
        if bucket < self._first:
            self._overdue += seconds
        elif bucket < self._first + _BUCKETS:
            self._ring[bucket % _BUCKETS] += seconds
            self._later += seconds
        else:
            self._change_beyond(bucket, seconds, entries)

    def _change_beyond(self, bucket: int, seconds: float, entries: int) -> None:
        known = self._beyond.get(bucket)
        if known is None:
            self._next_beyond.trim(len(self._beyond))
            self._next_beyond.push(bucket, bucket)
            known = 0.0, 0
        left = known[1] + entries
        if left:
            self._beyond[bucket] = known[0] + seconds, left
        else:
            del self._beyond[bucket]
        self._beyond_seconds = self._beyond_seconds + seconds if self._beyond else 0.0


class ServiceBacklog:
    """A service's work, by the priority of the requests."""

    def __init__(self) -> None:
        self.levels: dict[int, Backlog] = {}
        self._now = 0.0

    def add(self, priority: int, due_seconds: float, work_seconds: float) -> int:
        """Count work; returns the bucket that `remove` needs."""
        if priority not in self.levels:
            self.levels[priority] = Backlog(self._now)
        return self.levels[priority].add(due_seconds, work_seconds)

    def remove(self, priority: int, bucket: int, work_seconds: float) -> None:
        """Count work no more."""
        level = self.levels[priority]
        level.remove(bucket, work_seconds)
        if not len(level):
            del self.levels[priority]

    def advance(self, now: float) -> None:
        """What was due before `now` is overdue."""
        self._now = max(self._now, now)
        for level in self.levels.values():
            level.advance(now)

    def until(self, due_seconds: float) -> float:
        """Seconds of work that is due no later."""
        return sum(level.until(due_seconds) for level in self.levels.values())

    @property
    def total(self) -> float:
        """Seconds of all work."""
        return sum(level.total for level in self.levels.values())
