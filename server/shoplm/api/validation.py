"""Checks of single fields: each problem is kept with the path of its field, and all are reported together."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

from shoplm.errors import InvalidRequestError

MAX_VIOLATIONS = 16  # gRPC carries them in the trailers, of which most peers take 8 KiB
QUOTED_CHARACTERS = 60


def quote(value: object) -> str:
    """A value of a request for an error message or a log line: ASCII, control characters escaped, shortened."""
    if isinstance(value, str):
        shown = ascii(value[:QUOTED_CHARACTERS])
        return f"{shown}… ({len(value)} characters)" if len(value) > QUOTED_CHARACTERS else shown
    return str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known name is near, else nothing."""
    if len(name) > 200:  # comparing costs its square
        return ""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {quote(near[0])}?" if near else ""


def shown_outside(value: float, low: float, high: float) -> str:
    """A number outside of [low, high], short, but with as many digits as it takes to see that it is outside."""
    shown = [f"{value:g}", f"{value:.9g}", f"{value:.17g}"]
    return next((each for each in shown if not low <= float(each) <= high), shown[-1])


class Violations:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []
        self._more = 0

    def __bool__(self) -> bool:
        return bool(self._found)

    @property
    def is_full(self) -> bool:
        """Whether what is added now is only counted: its text is not worth much work."""
        return len(self._found) >= MAX_VIOLATIONS

    def add(self, field: str, text: str) -> None:
        """`field` is the path in the request's message, such as `customer.events[3].price`."""
        if not self.is_full:
            self._found.append((field, text))
        else:
            self._more += 1

    def extend(self, other: Violations) -> None:
        """Take over what another check found."""
        for field, text in other._found:
            self.add(field, text)
        self._more += other._more

    def raise_if_any(self) -> None:
        """Raises InvalidRequestError with all that was found."""
        if not self._found:
            return
        if self._more:
            field, text = self._found[-1]
            self._found[-1] = (field, f"{text} (and {self._more} more problems)")
        raise InvalidRequestError(*self._found)

    def text(self, field: str, value: str, max_bytes: int, *, required: bool = False) -> bool:
        """A short string. Whether it can be used."""
        if required and not value:
            self.add(field, "is empty")
            return False
        # A character takes at most four bytes: most strings need no encoding to be counted.
        if len(value) * 4 > max_bytes and (size := len(value.encode())) > max_bytes:
            self.add(field, f"has {size} bytes, at most {max_bytes} are allowed: {quote(value)}")
            return False
        return True

    def number(self, field: str, value: float, low: float, high: float, *, above: bool = False) -> bool:
        """A finite number in [low, high], or above `low` where that is asked. Whether it can be used."""
        if math.isfinite(value) and low <= value <= high and not (above and value == low):
            return True
        span = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
        self.add(field, f"is {shown_outside(value, low, high)}, expected a number {span}")
        return False

    def at_most(self, field: str, count: int, limit: int, setting: str) -> bool:
        """A count with a limit of the server. Whether it is within."""
        if count <= limit:
            return True
        # A negative number of a careless caller arrives as one near 2**32.
        hint = f" ({count - 2**32} as a signed number)" if 2**31 <= count < 2**32 else ""
        self.add(field, f"is {count}{hint}, at most {limit} is allowed ({setting})")
        return False

    def length(self, field: str, values: Sequence[object], limit: int, setting: str) -> bool:
        """A list with a limit of the server. Whether it is within."""
        if len(values) <= limit:
            return True
        self.add(field, f"has {len(values)} entries, at most {limit} are allowed ({setting})")
        return False
