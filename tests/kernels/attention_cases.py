"""Inputs for the attention tests: random page tables, poison wherever a kernel must not look, and error bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from shoplm.kernels import reference
from shoplm.kernels.inputs import WORD_BITS, BeamGroups, ForkRows, PagedKv, RaggedRows, packed_bits
from shoplm.kernels.workspace import Workspace

NEVER_A_PAGE = 2**30
UNUSED_TOKENS = 3  # tokens at the end of the flat batch that belong to no row

Row = tuple[int, int]  # (new tokens, kv_len)


@dataclass(frozen=True)
class Shape:
    """What a kernel is specialised on."""

    head_dim: int = 64
    group: int = 4
    kv_heads: int = 2
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None  # None: as dtype

    @property
    def q_heads(self) -> int:
        return self.group * self.kv_heads


# Every head size, group and page size, the dtypes that the interpreter can do, and both quantised pools.
SHAPES = (
    Shape(64, 1, 2, 16),
    Shape(64, 3, 2, 32),
    Shape(96, 4, 1, 64, torch.float16),
    Shape(96, 7, 1, 16),
    Shape(128, 8, 1, 32, torch.float16),
    Shape(256, 16, 1, 64, torch.float16),
    Shape(128, 4, 2, 16, torch.float16, torch.int8),
    Shape(64, 7, 1, 64, torch.float16, torch.float8_e4m3fn),
)


@dataclass(frozen=True)
class Case:
    """One step's inputs and poisoned outputs."""

    shape: Shape
    q: torch.Tensor
    kv: PagedKv
    rows: RaggedRows
    out: torch.Tensor
    lse: torch.Tensor
    workspace: Workspace

    @property
    def tokens(self) -> int:
        return int(self.rows.query_start[-1])


