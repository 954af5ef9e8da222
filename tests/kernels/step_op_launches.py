"""Run the element-wise, sampling and beam ops through Triton's real launcher without a GPU; see `launch_recorder.py`.

Run as a script, in a process that does not interpret. Prints one JSON object; `test_step_op_launches.py` asserts on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from launch_recorder import ARCH, Launch, OpRecorder, Sm90Target, described, recorded
from shoplm.kernels import beam_step as beam_step_op
from shoplm.kernels import kv_write as kv_write_op
from shoplm.kernels import norm as norm_op
from shoplm.kernels import quantise_rows as quantise_rows_op
from shoplm.kernels import sample as sample_op
from shoplm.kernels import swiglu as swiglu_op
from shoplm.kernels import weight_only as weight_only_op
from shoplm.kernels.aot import AotCell
from shoplm.kernels.beam_step_types import BeamBounds, BeamSelection, BeamWorkspace, TrieTables
from shoplm.kernels.inputs import PagedKv

BF16 = torch.bfloat16
Call = Callable[[], object]


def flat_int(values: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    """A slice of a longer buffer: at an odd offset it is not aligned to 16 bytes."""
    return torch.zeros(values + offset, dtype=dtype)[offset:]


def norm_call(tokens: int, hidden: int, residual: bool) -> Call:
    x, out, other = (torch.zeros(tokens, hidden, dtype=BF16) for _ in range(3))
    weight = torch.ones(hidden, dtype=BF16)
    if residual:
        return lambda: norm_op.add_rms_norm(x, other, weight, 1e-6, out=out)
    return lambda: norm_op.rms_norm(x, weight, 1e-5, out=out)


def swiglu_call(tokens: int, features: int) -> Call:
    gate_up, out = torch.zeros(tokens, 2 * features, dtype=BF16), torch.zeros(tokens, features, dtype=BF16)
    return lambda: swiglu_op.swiglu(gate_up, out=out)


def weight_only_call(rows: int, outputs: int, inputs: int, bits: int) -> Call:
    weight = weight_only_op.quantise(torch.zeros(outputs, inputs), bits)
    x, out = torch.zeros(rows, inputs, dtype=BF16), torch.zeros(rows, outputs, dtype=BF16)
    return lambda: weight_only_op.weight_only(x, weight, out=out)


def unpack_call(outputs: int, inputs: int, bits: int) -> Call:
    weight = weight_only_op.quantise(torch.zeros(outputs, inputs), bits)
    out = torch.zeros(outputs, inputs, dtype=BF16)
    return lambda: weight_only_op.unpack(weight, BF16, out=out)


def quantise_rows_call(rows: int, columns: int) -> Call:
    x, values = torch.zeros(rows, columns, dtype=BF16), torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.zeros(rows, 1)
    return lambda: quantise_rows_op.quantise_rows(x, values=values, scale=scale)


def kv_write_call(tokens: int, head_dim: int, cache: torch.dtype, norm: bool, table: bool, offset: int = 0) -> Call:
    fused = torch.zeros(tokens, 32, head_dim, dtype=BF16)
    shape = (2, 8, 64, head_dim)
    scales = [torch.zeros(shape[:3]) for _ in range(2)] if cache != BF16 else [None, None]
    kv = PagedKv(torch.zeros(shape, dtype=cache), torch.zeros(shape, dtype=cache), *scales)
    positions, slots = flat_int(tokens, torch.int32, offset), flat_int(tokens, torch.int64, offset)
    keywords: dict[str, Any] = {"inv_freq": torch.zeros(head_dim // 2)}
    if table:
        keywords = {name: torch.zeros(4096, head_dim // 2) for name in ("cos", "sin")}
    if norm:
        keywords |= {name: torch.ones(head_dim, dtype=BF16) for name in ("q_norm_weight", "k_norm_weight")}
    q, k, v = fused[:, :16], fused[:, 16:24], fused[:, 24:]
    return lambda: kv_write_op.kv_write(q, k, v, positions, slots, kv, **keywords)


def trie_of(children: int, per_node: int) -> TrieTables:
    """A level of `children` / `per_node` nodes."""
    start = torch.arange(0, children + 1, per_node, dtype=torch.int32)
    item = torch.arange(children, dtype=torch.int32)
    return TrieTables(start, item % per_node, item, item + 1, per_node, per_node, children)


def beam_call(
    trie: TrieTables, workspace: BeamWorkspace, groups: int, max_live: int, select: int, rows: int, offset: int = 0
) -> Call:
    logits = torch.zeros(1, trie.columns, dtype=BF16).expand(rows, trie.columns)
    indices = [flat_int(groups, torch.int32, offset) for _ in range(4)]
    nodes = torch.zeros(groups, max_live, dtype=torch.int32)
    scores = torch.zeros(groups, max_live)
    allowed = torch.zeros(1, trie.items + 1, dtype=torch.int32)
    out = BeamSelection.allocate(groups, select, "cpu")
    first_row, width, wanted, filter_row = indices
    flat = trie.child_start.shape[0] == 2  # its level is the last: the items' other terms are added
    bonus: dict[str, Any] = {"bonus": torch.zeros(1, trie.items), "bonus_row": filter_row} if flat else {}
    return lambda: beam_step_op.beam_step(
        logits, first_row, trie, nodes, scores, width, wanted, max_select=select, allowed_cumsum=allowed,
        filter_row=filter_row, workspace=workspace, out=out, **bonus,
    )  # fmt: skip


def sample_call(
    rows: int, vocab: int, dtype: torch.dtype, workspace: sample_op.SampleWorkspace, offset: int = 0
) -> Call:
    logits = torch.zeros(rows, vocab, dtype=dtype)
    temperature, top_p = torch.zeros(rows + offset)[offset:], torch.zeros(rows + offset)[offset:]
    top_k, seed = flat_int(rows, torch.int32, offset), flat_int(rows, torch.int64, offset)
    position, out = flat_int(rows, torch.int64, offset), flat_int(rows, torch.int64, offset)
    return lambda: sample_op.sample(
        logits, temperature, top_k, top_p, seed, position, workspace=workspace, out=out
    )  # fmt: skip


def steps() -> dict[str, Any]:
    """Specialisations and torch operators of steps that follow a first one with other token and group counts."""
    trie = trie_of(65_536, 256)
    workspace = BeamWorkspace.allocate(BeamBounds.of(trie, 9, 256, 256), "cpu")
    sampling = sample_op.SampleWorkspace.allocate(40, 49_152, "cpu")

    def step(tokens: int, groups: int, offset: int) -> list[Call]:
        return [
            norm_call(tokens, 576, True),
            norm_call(tokens, 576, False),
            swiglu_call(tokens, 1536),
            *(weight_only_call(rows, 576, 1536, bits) for bits in (8, 4) for rows in (min(tokens, 16), tokens + 16)),
            *(unpack_call(576, 1536, bits) for bits in (8, 4)),
            quantise_rows_call(tokens, 1536),
            kv_write_call(tokens, 64, BF16, True, True, offset),
            kv_write_call(tokens, 64, torch.int8, False, False, offset),
            beam_call(trie, workspace, groups, 256, 256, tokens, offset),
            sample_call(min(tokens, 40), 49_152, BF16, sampling, offset),
        ]

    first, others = step(16, 8, 0), [call for args in ((1, 1, 1), (17, 3, 3), (640, 9, 0)) for call in step(*args)]
    with recorded() as before:
        for call in first:
            call()
    with recorded() as after, OpRecorder() as operators:
        for call in others:
            call()
    return {
        "first": sorted(launch.name for launch in before.values()),
        "new": sorted(launch.name for key, launch in after.items() if key not in before),
        "operators": operators.names,
    }


def cell_launches() -> list[Launch]:
    """What the public ops launch for the shapes that the budget cells name."""
    flat, deep = trie_of(1_000_000, 1_000_000), trie_of(65_536, 256)
    calls = [norm_call(4, hidden, residual) for hidden in (576, 2048, 3584) for residual in (True, False)]
    calls += [swiglu_call(4, features) for features in (1536, 18_944)]
    calls += [weight_only_call(rows, 4096, 2048, bits) for rows in (4, 40) for bits in (8, 4)]
    calls += [unpack_call(4096, 2048, bits) for bits in (8, 4)]
    calls += [quantise_rows_call(4, columns) for columns in (2048, 6144, 18_944)]
    for head_dim in (64, 96, 128, 256):
        for cache in (BF16, torch.int8, torch.float8_e4m3fn):
            calls += [
                kv_write_call(4, head_dim, cache, norm, table) for norm in (True, False) for table in (True, False)
            ]
    for trie, max_live in ((flat, 1), (deep, 256)):
        workspace = BeamWorkspace.allocate(BeamBounds.of(trie, 8, max_live, 256), "cpu")
        calls.append(beam_call(trie, workspace, 8, max_live, 256, 8))
    for vocab, dtype in ((49_152, BF16), (151_936, BF16), (49_152, torch.float32)):
        calls.append(sample_call(4, vocab, dtype, sample_op.SampleWorkspace.allocate(4, vocab, "cpu")))
    with recorded() as launches:
        for call in calls:
            call()
    return list(launches.values())


def cell_mismatches() -> list[str]:
    """Budget cells that no launch compiles: each would measure a kernel that never runs."""
    launched = {
        described(launch.name, launch.signature, launch.constants, launch.aligned, launch.num_warps, launch.num_stages)
        for launch in cell_launches()
    }
    cells: list[AotCell] = []
    for module in (norm_op, swiglu_op, weight_only_op, quantise_rows_op, kv_write_op, beam_step_op, sample_op):
        cells += module.aot_cells(ARCH)
    return [
        cell.name
        for cell in cells
        if described(
            str(cell.kernel.__name__), cell.signature, cell.constexprs, cell.attrs, cell.num_warps, cell.num_stages
        )
        not in launched
    ]


def main() -> None:
    """Record everything and print it."""
    triton.runtime.driver.set_active(Sm90Target())
    print(json.dumps({"steps": steps(), "cell_mismatches": cell_mismatches()}))  # noqa: T201


if __name__ == "__main__":
    main()
