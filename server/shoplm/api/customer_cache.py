"""Caches of what was computed for recent customers: the calls of one page view send the same customer several times.

Only what cannot have changed is reused, so answers are the same with and without, except that calls within one second
share their `now`. For one event loop, not for threads.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from shoplm.history import History
from shoplm.v1 import shop_pb2

MAX_EVENTS = 500_000  # kept in all, about 50 bytes each
MOMENT_SECONDS = 1.0  # calls that name no moment share one for so long, and with it all that depends on the moment
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Read:
    """A customer message that was read without a problem."""

    history: History
    warnings: dict[str, int]
    is_fixed: bool  # whether the message says of which moment the answer is; else that is now


class RecentCustomers:
    """Customer messages -> what they were read as, least recently used first out."""

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._entries: OrderedDict[bytes, Read] = OrderedDict()
        self._max_events = max_events
        self._events = 0

    @staticmethod
    def key(customer: shop_pb2.Customer, tenant: str) -> bytes:
        """The key of a customer message. Tenants share nothing."""
        digest = hashlib.blake2b(tenant.encode() + b"\0", digest_size=16)
        digest.update(customer.SerializeToString(deterministic=True))
        return digest.digest()

    def get(self, key: bytes, now: float) -> Read | None:
        """What was read of the message, None if it is not kept. If the message names no moment, the history is that of
        `now` (Unix seconds), or of up to a second before."""
        read = self._entries.get(key)
        if read is None:
            return None
        self._entries.move_to_end(key)
        if read.is_fixed or 0 <= now - read.history.as_of < MOMENT_SECONDS:
            return read
        if now < read.history.as_of:  # the clock was set back: an event may be one of the future now
            return None
        read = self._entries[key] = replace(read, history=replace(read.history, as_of=now))
        return read

    def put(self, key: bytes, read: Read) -> None:
        """Keep what was read. A history of now must hold every event of its message, none of them in the future."""
        before = self._entries.pop(key, None)
        self._entries[key] = read
        self._events += _size(read) - (0 if before is None else _size(before))
        while self._events > self._max_events:
            _, oldest = self._entries.popitem(last=False)
            self._events -= _size(oldest)


def _size(read: Read) -> int:
    return len(read.history) + 100  # what an entry takes beside its events, in events


class Memo(Generic[K, V]):
    """The results of a function for its latest arguments, told apart by identity: arguments must not change."""

    def __init__(self, function: Callable[[K], V], identity: Callable[[K], object], size: int = 256) -> None:
        """`identity` gives the object whose identity stands for an argument."""
        self._function = function
        self._identity = identity
        self._size = size
        self._entries: OrderedDict[int, tuple[object, V]] = OrderedDict()

    def __call__(self, argument: K) -> V:
        what = self._identity(argument)
        entry = self._entries.get(id(what))
        if entry is None:
            # Kept beside its result, an object's id is not given to another.
            entry = self._entries[id(what)] = (what, self._function(argument))
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(id(what))
        return entry[1]
