"""Answers in parts beside the output, so that a stopped run goes on; the output appears whole, at the end."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import polars as pl

PART_QUESTIONS = 256


class _Identity(msgspec.Struct, frozen=True):
    fingerprint: str  # of the bundle, the questions and their events; not of the moment of questions without one
    as_of: float  # that moment
    given: bool  # whether it was asked for, or was the time of the run


class Parts:
    """The folder `.<name>.parts` beside the output."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._folder = out.with_name(f".{out.name}.parts")

    def discard(self) -> None:
        """Start anew."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, fingerprint: str, as_of: float | None, now: float) -> tuple[float, bool]:
        """Keeps parts of the same run; those of another are discarded. Returns the moment of questions without one,
        `as_of` or what the run that goes on took for `now`, and whether a run goes on."""
        found = self._identity()
        same = found is not None and found.fingerprint == fingerprint and found.given == (as_of is not None)
        if found is not None and same and as_of in (None, found.as_of):
            return found.as_of, True
        self.discard()
        wanted = _Identity(fingerprint, now if as_of is None else as_of, as_of is not None)
        self._folder.mkdir(parents=True)
        (self._folder / "identity.json").write_bytes(msgspec.json.encode(wanted))
        return wanted.as_of, False

    def has(self, start: int) -> bool:
        """Whether the part that begins with question `start` is there."""
        return self._path(start).exists()

    def write(self, start: int, answers: pl.DataFrame) -> None:
        """One part, whole or not at all."""
        temporary = self._path(start).with_suffix(".partial")
        answers.write_parquet(temporary)
        temporary.replace(self._path(start))

    def finish(self, schema: dict[str, pl.DataType]) -> int:
        """All parts as the output, in the order of the questions' file; returns its rows."""
        found = [pl.read_parquet(path, glob=False) for path in sorted(self._folder.glob("*.parquet"))]
        answers = pl.concat(found) if found else pl.DataFrame(schema=schema)
        temporary = self._out.with_name(f".{self._out.name}.partial")
        answers.sort("number").drop("number").write_parquet(temporary)
        temporary.replace(self._out)
        self.discard()
        return len(answers)

    def _path(self, start: int) -> Path:
        return self._folder / f"{start:09d}.parquet"

    def _identity(self) -> _Identity | None:
        try:
            return msgspec.json.decode((self._folder / "identity.json").read_bytes(), type=_Identity)
        except (OSError, msgspec.DecodeError):
            return None
