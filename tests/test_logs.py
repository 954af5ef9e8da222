"""Log lines: one per record whatever it holds, with the request id."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
from shoplm.logs import configure_logs, printable, request_id

NASTY = "a\nb\r\x1b[31mred\x00\u2028\u202eend\ud800"


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, as it was afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def logged(form: str, root: logging.Logger, log: logging.Logger | None = None, error: bool = False) -> str:
    stream = io.StringIO()
    configure_logs("info", form, stream)
    log = log or logging.getLogger("shoplm.test")
    if error:
        try:
            raise ValueError(NASTY)
        except ValueError:
            log.exception("failed %s", NASTY, extra={"code": NASTY})
    else:
        log.info("said %s", NASTY, extra={"code": NASTY, "seconds": 0.5})
    return stream.getvalue()


@pytest.fixture
def page_17() -> Iterator[None]:
    """A call of that request id."""
    token = request_id.set("page-17")
    yield
    request_id.reset(token)


@pytest.mark.usefixtures("page_17")
def test_json_is_one_ascii_line_with_all_fields(root: logging.Logger) -> None:
    line = logged("json", root)
    assert line.count("\n") == 1
    assert line.rstrip("\n").isascii()
    assert line.rstrip("\n").isprintable()
    fields = json.loads(line)
    assert fields["message"] == f"said {NASTY}"
    assert (fields["level"], fields["request_id"], fields["seconds"]) == ("info", "page-17", 0.5)
    assert fields["code"] == NASTY
    assert fields["time"].endswith("Z")


@pytest.mark.usefixtures("page_17")
def test_text_is_one_printable_line(root: logging.Logger) -> None:
    line = logged("text", root)
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()
    assert r"said a\nb\r\x1b[31mred\x00\u2028\u202eend\ud800" in line
    assert line.rstrip("\n").endswith("[page-17]")


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_cannot_forge_lines(root: logging.Logger, form: str) -> None:
    lines = logged(form, root, error=True).rstrip("\n").split("\n")
    assert all(line.isprintable() for line in lines)
    if form == "json":
        assert len(lines) == 1
        assert "ValueError" in json.loads(lines[0])["exception"]
    else:
        assert all(line.startswith("    ") for line in lines[1:])


def test_debug_is_off_at_info(root: logging.Logger) -> None:
    stream = io.StringIO()
    configure_logs("info", "text", stream)
    logging.getLogger("shoplm.test").debug("hidden")
    assert stream.getvalue() == ""


def test_letters_of_all_languages_stay_readable() -> None:
    assert printable("Grüße, 東京, naïve") == "Grüße, 東京, naïve"
