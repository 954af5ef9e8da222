"""The batch of one step: what a backend computes. numpy only; built by `engine.builder`, read by `model.*_backend`.

A *pool slot* is `page * page_size + offset`: the place of one token's keys and values in every layer.
A *state slot* is the backend's memory of one running request: its last sampled token, or its beams. It makes the
contract asynchronous: a step can be submitted whose inputs the step before it has not yet produced.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from shoplm.request import HeadValues, ItemScores, Sampling, Select, SelectOutput


class SampleReadout(msgspec.Struct, frozen=True, gc=False):
    """Draw one token from the text rows. `index` counts the request's produced tokens and varies the seed.

    Behind a draft, whose tokens are the row's last ones, one more is drawn behind each token before them: the first has
    `index`.
    """

    sampling: Sampling
    index: int
    drafted: int = 0  # tokens of the draft


class SelectReadout(msgspec.Struct, frozen=True, gc=False):
    """Extend the beams by one level of the trie; the last level yields the items. Level 0 starts the beams."""

    select: Select
    level: int


class PredictReadout(msgspec.Struct, frozen=True, gc=False):
    """Evaluate the bundle's heads on the last hidden state and these dense features."""

    features: tuple[float, ...]


class EmbedReadout(msgspec.Struct, frozen=True, gc=False):
    """Return the last hidden state, after the final norm."""


class ForkReadout(msgspec.Struct, frozen=True, gc=False):
    """Read the last token of each fork that ends in this step."""

    reads: ItemScores | HeadValues  # of these forks alone
    ends: tuple[int, ...]  # tokens of the row, counted from its first


Readout = SampleReadout | SelectReadout | PredictReadout | EmbedReadout | ForkReadout


class BeamStep(msgspec.Struct, frozen=True, gc=False):
    """The beams of one request at one position. Their tokens and parents are in the backend's state."""

    step: int  # 1 .. depth - 1: how many codes each lane has chosen
    own_slots: NDArray[np.int64]  # [depth - 1, lanes]: pool slot of lane b's code of step s + 1; filled by the engine


class Row(msgspec.Struct, frozen=True, gc=False):
    """The part of a step that belongs to one request."""

    state_slot: int
    query_start: int  # first of its tokens in the flat arrays
    query_len: int  # new tokens; for beams, lanes
    pages: NDArray[np.int32]  # pages of the prompt and answer in order; read-only for beams
    kv_len: int  # tokens readable through `pages`, including those written in this step; for beams, the prompt's length
    token_from_state: bool = False  # the single token is the one that the state slot's last step drew
    beam: BeamStep | None = None
    readout: Readout | None = None  # of the last token, or of every lane; None: the prompt goes on in a later step
    # [query_len, kv_len]: keys before a token that it must not read; None: it reads all. Filled by `engine.forks`.
    hidden: NDArray[np.bool_] | None = None

    @property
    def query_end(self) -> int:
        return self.query_start + self.query_len

    @property
    def output_count(self) -> int:
        """Hidden states that are read."""
        if self.readout is None:
            return 0
        if isinstance(self.readout, SampleReadout):
            return 1 + self.readout.drafted
        if isinstance(self.readout, ForkReadout):
            return len(self.readout.ends)
        return 1 if self.beam is None else self.query_len

    @property
    def output_tokens(self) -> Sequence[int]:
        """The tokens of the flat axis whose hidden states are read, ascending."""
        if isinstance(self.readout, ForkReadout):
            return [self.query_start + end for end in self.readout.ends]
        return range(self.query_end - self.output_count, self.query_end)


def beam_of(row: Row) -> BeamStep:
    """The beams of a row that has them."""
    if row.beam is None:
        raise ValueError(f"row of state slot {row.state_slot} has no beams")
    return row.beam


class Batch(msgspec.Struct, frozen=True, gc=False):
    """One step, tokens of all rows in one flat axis."""

    tokens: NDArray[np.int32]  # [T]; 0 where the token comes from a state slot
    positions: NDArray[np.int32]  # [T]
    slots: NDArray[np.int64]  # [T] pool slot that each token's keys and values are written to
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        total = len(self.tokens)
        for name, array in (("positions", self.positions), ("slots", self.slots)):
            if len(array) != total:
                raise ValueError(f"{name} has {len(array)} entries for {total} tokens")
        end = 0
        for row in self.rows:
            if row.query_start != end or row.query_len < 1:
                raise ValueError(f"row of state slot {row.state_slot} does not continue the flat axis at {end}")
            if row.token_from_state and row.query_len != 1:
                raise ValueError(f"row of state slot {row.state_slot}: only a single token can come from the state")
            if row.beam is not None and row.beam.own_slots.shape[1] != row.query_len:
                raise ValueError(f"row of state slot {row.state_slot}: {row.query_len} lanes but other own_slots")
            if row.hidden is not None and row.hidden.shape != (row.query_len, row.kv_len):
                raise ValueError(f"row of state slot {row.state_slot}: hidden has shape {row.hidden.shape}")
            end = row.query_end
        if end != total:
            raise ValueError(f"rows cover {end} of {total} tokens")


RowOutput = int | list[int] | SelectOutput | tuple[float, ...] | None


class StepResult(msgspec.Struct, frozen=True, gc=False):
    """What a step produced, aligned with the batch's rows.

    int: the sampled token; list: those of a row with a draft. SelectOutput: the items (last level). tuple: head outputs
    or hidden state, or what the forks that end in this step read, one after another.
    None: nothing to read yet (no readout, or a level of the trie before the last).
    """

    outputs: tuple[RowOutput, ...]
    step_seconds: float
