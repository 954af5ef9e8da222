# mypy: allow-untyped-decorators
"""The two kernels of `sample`; see there for the formula and how they follow one another."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gumbel(seed: tl.tensor, position: tl.tensor, start: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Gumbel noise of tokens start .. start + BLOCK - 1 (start a multiple of 4): one Philox block for four tokens."""
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    zero = counter * 0
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    high = zero + (position >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, counter, low, high, zero)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    v = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # -log(1 - v), with the series where 1 - v would lose the digits that decide; see reference_ops.gumbel_noise.
    series = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    logarithm = -tl.log(1.0 - tl.minimum(v, 0.99999994))
    return -tl.log(tl.where(v < 0.015625, series, logarithm))


@triton.jit
def _token_key(logit: tl.tensor) -> tl.tensor:
    """Unsigned key in a logit's own width (16 or 32 bits, held in uint32) that sorts as the logit; -0.0 as 0.0."""
    if logit.dtype == tl.float32:
        bits = (logit + 0.0).to(tl.uint32, bitcast=True)
        key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    else:
        bits = logit.to(tl.uint16, bitcast=True).to(tl.uint32)
        bits = tl.where(bits == 0x8000, 0, bits)
        key = tl.where((bits >> 15) != 0, bits ^ 0xFFFF, bits | 0x8000)
    return key


