"""The requests that wait to run, new ones and preempted ones, and what is counted of them."""

from __future__ import annotations

from shoplm.scheduler.fairness import Shares
from shoplm.scheduler.ordering import Order
from shoplm.scheduler.prospects import Prospects
from shoplm.scheduler.sequence import Sequence
from shoplm.scheduler.waiting import WaitingRoom


class Queue:
    """Keeps order, waiting room, shares and prospects of one mind about who waits."""

    def __init__(self, order: Order, waiting: WaitingRoom, shares: Shares, prospects: Prospects) -> None:
        self.order = order
        self._waiting = waiting
        self._shares = shares
        self._prospects = prospects

    def push(self, sequence: Sequence) -> None:
        """It begins to wait, or waits again."""
        self.order.push(sequence)
        self._prospects.count(sequence)
        self._waiting.enter(sequence)
        self._shares.services[sequence.request.service].waiting += 1

    def drop(self, sequence: Sequence) -> None:
        """It waits no more."""
        self.order.drop(sequence)
        self._waiting.leave(sequence)
        self._shares.services[sequence.request.service].waiting -= 1

    def pop(self, sequence: Sequence) -> None:
        """It runs."""
        self.drop(sequence)
        if sequence.epoch == 0:
            self._shares.demand.begun(sequence.request.service, sequence.request.arrival_seconds)
