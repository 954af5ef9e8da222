# mypy: allow-untyped-decorators, allow-untyped-calls
"""Run the attention ops through Triton's real launcher without a GPU, and record what it would compile.

Run as a script, in a process that does not interpret. A driver object tells Triton that the device is an sm_90 card;
Triton's own code then binds and specialises the arguments and looks for a compiled kernel, and its compile hook stops
it there. So every distinct specialisation is seen as a compilation, exactly as in a server, and nothing is launched.

Prints one JSON object; `test_attention.py` asserts on it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from attention_cases import BeamCase, Case, Shape, int32, make_beam_case, make_case, make_forks, poisoned_workspace
from shoplm.kernels.aot import AotCell, AttentionShape, attention_shapes
from shoplm.kernels.attention import beam_attention, paged_attention
from shoplm.kernels.beam import beam_cells
from shoplm.kernels.decode import may_walk, split_cell
from shoplm.kernels.forks import aot_cells as forks_cells
from shoplm.kernels.forks import fork_attention
from shoplm.kernels.merge import aot_cells as merge_cells
from shoplm.kernels.prefill import prefill_cell
from shoplm.kernels.span_mass import aot_cells as span_mass_cells
from shoplm.kernels.span_mass import span_mass
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

ARCH = 90


class Sm90Target:
    """The three questions that Triton's launcher asks its driver before it looks for a compiled kernel."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Launch:
    """One specialisation that the launcher asked to compile."""

    name: str
    key: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    num_warps: int
    num_stages: int


@contextmanager
def recorded() -> Iterator[dict[str, Launch]]:
    """Collect the distinct specialisations of a block, by key."""
    launches: dict[str, Launch] = {}

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names = list(compile["signature"])
        constants = {names[path[0]]: value for path, value in compile["constants"].items()}
        divisible = [names[path[0]] for path, attrs in compile["configs"][0].items() if attrs]
        launches[fn.name + str(key)] = Launch(
            fn.name.rsplit(".", 1)[-1], str(key), compile["signature"], constants, divisible, compile["num_warps"],
            compile["num_stages"],
        )  # fmt: skip
        return True  # handled: do not compile, do not launch

    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield launches
    finally:
        triton.knobs.runtime.jit_cache_hook = None