class Pool:
    """A pool of random pages handed out in random order; slots that nobody was given read as NaN."""

    def __init__(self, shape: Shape, pages: int) -> None:
        self.shape = shape
        self._free = torch.randperm(pages).tolist()
        self._used = torch.zeros(pages, shape.page_size, dtype=torch.bool)
        size = (pages, shape.kv_heads, shape.page_size, shape.head_dim)
        self._k, self._v = torch.randn(size), torch.randn(size)

    def take(self, tokens: int) -> list[int]:
        """Pages for `tokens` tokens; marks exactly their slots as used."""
        pages = [self._free.pop() for _ in range(-(-tokens // self.shape.page_size))]
        for position in range(tokens):
            self._used[pages[position // self.shape.page_size], position % self.shape.page_size] = True
        return pages

    def take_slot(self) -> int:
        """One slot somewhere in a page of its own."""
        page: int = self._free.pop()
        offset = int(torch.randint(self.shape.page_size, ()))
        self._used[page, offset] = True
        return page * self.shape.page_size + offset

    def finish(self) -> PagedKv:
        """The pool in its storage type, with poison in every unused slot."""
        (k, k_scale), (v, v_scale) = self._store(self._k), self._store(self._v)
        return PagedKv(k, v, k_scale, v_scale)

    def _store(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        kv_dtype = self.shape.kv_dtype
        if kv_dtype is None:
            stored = values.to(self.shape.dtype)
            stored.transpose(1, 2)[~self._used] = math.nan
            return stored, None
        limit = 127.0 if kv_dtype == torch.int8 else 448.0
        scale = values.abs().amax(-1) / limit
        scaled = values / scale[..., None]
        stored = (scaled.round() if kv_dtype == torch.int8 else scaled).to(kv_dtype)
        scale.transpose(1, 2)[~self._used] = math.nan
        return stored, scale


def page_table(pages: Sequence[Sequence[int]]) -> torch.Tensor:
    """int32 [rows, longest + 2], entries past a row's pages absurd so that following one would crash."""
    width = max((len(row) for row in pages), default=0) + 2
    table = torch.full((len(pages), width), NEVER_A_PAGE, dtype=torch.int32)
    for index, row in enumerate(pages):
        table[index, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return table


def prefix_sums(counts: Sequence[int]) -> torch.Tensor:
    """int32 [n + 1], starting at 0."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def int32(values: Sequence[int]) -> torch.Tensor:
    """A list as int32."""
    return torch.tensor(values, dtype=torch.int32)


def make_case(shape: Shape, rows: Sequence[Row], *, slack: int = 0) -> Case:
    """A step of `rows`; `slack` loosens every upper bound, which must not change a result."""
    pool = Pool(shape, sum(-(-kv_len // shape.page_size) for _, kv_len in rows) + 2)
    pages = [pool.take(kv_len) for _, kv_len in rows]
    new = [count for count, _ in rows]
    tokens = sum(new)
    q = torch.randn(tokens + UNUSED_TOKENS, shape.q_heads, shape.head_dim).to(shape.dtype)
    max_kv_len = max((kv_len for _, kv_len in rows), default=0) + slack
    ragged = RaggedRows(
        page_table=page_table(pages),
        kv_len=int32([kv_len for _, kv_len in rows]),
        query_start=prefix_sums(new),
        max_query_len=max(new, default=0) + slack,
        max_kv_len=max_kv_len,
    )
    workspace = poisoned_workspace(shape, rows=len(rows), kv_len=max_kv_len)
    out, lse = poisoned(q), torch.full(q.shape[:2], math.nan)
    return Case(shape, q, pool.finish(), ragged, out, lse, workspace)


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """An output that is NaN until written."""
    return torch.full_like(like, math.nan)


def poisoned_workspace(shape: Shape, *, rows: int = 0, kv_len: int = 0, beams: int = 0) -> Workspace:
    """A workspace whose contents would spoil any result that read them before writing."""
    workspace = Workspace.allocate(
        device=torch.get_default_device(), max_rows=rows, max_kv_len=kv_len, max_beam_tokens=beams,
        q_heads=shape.q_heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
    )  # fmt: skip
    for partials in (workspace.decode, workspace.short, workspace.beam):
        partials.out.fill_(math.nan)
        partials.lse.fill_(math.nan)
        partials.count.fill_(2**20)
    return workspace


def same_dtype_attention(case: Case, window: int | None) -> torch.Tensor:
    """torch's own attention in the activations' dtype on the (dequantised) keys, row by row; NaN for unused tokens."""
    out = poisoned(case.q)
    starts = case.rows.query_start.tolist()
    for row, kv_len in enumerate(case.rows.kv_len.tolist()):
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        slots = reference.row_slots(case.rows.page_table[row], kv_len, case.kv.page_size)
        k, v = (x.to(case.q.dtype).transpose(0, 1) for x in reference.gather_slots(case.kv, slots))
        distance = torch.arange(kv_len - (last - first), kv_len)[:, None] - torch.arange(kv_len)[None, :]
        mask = (distance >= 0) & (distance < (kv_len + 1 if window is None else window))
        attended = torch.nn.functional.scaled_dot_product_attention(
            case.q[first:last].transpose(0, 1), k, v, attn_mask=mask, enable_gqa=True
        )
        out[first:last] = attended.transpose(0, 1)
    return out


def same_dtype_beams(case: BeamCase, window: int | None) -> torch.Tensor:
    """As `same_dtype_attention`, beam by beam over its prompt and its own path; NaN for tokens of no beam."""
    out = poisoned(case.q)
    beams, page_size = case.beams, case.kv.page_size
    starts, widths = beams.query_start.tolist(), beams.width.tolist()
    for group, (prompt_len, step) in enumerate(zip(beams.prompt_len.tolist(), beams.step.tolist(), strict=True)):
        prompt = reference.row_slots(beams.page_table[group], prompt_len, page_size)
        for beam in range(widths[group]):
            slots = torch.cat((prompt, torch.tensor(reference.beam_path(beams, group, beam, step))))
            k, v = (x.to(case.q.dtype) for x in reference.gather_slots(case.kv, slots[-window if window else 0 :]))
            token = starts[group] + beam
            out[token] = torch.nn.functional.scaled_dot_product_attention(
                case.q[token][:, None], k.transpose(0, 1), v.transpose(0, 1), enable_gqa=True
            )[:, 0]
    return out


def check_beams(case: BeamCase, window: int | None = None) -> None:
    """Compare `case.out` with the reference on the beams' tokens; no other may have been written."""
    expected = reference.beam_attention(case.q, case.kv, case.beams, window=window)
    owned = case.owned
    assert torch.equal(~expected[..., 0, 0].isnan(), owned)
    assert_close(case.out[owned], expected[owned], same_dtype_beams(case, window)[owned])
    assert case.out[~owned].isnan().all(), "a token of no beam was written"


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, same_dtype: torch.Tensor, *, floor: float = 2e-6
) -> None:
    """Largest error against fp32 at most 3 times torch's in the same dtype (or `floor`, for fp32 itself)."""
    if not actual.numel():
        return
    assert torch.isfinite(actual).all(), "an output was not written, or poison reached it"
    error = (actual.float() - expected).abs().max().item()
    allowed = max(3.0 * (same_dtype.float() - expected).abs().max().item(), floor)
    assert error <= allowed, f"error {error:.3g} against fp32, allowed {allowed:.3g}"


def check_attention(
    case: Case, *, window: int | None = None, mask: torch.Tensor | None = None, check_lse: bool = True
) -> None:
    """Compare `case.out` and `case.lse` with the reference on the tokens of `mask` (all of them if None)."""
    expected, expected_lse = reference.paged_attention(case.q, case.kv, case.rows, window=window)
    tokens = torch.arange(len(case.q)) < case.tokens
    selected = tokens if mask is None else tokens & mask
    if selected.any():
        same_dtype = same_dtype_attention(case, window)
        assert_close(case.out[selected], expected[selected], same_dtype[selected])
        if check_lse:
            torch.testing.assert_close(case.lse[selected], expected_lse[selected], rtol=0, atol=1e-3)
    assert case.out[~selected].isnan().all(), "a token outside the rows was written"
    if check_lse:
        assert case.lse[~selected].isnan().all(), "a log-sum-exp outside the rows was written"


def make_forks(case: Case, hidden: float) -> tuple[ForkRows, list[torch.Tensor]]:
    """Rows of `case` with new tokens, each of which reads the keys up to it but for a share of those before, at random;
    a token's position is at most where it is kept. Also what each row's tokens read, bool [new, kv_len]."""
    starts, lengths = case.rows.query_start.tolist(), case.rows.kv_len.tolist()
    rows = [(row, first, last - first) for row, (first, last) in enumerate(pairwise(starts)) if last > first]
    most, longest = max(new for _, _, new in rows) + 1, max(lengths)
    position = torch.full((len(rows), most), -(2**30), dtype=torch.int32)
    words = -(-longest // WORD_BITS) + 1
    readable = torch.full((len(rows), most, words), -1, dtype=torch.int32)
    read = []
    for index, (row, _, new) in enumerate(rows):
        kept_at = torch.arange(lengths[row] - new, lengths[row])
        position[index, :new] = kept_at - torch.randint(0, 3, (new,))
        seen = (torch.arange(lengths[row]) <= kept_at[:, None]) & (torch.rand(new, lengths[row]) >= hidden)
        readable[index, :new] = torch.from_numpy(packed_bits(seen.cpu().numpy(), words))
        read.append(seen)
    forks = ForkRows(
        page_table=case.rows.page_table[[row for row, _, _ in rows]],
        kv_len=case.rows.kv_len[[row for row, _, _ in rows]],
        first_token=int32([first for _, first, _ in rows]),
        new_tokens=int32([new for _, _, new in rows]),
        position=position,
        readable=readable,
    )
    return forks, read


def check_forks(case: Case, forks: ForkRows, read: Sequence[torch.Tensor], window: int | None = None) -> None:
    """Against the reference, token for token; no other may have been written."""
    owned = torch.zeros(len(case.q), dtype=torch.bool)
    expected, same_dtype = torch.full_like(case.q, torch.nan, dtype=torch.float32), poisoned(case.q)
    for index, seen in enumerate(read):
        first, new = int(forks.first_token[index]), len(seen)
        part = slice(first, first + new)
        slots = reference.row_slots(forks.page_table[index], int(forks.kv_len[index]), case.shape.page_size)
        position = forks.position[index, :new]
        expected[part] = reference.fork_attention(case.q[part], case.kv, slots, seen, position, window=window)
        if window is not None:
            seen = seen & (torch.arange(seen.shape[1]) > position[:, None] - window)
        keys, values = (x.to(case.q.dtype).transpose(0, 1) for x in reference.gather_slots(case.kv, slots))
        attended = torch.nn.functional.scaled_dot_product_attention(
            case.q[part].transpose(0, 1), keys, values, attn_mask=seen, enable_gqa=True
        )
        same_dtype[part] = attended.transpose(0, 1).nan_to_num(0.0)
        owned[part] = True
    assert_close(case.out[owned], expected[owned], same_dtype[owned])
    assert case.out[~owned].isnan().all(), "a token of no fork was written"


@dataclass(frozen=True)
class BeamCase:
    """One step of several groups of beams."""

    shape: Shape
    q: torch.Tensor
    kv: PagedKv
    beams: BeamGroups
    out: torch.Tensor
    workspace: Workspace

    @property
    def owned(self) -> torch.Tensor:
        """bool [tokens]: the tokens that belong to a beam."""
        owned = torch.zeros(len(self.q), dtype=torch.bool)
        for start, width in zip(self.beams.query_start.tolist(), self.beams.width.tolist(), strict=False):
            owned[start : start + width] = True
        return owned


def make_beam_case(
    shape: Shape, groups: Sequence[tuple[int, int, int]], *, max_steps: int = 3, spare: int = 1, first_token: int = 2
) -> BeamCase:
    """Groups of (prompt_len, width, step), each with `spare` unused beams behind it and absurd unused table entries."""
    max_width = max(width for _, width, _ in groups) + 1
    own = sum(width * (step + 1) for _, width, step in groups)
    pool = Pool(shape, own + sum(-(-prompt // shape.page_size) for prompt, _, _ in groups) + 1)
    pages = [pool.take(prompt) for prompt, _, _ in groups]
    own_slots = torch.full((len(groups), max_steps, max_width), 2**60, dtype=torch.int64)
    parents = torch.full((len(groups), max_steps, max_width), NEVER_A_PAGE, dtype=torch.int32)
    for index, (_, width, step) in enumerate(groups):
        for level in range(step + 1):
            for beam in range(width):
                own_slots[index, level, beam] = pool.take_slot()
                if level:
                    parents[index, level, beam] = int(torch.randint(width, ()))
    starts = prefix_sums([width + spare for _, width, _ in groups]) + first_token
    tokens = int(starts[-1])
    q = torch.randn(tokens, shape.q_heads, shape.head_dim).to(shape.dtype)
    beams = BeamGroups(
        page_table=page_table(pages),
        prompt_len=int32([prompt for prompt, _, _ in groups]),
        query_start=starts.to(torch.int32),
        width=int32([width for _, width, _ in groups]),
        step=int32([step for _, _, step in groups]),
        own_slots=own_slots,
        parents=parents,
        max_prompt_len=max(prompt for prompt, _, _ in groups),
    )
    workspace = poisoned_workspace(shape, beams=tokens)
    return BeamCase(shape, q, pool.finish(), beams, poisoned(q), workspace)
