"""fp32 torch versions of the element-wise, sampling and beam ops: the specification that kernels are tested against.

They take the kernels' tensors and give the kernels' results on any device, rounding only where a result is stored;
the CPU backend runs them. `reference.py` holds the attention ops.
"""

from __future__ import annotations

import torch
from shoplm.kernels.beam_step_types import BeamSelection, TrieTables
from shoplm.kernels.inputs import PagedKv

E4M3_MAX = 448.0  # largest finite float8_e4m3fn
SMALLEST_SCALE = 1e-12  # of a row of `quantise_rows`: one of zeros stores zeros
PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; [..., n] of `x`'s dtype."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (scaled * weight.float()).to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`residual += x` in place (rounded to its dtype), then `rms_norm` of it."""
    residual.copy_(residual.float() + x.float())
    return rms_norm(residual, weight, eps)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of [T, 2 * features] -> [T, features]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-rotated RoPE of x [T, heads, head_dim] fp32 by per-token cos, sin [T, head_dim / 2] fp32."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def quantise_heads(
    x: torch.Tensor, dtype: torch.dtype, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, heads, head_dim] fp32 as int8 or float8_e4m3fn with one scale per (token, head).

    Returns:
        (stored [T, heads, head_dim], scale [T, heads] of `scale_dtype`), x ~ stored * scale.
    """
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = (x.abs().amax(dim=-1) / limit).to(scale_dtype)
    inverse = 1.0 / torch.where(scale > 0, scale.float(), 1.0)[..., None]
    scaled = (x * inverse).clamp(-limit, limit)
    return (torch.floor(scaled + 0.5) if dtype == torch.int8 else scaled).to(dtype), scale


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, n] as float8_e4m3fn with one fp32 scale per row [T, 1]: x ~ stored * scale."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    return (wide / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv: PagedKv,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> torch.Tensor:
    """Arguments as `shoplm.kernels.kv_write.kv_write`; returns the rotated queries and leaves `q` as it was."""
    if inv_freq is not None:
        angle = positions.float()[:, None] * inv_freq
        token_cos, token_sin = angle.cos(), angle.sin()
    elif cos is not None and sin is not None:
        token_cos, token_sin = cos[positions.long()].float(), sin[positions.long()].float()
    else:
        raise ValueError("the rotation is missing: pass cos and sin, or inv_freq")
    wide_q, wide_k = q.float(), k.float()
    if q_norm_weight is not None and k_norm_weight is not None:
        wide_q = rms_norm(wide_q, q_norm_weight, norm_eps)
        wide_k = rms_norm(wide_k, k_norm_weight, norm_eps)
    written = slot_mapping >= 0
    _scatter(rotate(wide_k, token_cos, token_sin)[written], slot_mapping[written], kv.k, kv.k_scale)
    _scatter(v.float()[written], slot_mapping[written], kv.v, kv.v_scale)
    return rotate(wide_q, token_cos, token_sin).to(q.dtype)


def _scatter(x: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Write x [T, heads, head_dim] fp32 to its slots of cache [pages, heads, page_size, head_dim]."""
    page, offset = slots // cache.shape[2], slots % cache.shape[2]
    if scale is None:
        cache[page, :, offset] = x.to(cache.dtype)
        return
    stored, scales = quantise_heads(x, cache.dtype, scale.dtype)
    # Bytes, because index assignment is not defined for 8-bit floats on every device.
    cache.view(torch.uint8)[page, :, offset] = stored.view(torch.uint8)
    scale[page, :, offset] = scales