class OpRecorder(TorchDispatchMode):
    """Names of all torch operators that run: an op that allocates, copies or waits for the device is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run_step(case: Case, beam_case: BeamCase, window: int | None) -> None:
    """All attention launches of one mixed step, with spans of two rows explained."""
    paged_attention(
        case.q, case.kv, case.rows, out=case.out, workspace=case.workspace, window=window, lse=case.lse
    )  # fmt: skip
    beam_attention(
        beam_case.q, beam_case.kv, beam_case.beams, out=beam_case.out, workspace=beam_case.workspace, window=window
    )  # fmt: skip


def server_tables(case: Case, kv_len: int) -> Case:
    """The case with the page table and workspace of a server that allows `kv_len` tokens a row."""
    table = torch.zeros(case.rows.rows, -(-kv_len // case.shape.page_size), dtype=torch.int32)
    workspace = poisoned_workspace(case.shape, rows=case.rows.rows, kv_len=kv_len)
    return dataclasses.replace(case, rows=dataclasses.replace(case.rows, page_table=table), workspace=workspace)


def step_inputs(
    shape: Shape, rows: list[tuple[int, int]], groups: list[tuple[int, int, int]], max_width: int
) -> tuple[Case, BeamCase]:
    """A step whose static bounds are those of a server (widest beam group fixed), everything else as given."""
    case = server_tables(make_case(shape, rows, slack=5000), 9000)
    beam_case = make_beam_case(shape, groups)
    beams = beam_case.beams
    size = (beams.groups, beams.max_steps, max_width)
    wide = dataclasses.replace(
        beams, own_slots=torch.zeros(size, dtype=torch.int64), parents=torch.zeros(size, dtype=torch.int32),
        max_prompt_len=5000,
    )  # fmt: skip
    return case, dataclasses.replace(beam_case, beams=wide)


def explain(case: Case, spans: int, window: int | None) -> Callable[[], None]:
    """A span_mass call on row 0 with `spans` spans; its inputs are made here, outside the recorded block."""
    row_ids, start, end = int32([0]), int32([0] * spans)[None], int32([1] * spans)[None]
    out = torch.zeros(1, case.shape.kv_heads, spans)
    return lambda: void(span_mass(case.q, case.kv, case.rows, case.lse, row_ids, start, end, out=out, window=window))


def explain_forks(case: Case, window: int | None) -> Callable[[], None]:
    """A call on all rows with forks; its inputs are made here, outside the recorded block."""
    forks, _ = make_forks(case, 0.5)
    return lambda: void(fork_attention(case.q, case.kv, forks, out=case.out, window=window))


def void(_: object) -> None:
    """Drop a result."""


def second_steps() -> dict[str, Any]:
    """Specialisations and torch operators of steps that follow a first one with other lengths, widths and bounds."""
    shape = Shape(64, 4, 2, 16, torch.bfloat16)
    first = step_inputs(shape, [(1, 16), (5, 64), (64, 128), (1, 1)], [(16, 4, 0), (32, 16, 1)], 32)
    others = [
        step_inputs(shape, [(1, 17), (3, 1), (90, 97), (0, 0), (0, 5), (1, 300), (2, 31)], [(1, 1, 2)], 32),
        step_inputs(shape, [(33, 33)], [(17, 7, 0), (0, 0, 0), (160, 31, 2)], 32),
        step_inputs(shape, [(1, 4000), (16, 4001)], [(999, 3, 1)], 32),
    ]
    explained_first = explain(first[0], 16, None), explain_forks(first[0], None)
    explained = [
        (explain(case, spans, None), explain_forks(case, None))
        for (case, _), spans in zip(others, (1, 3, 17), strict=True)
    ]
    with recorded() as before:
        run_step(first[0], first[1], window=None)
        for explanation in explained_first:
            explanation()
        run_step(first[0], first[1], window=64)
    with recorded() as after, OpRecorder() as operators:
        for (case, beam_case), explanations in zip(others, explained, strict=True):
            run_step(case, beam_case, window=None)
            for explanation in explanations:
                explanation()
            run_step(case, beam_case, window=63)
    return {
        "first": sorted(launch.name for launch in before.values()),
        "new": sorted(launch.name for key, launch in after.items() if key not in before),
        "operators": operators.names,
    }


@triton.jit
def _specialising_kernel(x_ptr: tl.tensor, length: tl.tensor) -> None:
    tl.store(x_ptr, length)


def control() -> dict[str, Any]:
    """What the recorder sees where there is something to see: a counter that is specialised, and an allocation."""
    x = torch.zeros(1, dtype=torch.int32)
    with recorded() as launches, OpRecorder() as operators:
        for length in (1, 16, 17):
            _specialising_kernel[(1,)](x, length)
        torch.empty(1)
    return {"specialisations": len(launches), "operators": operators.names}


def launched_cells(shape: AttentionShape) -> dict[str, Launch]:
    """What the public ops launch for the shape of a budget cell."""
    kv_dtype = shape.kv_dtype if shape.quantised else None
    case_shape = Shape(shape.head_dim, shape.group, shape.kv_heads, shape.page_size, shape.dtype, kv_dtype)
    window = 7 if shape.window else None
    step = make_case(case_shape, [(1, 2), (2, 3), (65, 66)], slack=5000)
    cases = [server_tables(step, kv_len) for kv_len in (4096, 9000)]  # up to 16 splits a row, and more
    case = cases[0]
    wide, narrow = (step_inputs(case_shape, [], [(5, 2, 0)], width)[1] for width in (256, 64 // shape.group))
    with recorded() as launches:
        for each in cases:
            paged_attention(each.q, each.kv, each.rows, out=each.out, workspace=each.workspace, window=window)
        for beam_case in (wide, narrow):
            beam_attention(
                beam_case.q, beam_case.kv, beam_case.beams, out=beam_case.out, workspace=beam_case.workspace,
                window=window,
            )  # fmt: skip
        explain(case, 3, window)()
        explain_forks(case, window)()
    return launches


def described(name: str, signature: Any, constants: Any, aligned: Any, num_warps: int, num_stages: int) -> str:
    """A canonical string of one specialisation."""
    parts = (sorted(signature.items()), sorted((k, repr(v)) for k, v in constants.items()), sorted(aligned))
    return repr((name, *parts, num_warps, num_stages))


def cell_mismatches() -> list[str]:
    """Budget cells that no launch compiles: each would measure a kernel that never runs."""
    mismatches = []
    for shape in attention_shapes(ARCH, full=False):
        launched = {
            described(
                launch.name, launch.signature, launch.constants, launch.aligned, launch.num_warps, launch.num_stages
            )
            for launch in launched_cells(shape).values()
        }
        cells: list[AotCell] = [prefill_cell(shape, ARCH)]
        cells += [split_cell(shape, ARCH, short=short) for short in (False, True)]
        cells += [split_cell(shape, ARCH, short=False, walks=True)] * may_walk(ARCH, shape.head_dim, shape.quantised)
        cells += [cell for width in (256, 64 // shape.group) for cell in beam_cells(shape, ARCH, max_width=width)]
        for op_cells in (merge_cells, forks_cells, span_mass_cells):
            cells += [cell for cell in op_cells(ARCH, full=False) if cell.variant.endswith(shape.variant)]
        mismatches += [
            cell.name
            for cell in cells
            if described(
                str(cell.kernel.__name__), cell.signature, cell.constexprs, cell.attrs, cell.num_warps, cell.num_stages
            )
            not in launched
        ]  # fmt: skip
    return mismatches


def main() -> None:
    """Record everything and print it."""
    triton.runtime.driver.set_active(Sm90Target())
    print(json.dumps({"steps": second_steps(), "control": control(), "cell_mismatches": cell_mismatches()}))  # noqa: T201


if __name__ == "__main__":
    main()
