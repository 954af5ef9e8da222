"""Query-key norm, rotary embedding and the paged KV write, in one pass over the new tokens' projections.

Per head, with `half = head_dim / 2` and angle `a[i] = position * inv_freq[i]`:

    x        = x / sqrt(mean(x^2) + eps) * weight                    only q and k, only with norm weights (Qwen3)
    x'[i]        = x[i] * cos a[i] - x[i + half] * sin a[i]          Su et al. 2021 (RoFormer), in the half-rotated
    x'[i + half] = x[i + half] * cos a[i] + x[i] * sin a[i]          layout of GPT-NeoX and Llama checkpoints

q' goes to `q_out` (or back into `q`), k' and v to their slots of the pool. An INT8 or FP8 (e4m3) pool keeps one scale
per (token, head): `scale = max |x| / 127` or `/ 448`, stored value = x / scale rounded to nearest.

Cost: bound by memory: q is read and written once, k and v are read once and written once in the pool's width. One
program owns a few heads of one token, each thread both members of a rotated pair, so that working in place is safe.
"""

from __future__ import annotations

import torch
import triton
from shoplm.kernels._checks import ACTIVATION_DTYPES, INDEX_DTYPES, check_tensor, leading_stride
from shoplm.kernels._kv_write_kernel import kv_write_kernel
from shoplm.kernels.aot import AotCell, make_cell, pointer
from shoplm.kernels.inputs import PagedKv, check_aligned
from shoplm.kernels.reference_ops import E4M3_MAX
from shoplm.kernels.tile_config import SUPPORTED_HEAD_DIMS

INT8_MAX = 127.0
BLOCK_HEADS = 8  # of a token, in one program


