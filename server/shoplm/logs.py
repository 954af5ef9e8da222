"""Structured logs: a line of text or of JSON per record, with the request id of the call that it belongs to.

Whatever a message holds, a record is one line of printable ASCII or UTF-8 text: control characters, terminal escapes
and line separators are written as escapes. Nothing of a request is ever logged but the paths of its refused fields.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

# Set by `api.calls` for the task that serves a call.
request_id: ContextVar[str | None] = ContextVar("shoplm_request_id", default=None)

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "request_id"}
_LEVELS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}


def printable(text: str) -> str:
    """The text with everything escaped that a terminal or a line-based reader could act on."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def configure_logs(level: str, form: str, stream: TextIO | None = None) -> None:
    """Send all records of the process, and what Python warns of, to `stream` (standard error if None), in the form
    "text" or "json"."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(_add_request_id)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    # These say at INFO or below what only their developers want to know, and some of it holds request data.
    for name in ("asyncio", "grpc", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _add_request_id(record: logging.LogRecord) -> bool:
    if not hasattr(record, "request_id"):
        record.request_id = request_id.get()
    return True


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD and not name.startswith("_")}


def _utc(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, logger, message, request_id and the record's extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _utc(record),
            "level": _LEVELS.get(record.levelno, record.levelname.lower()),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (identifier := getattr(record, "request_id", None)) is not None:
            fields["request_id"] = identifier
        fields.update(_extras(record))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)  # ASCII only, so that no character can act on a terminal


class TextFormatter(logging.Formatter):
    """`time level message key=value … [request id]`; the lines of a traceback follow, each escaped on its own."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [_utc(record), f"{_LEVELS.get(record.levelno, record.levelname.lower()):<7}", record.getMessage()]
        parts += [f"{name}={value}" for name, value in _extras(record).items()]
        if (identifier := getattr(record, "request_id", None)) is not None:
            parts.append(f"[{identifier}]")
        lines = [printable(" ".join(parts))]
        if record.exc_info:
            lines += [f"    {printable(line)}" for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(lines)