def beam_step(
    logits: torch.Tensor,
    first_row: torch.Tensor,
    trie: TrieTables,
    nodes: torch.Tensor,
    scores: torch.Tensor,
    width: torch.Tensor,
    select: torch.Tensor,
    *,
    max_select: int,
    allowed_cumsum: torch.Tensor | None = None,
    filter_row: torch.Tensor | None = None,
    bonus: torch.Tensor | None = None,
    bonus_row: torch.Tensor | None = None,
) -> BeamSelection:
    """Arguments and results as `shoplm.kernels.beam_step.beam_step`."""
    groups = nodes.shape[0]
    device = logits.device
    out = BeamSelection.allocate(groups, max_select, device)
    out.scores.fill_(-torch.inf)
    for tensor in (out.parents, out.nodes, out.codes, out.width):
        tensor.zero_()
    for group in range(groups):
        live = int(width[group])
        node = nodes[group, :live].long()
        start = trie.child_start[node].long()
        count = trie.child_start[node + 1].long() - start
        beam = torch.repeat_interleave(torch.arange(live, device=device), count)
        first = count.cumsum(0) - count
        child = torch.arange(len(beam), device=device) - first[beam] + start[beam]
        logit = logits[int(first_row[group]) + beam, trie.child_code[child].long()].float()
        score = scores[group, beam] + _log_softmax_by_beam(logit, beam, live)
        if bonus is not None and bonus_row is not None:
            score = score + bonus[int(bonus_row[group]), trie.item_lo[child].long()]
        if allowed_cumsum is not None and filter_row is not None:
            before = allowed_cumsum[int(filter_row[group])]
            kept = before[trie.item_hi[child].long()] > before[trie.item_lo[child].long()]
            beam, child, score = beam[kept], child[kept], score[kept]
        best = torch.sort(score, descending=True, stable=True).indices[: min(int(select[group]), max_select)]
        n = len(best)
        out.scores[group, :n] = score[best]
        out.parents[group, :n] = beam[best].int()
        out.nodes[group, :n] = child[best].int()
        out.codes[group, :n] = trie.child_code[child[best]]
        out.width[group] = n
    return out


def _log_softmax_by_beam(logit: torch.Tensor, beam: torch.Tensor, live: int) -> torch.Tensor:
    """log softmax of a flat [candidates] vector within each beam's run of candidates."""
    largest = torch.full((live,), -torch.inf, device=logit.device).scatter_reduce(0, beam, logit, "amax")
    reference = torch.where(largest.isinf(), 0.0, largest)
    total = torch.zeros(live, device=logit.device).scatter_add(0, beam, torch.exp(logit - reference[beam]))
    return torch.where(logit == -torch.inf, -torch.inf, logit - (reference + total.log())[beam])


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors that hold 32-bit words; four words per counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    a, b = _PHILOX_MULTIPLIERS
    for _ in range(PHILOX_ROUNDS):
        high_a, low_a = _wide_product(a, c0)
        high_b, low_b = _wide_product(b, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _wide_product(a: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a * x, both 32 bits, without leaving 63 bits."""
    low, high = a * (x & 0xFFFF), a * (x >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _WORD


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of each (seed, position, token), fp32: int64, scalars or one shape.

    Token t takes word t % 4 of the Philox block with counter (t / 4, position's low word, its high word, 0) and the
    seed as key. With v = (word + 1/2) / 2^32 uniform, E = -log(1 - v) is exponential and -log E is Gumbel: written
    with v near 0 for small E, where the winners of a large vocabulary are, so that they keep 32 bits of resolution.
    """
    counter = (token // 4, position & _WORD, (position >> 32) & _WORD, torch.zeros_like(token))
    words = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)))
    word = words.gather(0, (token % 4)[None])[0]
    v = (word.float() + 0.5) * 2.0**-32
    # Below 2^-6 four terms of the series are exact to fp32, and 1 - v is not. Word 2^32 - 1 would round v to 1.
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0 + v * 0.25)))
    exponential = torch.where(v < 2.0**-6, series, -torch.log(1.0 - v.clamp(max=1.0 - 2.0**-24)))
    return -torch.log(exponential)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Arguments and results as `shoplm.kernels.sample.sample`."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    for row, logit in enumerate(logits.float()):
        degrees = float(temperature[row])
        tokens[row] = _argmax(logit)
        if degrees > 0:
            kept = _nucleus(logit * (1.0 / degrees), int(top_k[row]), float(top_p[row]))
            noise = gumbel_noise(seed[row].long(), position[row].long(), kept)
            tokens[row] = kept[_argmax(logit[kept] * (1.0 / degrees) + noise)]
    return tokens


def _argmax(x: torch.Tensor) -> torch.Tensor:
    """First index of the largest element (torch.argmax does not promise the first)."""
    return (x == x.max()).nonzero()[0, 0]


def _nucleus(scaled: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """Token ids in ascending order that top-k, then top-p over what top-k left, keep; ties go to the lower id."""
    vocab = len(scaled)
    if not 0 < k < vocab and p >= 1.0:
        return torch.arange(vocab, device=scaled.device)
    ranked = torch.sort(scaled, descending=True, stable=True).indices
    ranked = ranked[:k] if 0 < k < vocab else ranked
    if p < 1.0:
        mass = torch.exp(scaled[ranked] - scaled.max())
        before = mass.cumsum(0) - mass
        ranked = ranked[: max(1, int((before < p * mass.sum()).sum()))]
    return ranked.sort().values
