"""A `Customer` message becomes a `History`: checked, sorted, cut to the newest, with warnings for what was left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray
from shoplm.api.caller import caller
from shoplm.api.customer_cache import Read, RecentCustomers
from shoplm.api.validation import Violations, quote
from shoplm.api.warnings import Warnings
from shoplm.catalog.items import Catalog
from shoplm.history import EVENT_KINDS, MAX_ATTRIBUTE_BYTES, MAX_ATTRIBUTES, SECONDS_PER_DAY, EventKind, History
from shoplm.raw_events import RawEvents, resolve_items
from shoplm.served import Shop
from shoplm.v1 import shop_pb2

_MOST_TIMES_EVENTS = 20  # max_events: more are not even looked at, to find the newest
MAX_FUTURE_DAYS = 366.0  # further ahead than any plan: milliseconds taken for seconds, most likely
MAX_ID_BYTES = 256
MAX_AMOUNT = 1e9  # of a quantity or a price: far above any shop's, and sums of it stay finite in fp32
_FIELD = "customer"  # of the requests: begins the path of what is wrong

_KINDS = {
    shop_pb2.EVENT_TYPE_UNSPECIFIED: EventKind.PURCHASE,
    shop_pb2.EVENT_TYPE_PURCHASE: EventKind.PURCHASE,
    shop_pb2.EVENT_TYPE_CART: EventKind.CART,
    shop_pb2.EVENT_TYPE_VIEW: EventKind.VIEW,
    shop_pb2.EVENT_TYPE_RETURN: EventKind.RETURN,
}
_KIND_OF = np.array([_KINDS[each] for each in sorted(_KINDS)], np.int8)  # by the number of the event type


class CustomerReader:
    """Reads customers for one shop; without a shop, no item and no attribute is known."""

    def __init__(self, shop: Shop | None, max_events: int, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives Unix seconds."""
        self._catalog = shop.catalog if shop is not None else _no_catalog()
        self._attributes = frozenset(shop.manifest.prompt.attributes) if shop is not None else frozenset()
        values = shop.manifest.prompt.attribute_values if shop is not None else {}
        self._values = {name: frozenset(seen) for name, seen in values.items()}
        self._demo = shop.demo if shop is not None else {}
        self._counted = EVENT_KINDS[shop.manifest.recommends] if shop is not None else EventKind.PURCHASE
        self._recent = RecentCustomers()
        self._max_events = max_events
        self._clock = clock

    def read(self, customer: shop_pb2.Customer, violations: Violations, warnings: Warnings) -> History:
        """The customer's history up to their `as_of`; without events that count, an empty one of that moment.

        What is wrong goes to `violations`; the result counts only if none was added."""
        now = self._clock()
        key = self._recent.key(customer, caller.get().tenant)
        known = self._recent.get(key, now)
        if known is None:
            found, noted = Violations(), Warnings()
            history = self._read(customer, now, found, noted)
            is_fixed = customer.HasField("as_of") or self._is_demo(customer)
            known = Read(history, noted.counts(), is_fixed)
            violations.extend(found)
            # An event that was left out as one of the future, or beside one, may count a moment later.
            changes = not is_fixed and ("FUTURE_EVENT" in known.warnings or len(customer.events) > self._max_events)
            if not found and not changes:
                self._recent.put(key, known)
        for code, count in known.warnings.items():
            warnings.add(code, count)
        return known.history

    def _is_demo(self, customer: shop_pb2.Customer) -> bool:
        return not customer.events and customer.customer_id in self._demo

    def _read(self, customer: shop_pb2.Customer, now: float, violations: Violations, warnings: Warnings) -> History:
        violations.text(f"{_FIELD}.customer_id", customer.customer_id, MAX_ID_BYTES)
        demo = self._demo[customer.customer_id] if self._is_demo(customer) else None
        attributes = self._read_attributes(customer, violations, warnings)
        as_of = demo.as_of if demo is not None else now
        if customer.HasField("as_of"):
            as_of = _moment(f"{_FIELD}.as_of", customer.as_of, now, violations)
        if demo is not None:
            events, attributes = demo.events, attributes or demo.attributes
        else:
            events = self._read_events(customer.events, as_of, now, violations, warnings)
        past = np.flatnonzero(events.time <= as_of)
        warnings.add("FUTURE_EVENT", len(events) - len(past))
        if len(past) < len(events):
            events = events.select(past)
        return events.history(as_of, attributes, self._counted)

    def _read_attributes(
        self, customer: shop_pb2.Customer, violations: Violations, warnings: Warnings
    ) -> dict[str, str]:
        if not violations.length(f"{_FIELD}.attributes", customer.attributes, MAX_ATTRIBUTES, "fixed"):  # type: ignore[arg-type]
            return {}
        known = {}
        for name, value in customer.attributes.items():
            path = f"{_FIELD}.attributes[{quote(name)}]"
            if not violations.text(path, name, MAX_ATTRIBUTE_BYTES) or not violations.text(
                path, value, MAX_ATTRIBUTE_BYTES
            ):
                continue
            if name not in self._attributes:
                warnings.add("UNKNOWN_ATTRIBUTE")
            elif value:
                known[name] = value
                warnings.add("UNKNOWN_ATTRIBUTE_VALUE", int(value not in self._values.get(name, (value,))))
        return known

    def _read_events(
        self,
        events: Sequence[shop_pb2.Event],
        as_of: float,
        now: float,
        violations: Violations,
        warnings: Warnings,
    ) -> RawEvents:
        """The newest events whose items are known. Every event that is read is checked; dropped ones are not."""
        most = _MOST_TIMES_EVENTS * self._max_events
        if not violations.length(f"{_FIELD}.events", events, most, f"{_MOST_TIMES_EVENTS} x max_events"):
            return _NO_EVENTS
        times = np.asarray([event.time.seconds for event in events], np.float64)
        rows = np.arange(len(events)) if len(events) <= self._max_events else self._newest(times, as_of)
        warnings.add("EVENTS_TRUNCATED", len(events) - len(rows))
        read = [(row, events[row]) for row in rows.tolist()]
        latest = now + MAX_FUTURE_DAYS * SECONDS_PER_DAY
        for row, event in read:
            if not _is_sound(event, latest):
                _check_event(f"{_FIELD}.events[{row}]", event, now, violations)
        if violations:
            return _NO_EVENTS
        item_ids = [event.item_id for _, event in read]
        item, has_item, known = resolve_items(item_ids, self._catalog)
        warnings.add("UNKNOWN_ITEM", int((~known).sum()))
        types = np.asarray([event.type for _, event in read], np.int8)
        raw = RawEvents(
            item=item,
            has_item=has_item,
            kind=_KIND_OF[types],
            time=times[rows] + np.asarray([event.time.nanos for _, event in read], np.float64) / 1e9,
            quantity=np.asarray([event.quantity or 1.0 for _, event in read], np.float32),
            price=np.asarray([event.price if event.HasField("price") else float("nan") for _, event in read]),
            basket=[event.basket_id for _, event in read],
        )
        repeated = _repeated(raw, item_ids) & known
        warnings.add("DUPLICATE_EVENT", int(repeated.sum()))
        kept = known & ~repeated
        warnings.add("UNTYPED_EVENT", int((kept & (types == shop_pb2.EVENT_TYPE_UNSPECIFIED)).sum()))
        return raw if kept.all() else raw.select(np.flatnonzero(kept))

    def _newest(self, times: NDArray[np.float64], as_of: float) -> NDArray[np.int64]:
        """Rows of the newest events, in the order given. The oldest go in blocks, counted from the very first event, so
        that most new events leave the kept part's beginning, and with it the cached prefix, as it was. Events after
        `as_of` take no room from those before it."""
        block = max(self._max_events // 4, 1)
        order = np.argsort(np.where(times > as_of, -np.inf, times), kind="stable")
        excess = len(times) - self._max_events
        return np.sort(order[min(-(-excess // block) * block, len(times) - 1) :])


def _repeated(raw: RawEvents, item_ids: list[str]) -> NDArray[np.bool_]:
    """[E]: events that an earlier one equals in every field, the item's id included."""
    repeated = np.zeros(len(raw), np.bool_)
    # Equal events have equal marks, and hardly any others do: few are compared field by field, which takes longer.
    marks = raw.time.view(np.int64) ^ raw.item
    ordered = np.sort(marks)
    shared = ordered[1:][ordered[1:] == ordered[:-1]]
    rows = np.flatnonzero(np.isin(marks, shared)) if len(shared) else shared
    prices = np.nan_to_num(raw.price[rows], nan=-1.0)
    columns = (column.tolist() for column in (raw.kind[rows], raw.time[rows], raw.quantity[rows], prices))
    seen = set()
    for row, *values in zip(rows.tolist(), *columns, strict=True):
        event = (item_ids[row], raw.basket[row], *values)
        repeated[row] = event in seen
        seen.add(event)
    return repeated


def _is_sound(event: shop_pb2.Event, latest: float) -> bool:
    """Whether `_check_event` would find nothing, at a third of the cost; it may be unsure of one that is fine."""
    moment = event.time
    return (
        0 < len(event.item_id) <= MAX_ID_BYTES // 4  # a character takes at most four bytes
        and len(event.basket_id) <= MAX_ID_BYTES // 4
        and event.type in _KINDS
        and event.HasField("time")
        and 0 <= moment.seconds <= latest
        and 0 <= moment.nanos < 1_000_000_000
        and (0.0 < event.quantity <= MAX_AMOUNT or not event.HasField("quantity"))
        and 0.0 <= event.price <= MAX_AMOUNT  # 0 where there is none
    )


def _check_event(path: str, event: shop_pb2.Event, now: float, violations: Violations) -> None:
    violations.text(f"{path}.item_id", event.item_id, MAX_ID_BYTES, required=True)
    violations.text(f"{path}.basket_id", event.basket_id, MAX_ID_BYTES)
    if event.type not in _KINDS:
        violations.add(f"{path}.type", f"is {event.type}, which is no event type")
    if event.HasField("time"):
        _moment(f"{path}.time", event.time, now, violations)
    else:
        violations.add(f"{path}.time", "is missing; every event needs the time at which it happened")
    if event.HasField("quantity"):
        violations.number(f"{path}.quantity", event.quantity, 0.0, MAX_AMOUNT, above=True)
    if event.HasField("price"):
        violations.number(f"{path}.price", event.price, 0.0, MAX_AMOUNT)


def _moment(path: str, moment: Timestamp, now: float, violations: Violations) -> float:
    """Unix seconds; `now` where the timestamp cannot be used."""
    if not 0 <= moment.nanos < 1_000_000_000:
        violations.add(path, f"has {moment.nanos} nanos, expected 0 to 999999999")
        return now
    if moment.seconds < 0:
        violations.add(path, f"is {moment.seconds} s, before 1970")
        return now
    if moment.seconds > now + MAX_FUTURE_DAYS * SECONDS_PER_DAY:
        violations.add(
            path,
            f"is {moment.seconds} s after 1970, more than {MAX_FUTURE_DAYS:.0f} days ahead; are these milliseconds?",
        )
        return now
    return float(moment.seconds) + moment.nanos / 1e9


def _no_catalog() -> Catalog:
    return Catalog(
        item_ids=[],
        titles=[],
        categories=[],
        prices=np.zeros(0),
        in_stock=np.zeros(0, np.bool_),
        type_texts=[],
        rare={},
    )


_NO_EVENTS = RawEvents(
    item=np.zeros(0, np.int32),
    has_item=np.zeros(0, np.bool_),
    kind=np.zeros(0, np.int8),
    time=np.zeros(0),
    quantity=np.zeros(0, np.float32),
    price=np.zeros(0),
    basket=[],
)