@triton.jit
def _first_best(value: tl.tensor, token: tl.tensor, vocab: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(largest value, lowest token that has it)."""
    best = tl.max(value, axis=0)
    return best, tl.min(tl.where(value == best, token, vocab), axis=0)


@triton.jit(
    do_not_specialize=["temperature_ptr", "seed_ptr", "position_ptr", "best_ptr", "token_ptr", "max_ptr", "sum_ptr"]
)
def sample_tile_kernel(
    logits_ptr: tl.tensor,
    logits_stride: tl.tensor,
    temperature_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    best_ptr: tl.tensor,
    token_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Grid (tiles, rows): one tile's winner before any filter, and its part of the softmax."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    source = logits_ptr + row * logits_stride + token
    logit = tl.load(source, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    target = row * tl.num_programs(0) + tile
    if temperature > 0.0:
        scaled = logit * (1.0 / temperature)
        noise = _gumbel(tl.load(seed_ptr + row), tl.load(position_ptr + row).to(tl.int64), tile * TILE, TILE)
        best, winner = _first_best(scaled + noise, token, VOCAB)
        largest = tl.max(scaled, axis=0)
        reference = tl.where(largest == float("-inf"), 0.0, largest)
        tl.store(max_ptr + target, largest)
        tl.store(sum_ptr + target, tl.sum(tl.exp(scaled - reference), axis=0))
    else:
        best, winner = _first_best(logit, token, VOCAB)
    tl.store(best_ptr + target, best)
    tl.store(token_ptr + target, winner)


@triton.jit
def _rank_bound(
    row_ptr: tl.tensor, k: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr, KEY_BITS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(key, token) just past the k-th best: a token is in the top k iff its key is larger, or equal and its id lower.

    The key is found eight bits a pass from histograms, the last token of a tie by counting in id order.
    """
    lane = tl.arange(0, BLOCK)
    digit = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.uint32)
    wanted = k
    for level in tl.static_range(KEY_BITS // 8):
        shift = KEY_BITS - 8 - 8 * level
        counts = tl.zeros([256], tl.int32)
        for start in range(0, VOCAB, BLOCK):
            inside = start + lane < VOCAB
            key = _token_key(tl.load(row_ptr + start + lane, mask=inside, other=float("-inf")))
            if level > 0:
                inside &= (key >> (shift + 8)) == prefix
            counts += tl.histogram(((key >> shift) & 0xFF).to(tl.int32), 256, mask=inside)
        at_least = tl.cumsum(counts, axis=0, reverse=True)
        chosen = tl.max(tl.where(at_least >= wanted, digit, 0), axis=0)
        wanted -= tl.sum(tl.where(digit > chosen, counts, 0), axis=0)
        prefix = (prefix << 8) | chosen.to(tl.uint32)
        all_tied = tl.sum(tl.where(digit == chosen, counts, 0), axis=0)
    bound = tl.full([], VOCAB, tl.int32)
    if wanted < all_tied:
        seen = tl.full([], 0, tl.int32)
        for start in range(0, VOCAB, BLOCK):
            inside = start + lane < VOCAB
            key = _token_key(tl.load(row_ptr + start + lane, mask=inside, other=float("-inf")))
            tied = (inside & (key == prefix)).to(tl.int32)
            count = tl.sum(tied, axis=0)
            if (seen < wanted) & (seen + count >= wanted):
                last = (tied > 0) & (seen + tl.cumsum(tied, axis=0) == wanted)
                bound = tl.min(tl.where(last, start + lane + 1, VOCAB), axis=0)
            seen += count
    return prefix, bound


@triton.jit
def _ranks_before(key: tl.tensor, token: tl.tensor, key_bound: tl.tensor, token_bound: tl.tensor) -> tl.tensor:
    """Whether each token ranks before a bound: larger logit, or the same and a lower id."""
    return (key > key_bound) | ((key == key_bound) & (token < token_bound))


@triton.jit
def _mass_before(
    row_ptr: tl.tensor,
    key_bound: tl.tensor,
    token_bound: tl.tensor,
    inverse_temperature: tl.tensor,
    largest: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Sum of exp(scaled - largest) over the tokens that rank before a bound."""
    lane = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        token = start + lane
        inside = token < VOCAB
        logit = tl.load(row_ptr + token, mask=inside, other=float("-inf"))
        before = inside & _ranks_before(_token_key(logit), token, key_bound, token_bound)
        mass += tl.where(before, tl.exp(logit.to(tl.float32) * inverse_temperature - largest), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _draw_before(
    row_ptr: tl.tensor,
    key_bound: tl.tensor,
    token_bound: tl.tensor,
    inverse_temperature: tl.tensor,
    seed: tl.tensor,
    position: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The Gumbel-max winner among the tokens that rank before a bound; VOCAB where there is none."""
    lane = tl.arange(0, BLOCK)
    best = tl.full([], float("-inf"), tl.float32)
    winner = tl.full([], VOCAB, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        token = start + lane
        inside = token < VOCAB
        logit = tl.load(row_ptr + token, mask=inside, other=float("-inf"))
        before = inside & _ranks_before(_token_key(logit), token, key_bound, token_bound)
        # Few blocks hold any: the noise, a hundred instructions a token, is left out for the others.
        if tl.sum(before.to(tl.int32), axis=0) > 0:
            scaled = logit.to(tl.float32) * inverse_temperature
            value = tl.where(before, scaled + _gumbel(seed, position, start, BLOCK), float("-inf"))
            block_best, block_winner = _first_best(value, tl.where(before, token, VOCAB), VOCAB)
            if block_best > best:
                best = block_best
                winner = block_winner
    return winner


@triton.jit(
    do_not_specialize=[
        "temperature_ptr",
        "top_k_ptr",
        "top_p_ptr",
        "seed_ptr",
        "position_ptr",
        "best_ptr",
        "token_ptr",
        "max_ptr",
        "sum_ptr",
        "out_ptr",
    ]
)
def sample_row_kernel(
    logits_ptr: tl.tensor,
    logits_stride: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    position_ptr: tl.tensor,
    best_ptr: tl.tensor,
    token_ptr: tl.tensor,
    max_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    out_ptr: tl.tensor,
    VOCAB: tl.constexpr,
    TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_BITS: tl.constexpr,
) -> None:
    """Grid (rows): the tiles' overall winner, or, where it falls outside top-k or top-p, the next one inside."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES_PADDED)
    exists = tile < TILES
    partial = row * TILES + tile
    best = tl.load(best_ptr + partial, mask=exists, other=float("-inf"))
    _, token = _first_best(best, tl.load(token_ptr + partial, mask=exists, other=VOCAB), VOCAB)
    token = tl.minimum(token, VOCAB - 1)  # where no logit is a number
    temperature = tl.load(temperature_ptr + row)
    k = tl.load(top_k_ptr + row)
    p = tl.load(top_p_ptr + row)
    cuts_rank = (k > 0) & (k < VOCAB)
    if (temperature > 0.0) & (cuts_rank | (p < 1.0)):
        row_ptr = logits_ptr + row * logits_stride
        seed = tl.load(seed_ptr + row)
        position = tl.load(position_ptr + row).to(tl.int64)
        inverse = 1.0 / temperature
        part_max = tl.load(max_ptr + partial, mask=exists, other=float("-inf"))
        largest = tl.max(part_max, axis=0)
        part_sum = tl.load(sum_ptr + partial, mask=exists, other=0.0)
        total = tl.sum(part_sum * tl.exp(part_max - largest), axis=0)
        if cuts_rank:
            key_bound, token_bound = _rank_bound(row_ptr, k, VOCAB, BLOCK, KEY_BITS)
            key = _token_key(tl.load(row_ptr + token))
            if not _ranks_before(key, token, key_bound, token_bound):
                token = _draw_before(row_ptr, key_bound, token_bound, inverse, seed, position, VOCAB, BLOCK)
            if p < 1.0:
                total = _mass_before(row_ptr, key_bound, token_bound, inverse, largest, VOCAB, BLOCK)
        searching = p < 1.0
        while searching:
            # Gumbel-max over the kept set is the first kept token in the order of perturbed scores. A token that
            # turns out to be cut cuts all behind it in rank too, so the next candidate is the best before it.
            key = _token_key(tl.load(row_ptr + token))
            searching = _mass_before(row_ptr, key, token, inverse, largest, VOCAB, BLOCK) >= p * total
            if searching:
                following = _draw_before(row_ptr, key, token, inverse, seed, position, VOCAB, BLOCK)
                searching = following < VOCAB
                token = tl.where(searching, following, token)
    tl.store(out_ptr + row, tl.minimum(token, VOCAB - 1).to(tl.int64))
