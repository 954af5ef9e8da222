"""Answers in parts beside the output, so that a stopped run goes on; the output appears whole, at the end."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import polars as pl

PART_QUESTIONS = 256


class _Identity(msgspec.Struct, frozen=True):
    fingerprint: str  # of the bundle, the questions and their events
    as_of: float


class Parts:
    """The folder `.<name>.parts` beside the output."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._folder = out.with_name(f".{out.name}.parts")

    def discard(self) -> None:
        """Start anew."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def as_of(self) -> float | None:
        """What the stopped run took for now."""
        found = self._identity()
        return None if found is None else found.as_of

    def open(self, fingerprint: str, as_of: float) -> None:
        """Keeps parts of the same run; those of another are discarded."""
        wanted = _Identity(fingerprint, as_of)
        if self._identity() != wanted:
            self.discard()
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "identity.json").write_bytes(msgspec.json.encode(wanted))

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
        found = [pl.read_parquet(path) for path in sorted(self._folder.glob("*.parquet"))]
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
