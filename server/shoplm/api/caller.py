"""Who calls, as far as the scheduler shares the engine by it: tenant and priority, from the call's metadata.

Both are what the caller says of itself. Where callers are not to be trusted, a gateway sets them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

from shoplm.api.validation import quote
from shoplm.errors import InvalidRequestError

PRIORITY_KEY = "x-priority"
MAX_PRIORITY = 100
_PRIORITY = re.compile(r"-?[0-9]{1,9}")
_TENANT = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who shares the engine with whom. Larger priorities are sooner, within a tenant."""

    tenant: str = ""
    priority: int = 0


_NOBODY = Caller()
caller: ContextVar[Caller] = ContextVar("caller", default=_NOBODY)  # of the call that this task serves


def read_caller(metadata: Iterable[tuple[str, str | bytes]], tenant_key: str) -> Caller:
    """The caller of a call with this metadata; `tenant_key` "" reads no tenant.

    Raises InvalidRequestError naming the key: a misspelt tenant must not become one with a share of its own, and of two
    values it is anybody's guess which is a gateway's and which the caller's before it.
    """
    tenant, priority = "", None
    for key, value in metadata:
        if key == tenant_key:
            if tenant:
                raise InvalidRequestError((f"metadata[{key}]", "is there twice"))
            if not isinstance(value, str) or not _TENANT.fullmatch(value):
                raise InvalidRequestError(
                    (f"metadata[{key}]", f"is {quote(value)}, expected 1 to 128 letters, digits or ._:/+=@-")
                )
            tenant = value
        elif key == PRIORITY_KEY:
            if priority is not None:
                raise InvalidRequestError((f"metadata[{key}]", "is there twice"))
            priority = _priority(value)
    return Caller(tenant, priority or 0) if tenant or priority else _NOBODY


def _priority(value: str | bytes) -> int:
    if isinstance(value, str) and _PRIORITY.fullmatch(value) and abs(int(value)) <= MAX_PRIORITY:
        return int(value)
    raise InvalidRequestError(
        (
            f"metadata[{PRIORITY_KEY}]",
            f"is {quote(value)}, expected a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}",
        )
    )