def _tile(head_dim: int) -> tuple[int, int]:
    """(HALF_BLOCK, num_warps): eight elements of each half a thread."""
    half_block = triton.next_power_of_2(head_dim // 2)
    return half_block, half_block * BLOCK_HEADS // 256


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
    q_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise (optional) and rotate q and k, write k and v to the pool.

    The rotation comes from a table (`cos`, `sin`: any RoPE scaling is the table's business) or from `inv_freq`.

    Args:
        q: [T, q_heads, head_dim], fp32, fp16 or bf16; tokens at any stride (a view of the fused QKV product).
        k, v: [T, kv_heads, head_dim], like `q`.
        positions: [T], int32 or int64, position of each token in its sequence, within the table.
        slot_mapping: [T], int64, slot = page * page_size + offset; negative: the token is padding and is not written.
            Two tokens must not share a slot.
        kv: the layer's pool, of `q`'s dtype, int8 or float8_e4m3fn.
        cos, sin: [positions, head_dim / 2], contiguous, fp32, fp16 or bf16.
        inv_freq: [head_dim / 2] fp32, radians per position.
        q_norm_weight, k_norm_weight: [head_dim], `q`'s dtype or fp32; both or neither.
        norm_eps: added to each head's mean square.
        q_out: [T, q_heads, head_dim] of `q`'s dtype; rotated queries. Default: `q` itself, in place.

    Returns:
        `q_out`.

    Raises:
        ValueError, TypeError: a shape, stride, device, dtype or combination that the kernel cannot take.
    """
    q_out = q if q_out is None else q_out
    _check_projections(q, k, v, q_out, positions, slot_mapping)
    _check_rotation(q, cos, sin, inv_freq)
    _check_norm(q, q_norm_weight, k_norm_weight)
    _check_pool(k, kv)
    tokens, q_heads, head_dim = q.shape
    if tokens == 0:
        return q_out
    kv_heads = k.shape[1]
    half_block, num_warps = _tile(head_dim)
    blocks = triton.cdiv(q_heads, BLOCK_HEADS) + triton.cdiv(kv_heads, BLOCK_HEADS)
    kv_write_kernel[(tokens, blocks)](
        q,
        k,
        v,
        q_out,
        cos,
        sin,
        inv_freq,
        positions,
        slot_mapping,
        q_norm_weight,
        k_norm_weight,
        kv.k,
        kv.v,
        kv.k_scale,
        kv.v_scale,
        leading_stride(q),
        leading_stride(k),
        leading_stride(v),
        leading_stride(q_out),
        norm_eps,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        HALF_BLOCK=half_block,
        BLOCK_HEADS=BLOCK_HEADS,
        PAGE_SIZE=kv.page_size,
        HAS_TABLE=cos is not None,
        HAS_NORM=q_norm_weight is not None,
        QUANT_MAX=_quant_max(kv.k.dtype),
        num_warps=num_warps,
    )
    return q_out


def _quant_max(cache_dtype: torch.dtype) -> float | None:
    return {torch.int8: INT8_MAX, torch.float8_e4m3fn: E4M3_MAX}.get(cache_dtype)


def _check_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_out: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    check_tensor("q", q, (None, None, None), ACTIVATION_DTYPES, q.device)
    tokens, q_heads, head_dim = q.shape
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise ValueError(f"q has head_dim {head_dim}, expected one of {SUPPORTED_HEAD_DIMS}")
    check_tensor("k", k, (tokens, None, head_dim), (q.dtype,), q.device)
    kv_heads = k.shape[1]
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"q has {q_heads} heads, expected a multiple of k's {kv_heads}")
    check_tensor("v", v, (tokens, kv_heads, head_dim), (q.dtype,), q.device)
    check_tensor("q_out", q_out, q.shape, (q.dtype,), q.device)
    for name, tensor in (("q", q), ("k", k), ("v", v), ("q_out", q_out)):
        check_aligned(name, tensor)
        if tensor.shape[1] > 1 and tensor.stride(1) != head_dim:
            raise ValueError(f"{name} has head stride {tensor.stride(1)}, expected its head_dim, {head_dim}")
    check_tensor("positions", positions, (tokens,), INDEX_DTYPES, q.device)
    check_tensor("slot_mapping", slot_mapping, (tokens,), (torch.int64,), q.device)


def _check_rotation(
    q: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, inv_freq: torch.Tensor | None
) -> None:
    half = q.shape[2] // 2
    if inv_freq is not None:
        if cos is not None or sin is not None:
            raise ValueError("got both a cos/sin table and inv_freq; pass one of them")
        check_tensor("inv_freq", inv_freq, (half,), (torch.float32,), q.device)
        return
    if cos is None or sin is None:
        raise ValueError("the rotation is missing: pass cos and sin, or inv_freq")
    check_tensor("cos", cos, (None, half), ACTIVATION_DTYPES, q.device, contiguous=True)
    check_tensor("sin", sin, cos.shape, (cos.dtype,), q.device, contiguous=True)


def _check_norm(q: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None) -> None:
    if q_weight is None and k_weight is None:
        return
    if q_weight is None or k_weight is None:
        raise ValueError("got one of q_norm_weight and k_norm_weight; pass both or neither")
    check_tensor("q_norm_weight", q_weight, (q.shape[2],), (q.dtype, torch.float32), q.device)
    check_tensor("k_norm_weight", k_weight, (q.shape[2],), (q_weight.dtype,), q.device)


def _check_pool(k: torch.Tensor, kv: PagedKv) -> None:
    if (kv.kv_heads, kv.head_dim) != k.shape[1:] or kv.k.device != k.device:
        raise ValueError(
            f"kv has {kv.kv_heads} heads of {kv.head_dim} on {kv.k.device}, "
            f"k has {k.shape[1]} of {k.shape[2]} on {k.device}"
        )
    if not kv.quantised and kv.k.dtype != k.dtype:
        raise TypeError(f"kv.k is {kv.k.dtype}, expected {k.dtype} like k, int8 or float8_e4m3fn")
    if kv.k.dtype == torch.float8_e4m3fn and k.is_cuda and torch.cuda.get_device_capability(k.device) < (8, 9):
        raise ValueError("float8_e4m3fn pools need compute capability 8.9 or newer; use an int8 pool on this card")


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Every head_dim, pool dtype and rotation source that `arch` can serve; in full every combination of them."""
    fp8 = [torch.float8_e4m3fn] if arch >= 89 else []
    if full:
        return [
            _cell(arch, head_dim, cache, norm, table)
            for head_dim in SUPPORTED_HEAD_DIMS
            for cache in (torch.bfloat16, torch.int8, *fp8)
            for norm in (False, True)
            for table in (False, True)
        ]
    cases = [
        (64, torch.bfloat16, False, True),
        (96, torch.bfloat16, False, True),
        (128, torch.bfloat16, True, True),
        (256, torch.bfloat16, False, True),
        (128, torch.int8, True, True),
        (128, torch.bfloat16, True, False),
    ]
    cases += [(128, cache, True, True) for cache in fp8]
    return [_cell(arch, *case) for case in cases]


def _cell(arch: int, head_dim: int, cache: torch.dtype, norm: bool, table: bool) -> AotCell:
    half_block, num_warps = _tile(head_dim)
    element = pointer(torch.bfloat16)
    types = {"position_ptr": "*i32", "slot_ptr": "*i64", "k_cache_ptr": pointer(cache), "v_cache_ptr": pointer(cache)}
    types |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_out_ptr", "q_weight_ptr", "k_weight_ptr"), element)
    types |= dict.fromkeys(("cos_ptr", "sin_ptr", "inv_freq_ptr", "k_scale_ptr", "v_scale_ptr"), "*fp32")
    types |= dict.fromkeys(("q_stride", "k_stride", "v_stride", "q_out_stride"), "i32")
    constants: dict[str, object] = {
        "Q_HEADS": 16,
        "KV_HEADS": 8,
        "HALF": head_dim // 2,
        "HALF_BLOCK": half_block,
        "BLOCK_HEADS": BLOCK_HEADS,
        "PAGE_SIZE": 64,
        "HAS_TABLE": table,
        "HAS_NORM": norm,
        "QUANT_MAX": _quant_max(cache),
    }
    absent = ["inv_freq_ptr"] if table else ["cos_ptr", "sin_ptr"]
    absent += [] if norm else ["q_weight_ptr", "k_weight_ptr"]
    absent += [] if _quant_max(cache) else ["k_scale_ptr", "v_scale_ptr"]
    constants |= dict.fromkeys(absent)
    unaligned = {param.name for param in kv_write_kernel.params if param.do_not_specialize}
    parts = [str(cache).removeprefix("torch.").removesuffix("_e4m3fn"), *["qknorm"] * norm, *["inv-freq"] * (not table)]
    return make_cell(
        "kv_write",
        kv_write_kernel,
        types | {"eps": "fp32"},
        constants,
        aligned=tuple(name for name in types if name not in constants and name not in unaligned),
        num_warps=num_warps,
        num_stages=3,
        arch=arch,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        expect_wgmma=False,
        variant="-".join(parts),
    )
