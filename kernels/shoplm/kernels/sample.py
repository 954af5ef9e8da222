"""Sampling of the next token: temperature, top-k, top-p, Gumbel-max; reproducible per (seed, position).

With z = logit / temperature and independent standard Gumbel noise g per token,

    token = argmax over kept tokens of z + g          distributed as softmax(z) over them (Gumbel 1954; Maddison 2014)

Kept are the k best tokens (ties to the lower id), and of these the shortest best-first run whose probability, within
the k, reaches p. Temperature 0 is the argmax of the logits. The noise of a token is a Philox word of (seed, position,
token) alone: the same request gives the same text in any batch, on any device.

Nothing is sorted. `sample_tile_kernel` finds, tile by tile, the winner among all tokens and the softmax's normaliser:
rows without top-k and top-p are done after a merge. For the others `sample_row_kernel` bounds the top k by radix
histograms, then tests the winner against top-p by adding up what ranks before it. A winner that is cut is dropped with
everything that ranks behind it, and the next one is drawn: the first stands with a probability of at least p.

Cost: one pass over the logits by the whole card, at about a hundred instructions a token for the noise; then, in one
program per row with the row in L2, two or three light passes for top-k (four or five for fp32 logits) and one or two
for top-p, and a noisy one where a winner was cut. Two launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from shoplm.kernels._checks import ACTIVATION_DTYPES, INDEX_DTYPES, check_tensor, leading_stride
from shoplm.kernels._sample_kernels import sample_row_kernel, sample_tile_kernel
from shoplm.kernels.aot import AotCell, make_cell, pointer
from shoplm.kernels.inputs import check_aligned

TILE = 4096
TILE_WARPS = 8
BLOCK = 8192  # tokens in flight of a row pass
ROW_WARPS = 16


@dataclass(frozen=True)
class SampleWorkspace:
    """Scratch memory of `sample`: one entry per (row, tile). Allocated once for the most rows of a step."""

    best: torch.Tensor  # fp32 [rows * tiles], largest perturbed score of a tile
    token: torch.Tensor  # int32, its token
    largest: torch.Tensor  # fp32, largest scaled logit of a tile
    total: torch.Tensor  # fp32, sum of exponentials relative to it

    @staticmethod
    def allocate(rows: int, vocab: int, device: torch.device | str) -> SampleWorkspace:
        """Workspace for up to `rows` rows of `vocab` logits."""
        size = rows * triton.cdiv(vocab, TILE)
        fp32 = [torch.empty(size, dtype=torch.float32, device=device) for _ in range(3)]
        return SampleWorkspace(fp32[0], torch.empty(size, dtype=torch.int32, device=device), fp32[1], fp32[2])


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    *,
    workspace: SampleWorkspace | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw one token per row.

    Args:
        logits: [rows, vocab], fp32, fp16 or bf16, rows at any stride; not all -inf in any row.
        temperature: [rows], fp32; 0 = greedy.
        top_k: [rows], int32; below 1, or vocab and above: every token.
        top_p: [rows], fp32, above 0; 1 and above: every token. The best token is always kept.
        seed: [rows], int64, of the request.
        position: [rows], int32 or int64, of the token to be drawn; a (seed, position) pair must not be used twice.
        workspace: scratch memory for at least these rows. Allocated when absent.
        out: [rows], int64. Allocated when absent.

    Returns:
        `out`, token ids.

    Raises:
        ValueError, TypeError: a shape, stride, device or dtype that the kernels cannot take.
    """
    check_tensor("logits", logits, (None, None), ACTIVATION_DTYPES, logits.device)
    check_aligned("logits", logits)
    rows, vocab = logits.shape
    if vocab == 0:
        raise ValueError("logits has 0 columns, expected at least 1")
    for name, tensor, dtypes in (
        ("temperature", temperature, (torch.float32,)),
        ("top_k", top_k, (torch.int32,)),
        ("top_p", top_p, (torch.float32,)),
        ("seed", seed, (torch.int64,)),
        ("position", position, INDEX_DTYPES),
    ):
        check_tensor(name, tensor, (rows,), dtypes, logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    check_tensor("out", out, (rows,), (torch.int64,), logits.device)
    if rows == 0:
        return out
    workspace = SampleWorkspace.allocate(rows, vocab, logits.device) if workspace is None else workspace
    tiles = triton.cdiv(vocab, TILE)
    if workspace.best.device != logits.device or workspace.best.numel() < rows * tiles:
        raise ValueError(
            f"workspace on {workspace.best.device} has room for {workspace.best.numel()} tiles, this step needs "
            f"{rows * tiles} on {logits.device}; allocate it for the most rows of a step"
        )
    _launch(logits, temperature, top_k, top_p, seed, position, workspace, out)
    return out


def _launch(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    workspace: SampleWorkspace,
    out: torch.Tensor,
) -> None:
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, TILE)
    partials = (workspace.best, workspace.token, workspace.largest, workspace.total)
    stride = leading_stride(logits)
    sample_tile_kernel[(tiles, rows)](
        logits, stride, temperature, seed, position, *partials, VOCAB=vocab, TILE=TILE, num_warps=TILE_WARPS
    )
    sample_row_kernel[(rows,)](
        logits,
        stride,
        temperature,
        top_k,
        top_p,
        seed,
        position,
        *partials,
        out,
        VOCAB=vocab,
        TILES=tiles,
        TILES_PADDED=triton.next_power_of_2(tiles),
        BLOCK=BLOCK,
        KEY_BITS=8 * logits.element_size(),
        num_warps=ROW_WARPS,
    )


def aot_cells(arch: int, *, full: bool = False) -> list[AotCell]:
    """Vocabularies of a 135M and a 1.7B model, bf16 logits, and fp32 ones; in full both with every dtype."""
    cells = []
    cases = [(49_152, torch.bfloat16), (151_936, torch.bfloat16), (49_152, torch.float32)]
    if full:
        cases = [(vocab, dtype) for vocab in (49_152, 151_936) for dtype in ACTIVATION_DTYPES]
    for vocab, dtype in cases:
        types = {"logits_ptr": pointer(dtype), "logits_stride": "i32", "seed_ptr": "*i64", "position_ptr": "*i64"}
        types |= dict.fromkeys(("temperature_ptr", "top_p_ptr", "best_ptr", "max_ptr", "sum_ptr"), "*fp32")
        types |= {"top_k_ptr": "*i32", "token_ptr": "*i32", "out_ptr": "*i64"}
        tiles = triton.cdiv(vocab, TILE)
        row = {"TILES": tiles, "TILES_PADDED": triton.next_power_of_2(tiles), "BLOCK": BLOCK}
        row |= {"KEY_BITS": 8 * dtype.itemsize}
        for kernel, constants, num_warps in (
            (sample_tile_kernel, {"TILE": TILE}, TILE_WARPS),
            (sample_row_kernel, row, ROW_WARPS),
        ):
            cells.append(
                make_cell(
                    "sample",
                    kernel,
                    types,
                    constants | {"VOCAB": vocab},
                    aligned=("logits_ptr", "logits_stride"),
                    num_warps=num_warps,
                    num_stages=3,
                    arch=arch,
                    head_dim=0,
                    dtype=dtype,
                    expect_wgmma=False,
                    variant=f"vocab{vocab}",
                )
            )
    return cells
