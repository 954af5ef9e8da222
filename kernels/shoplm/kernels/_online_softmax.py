# mypy: allow-untyped-decorators
"""Device helpers shared by the attention kernels: paged addressing and the online softmax in base 2.

The recurrence is that of FlashAttention-2 (Dao 2023, algorithm 1). A score is `s = (q . k) * score_scale` with
`score_scale = softmax_scale * log2(e)`, so that every exponential is `exp2` and every running maximum and log-sum-exp
is in base 2. Each attention row keeps three numbers, all fp32: the running maximum `row_max`, the running sum
`row_sum = sum exp2(s - row_max)` and the unnormalised output `acc = sum exp2(s - row_max) * v`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_rows(
    pages_ptr: tl.tensor,
    keys: tl.tensor,
    in_range: tl.tensor,
    first_key: tl.tensor,
    kv_head: tl.tensor,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Row index in the pool viewed as [pages * kv_heads * page_size, head_dim] of each key of one tile.

    `keys` = first_key + [0, BLOCK_N), `first_key` a multiple of BLOCK_N. In a masked tile the page table is not read
    where `in_range` is false: entries past a row's length are arbitrary.
    """
    if PAGE_SIZE >= BLOCK_N:
        # The whole tile lies in one page: one scalar look-up, and consecutive addresses.
        page = tl.load(pages_ptr + first_key // PAGE_SIZE)
        base = (page * KV_HEADS + kv_head) * PAGE_SIZE + first_key % PAGE_SIZE
        rows = base + tl.arange(0, BLOCK_N)
    else:
        if MASKED:
            pages = tl.load(pages_ptr + keys // PAGE_SIZE, mask=in_range, other=0)
        else:
            pages = tl.load(pages_ptr + keys // PAGE_SIZE)
        rows = (pages * KV_HEADS + kv_head) * PAGE_SIZE + keys % PAGE_SIZE
    return rows


@triton.jit
def load_rows(
    base_ptr: tl.tensor,
    rows: tl.tensor,
    in_range: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Load rows of a [*, HEAD_DIM] matrix as [rows, HEAD_DIM_PADDED]; padding and masked rows read as 0."""
    dims = tl.arange(0, HEAD_DIM_PADDED)
    pointers = base_ptr + rows.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    if HEAD_DIM != HEAD_DIM_PADDED:
        in_head = dims[None, :] < HEAD_DIM
        return tl.load(pointers, mask=in_range[:, None] & in_head if MASKED else in_head, other=0.0)
    return tl.load(pointers, mask=in_range[:, None], other=0.0) if MASKED else tl.load(pointers)


@triton.jit
def load_scales(scale_ptr: tl.tensor, rows: tl.tensor, in_range: tl.tensor, MASKED: tl.constexpr) -> tl.tensor:
    """fp32 scales [rows] of quantised keys or values; masked rows read as 0."""
    scales = tl.load(scale_ptr + rows, mask=in_range, other=0.0) if MASKED else tl.load(scale_ptr + rows)
    return scales.to(tl.float32)


@triton.jit
def attend_tiles(
    q: tl.tensor,
    acc: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    kv_head: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    key_end: tl.tensor,
    query_position: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
    readable_ptrs: tl.tensor = None,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Fold the keys [start, end) into the online softmax, one tile of BLOCK_N at a time.

    `start` is a multiple of BLOCK_N. In a masked run, keys at or past `key_end`, after `query_position` [M] (causal)
    or more than `window - 1` before it are left out; an unmasked run asserts that every row sees every key.
    `readable_ptrs` [M] point to words of BLOCK_N = 32 bits, one bit for each key from 0 on, which say what a row reads
    instead of all up to its position.
    """
    for first_key in range(start, end, BLOCK_N):
        first_key = tl.multiple_of(first_key, BLOCK_N)
        keys = first_key + tl.arange(0, BLOCK_N)
        in_range = keys < key_end
        rows = key_rows(pages_ptr, keys, in_range, first_key, kv_head, KV_HEADS, PAGE_SIZE, BLOCK_N, MASKED)
        k = load_rows(k_ptr, rows, in_range, HEAD_DIM, HEAD_DIM_PADDED, MASKED)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if QUANTISED:
            # One scale per (token, head): exact on the column of scores, after the product.
            scores = scores * load_scales(k_scale_ptr, rows, in_range, MASKED)[None, :]
        if MASKED:
            if readable_ptrs is None:
                visible = in_range[None, :] & (keys[None, :] <= query_position[:, None])
            else:
                words = tl.load(readable_ptrs + first_key // BLOCK_N)[:, None]
                visible = in_range[None, :] & (((words >> tl.arange(0, BLOCK_N)[None, :]) & 1) != 0)
            if HAS_WINDOW:
                visible = visible & (keys[None, :] > query_position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        tile_max = tl.maximum(row_max, tl.max(scores, 1) * score_scale)
        # A row that has seen no key yet keeps -inf; subtracting it would give NaN.
        shift = tl.where(tile_max == float("-inf"), 0.0, tile_max) if MASKED else tile_max
        weights = tl.exp2(scores * score_scale - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        v = load_rows(v_ptr, rows, in_range, HEAD_DIM, HEAD_DIM_PADDED, MASKED)
        if QUANTISED:
            # Scaling V, not the weights: weight * scale would fall into fp16's subnormals.
            v = (v.to(tl.float32) * load_scales(v_scale_ptr, rows, in_range, MASKED)[:, None]).to(q.dtype)
        else:
            v = v.to(q.dtype)
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision="ieee")
        row_max = tile_max
    return acc, row_max, row_sum


@triton.jit
def attend_range(
    q: tl.tensor,
    acc: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scale_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    pages_ptr: tl.tensor,
    kv_head: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first_position: tl.tensor,
    query_position: tl.tensor,
    window: tl.tensor,
    score_scale: tl.tensor,
    KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    QUANTISED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Fold the keys [start, end) into the softmax: an unmasked part and the masked diagonal.

    `first_position` is the position of the tile's first query: keys up to it need no mask, since every query sees them.
    With a window every tile is masked: its range is short, and a third copy of the loop makes registers spill.
    `start` is a multiple of BLOCK_N.
    """
    masked_start = start
    if not HAS_WINDOW:
        masked_start = tl.maximum(start, tl.minimum(end, first_position + 1) // BLOCK_N * BLOCK_N)
        acc, row_max, row_sum = attend_tiles(
            q, acc, row_max, row_sum, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, pages_ptr, kv_head, start,
            masked_start, end, query_position, window, score_scale, KV_HEADS, PAGE_SIZE, HEAD_DIM,
            HEAD_DIM_PADDED, BLOCK_N, False, HAS_WINDOW, QUANTISED,
        )  # fmt: skip
    acc, row_max, row_sum = attend_tiles(
        q, acc, row_max, row_sum, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, pages_ptr, kv_head, masked_start,
        end, end, query_position, window, score_scale, KV_HEADS, PAGE_SIZE, HEAD_DIM,
        HEAD_DIM_PADDED, BLOCK_N, True, HAS_WINDOW, QUANTISED,
    )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def owning_row(
    query_start_ptr: tl.tensor,
    rows: tl.tensor,
    slot: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """The row that owns tile slot `slot`, or -1: rows are found by counting, since their first slots never decrease.

    Row r owns the slots from `first_tile_slot` on, which is enough for its tiles whatever the rows before it.
    """
    row = tl.full([], -1, tl.int32)
    for first_row in range(0, rows, 128):
        candidates = first_row + tl.arange(0, 128)
        exists = candidates < rows
        start = tl.load(query_start_ptr + candidates, mask=exists, other=0)
        first_slot = first_tile_slot(start, candidates, GROUP, BLOCK_M)
        row += tl.sum((exists & (first_slot <= slot)).to(tl.int32), 0)
    return row


@triton.jit
def first_tile_slot(first_token: tl.tensor, row: tl.tensor, GROUP: tl.constexpr, BLOCK_M: tl.constexpr) -> tl.tensor:
    """First tile slot of a row: floor(a / b) + ceil(n / b) <= floor((a + n) / b) + 1, hence one spare per row."""
    return first_token * GROUP // BLOCK_M + row


@triton.jit
def split_plan(
    first_position: tl.tensor,
    key_end: tl.tensor,
    window: tl.tensor,
    SPLIT_TOKENS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """First key, keys per split and number of splits of one row: a function of this row alone.

    Splits are SPLIT_TOKENS long (a multiple of BLOCK_N). With MAX_SPLITS > 0 they grow so that there are at most that
    many, which bounds the workspace.
    """
    start = 0
    if HAS_WINDOW:
        start = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    split_tokens = SPLIT_TOKENS
    if MAX_SPLITS > 0:
        even = tl.cdiv(tl.cdiv(key_end - start, MAX_SPLITS), BLOCK_N) * BLOCK_N
        split_tokens = tl.maximum(even, SPLIT_TOKENS)
    return start, split_tokens, tl.cdiv(key_end - start, split_tokens)


@triton.jit
def load_packed_queries(
    q_ptr: tl.tensor,
    first_token: tl.tensor,
    packed: tl.tensor,
    in_tile: tl.tensor,
    kv_head: tl.tensor,
    q_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
) -> tl.tensor:
    """Load packed query rows [M, HEAD_DIM_PADDED]: packed row p is head `p % GROUP` of the token `p // GROUP`.

    `q_stride` counts 16 elements: a run-time number that the compiler still knows to keep vectors aligned.
    """
    dims = tl.arange(0, HEAD_DIM_PADDED)
    token = (first_token + packed // GROUP).to(tl.int64)
    head = kv_head * GROUP + packed % GROUP
    pointers = q_ptr + (token * (q_stride * 16) + head * HEAD_DIM)[:, None] + dims[None, :]
    mask = in_tile[:, None]
    if HEAD_DIM != HEAD_DIM_PADDED:
        mask = mask & (dims[None, :] < HEAD_DIM)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def normalise(acc: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Output rows and base-2 log-sum-exp; a row that saw no key gives 0 and -inf."""
    empty = row_sum == 0.0
    safe_sum = tl.where(empty, 1.0, row_sum)
    lse = tl.where(empty, float("-inf"), row_max + tl.log2(safe_sum))
    return acc / safe_sum[:, None], lse
