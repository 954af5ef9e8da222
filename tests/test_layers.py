"""The module map of docs/architecture.md: who may not know whom. Read from the imports' text, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in (ROOT / "server", ROOT / "kernels", ROOT / "training", ROOT / "clients/python")
    for file in (folder / "shoplm").rglob("*.py")
}
_PLAIN = """attribution batch bundle_check cache catalog demo_customers engine features followup grounding history
    kernels model prompt raw_events readout request retrieval scheduler served simulate training vocabulary"""
# What is never loaded with these parts of `shoplm`, nor by what they import. Imports within functions do not count.
WITHOUT = {
    "torch": """api attribution batch bundle bundle_cli cache call_metrics catalog client config demo_customers features
        followup grounding histograms history launchers metrics prompt raw_events request retrieval scheduler serve
        served server simulate vocabulary""",
    "triton": "launchers",
    "numpy": "cache client request scheduler",
    "asyncio": "cache scheduler",
    "grpc": "catalog engine kernels model readout training",
    "shoplm.api": "bundle_check engine model readout simulate training",
    "shoplm.v1": _PLAIN,
    "google": _PLAIN,
}
# Parts that import these others alone, wherever the import stands.
ONLY_IMPORTS = {
    "bench": {"request", "simulate", "v1"},
    "cache": {"lazy_heap"},
    "catalog": {"errors", "request"},
    "client": {"v1"},
    "kernels": set[str](),
    "lazy_heap": set[str](),
    "readout": {"bundle", "catalog", "errors", "history", "request"},
    "request": set[str](),
    "scheduler": {"batch", "cache", "lazy_heap", "request"},
}


def imported(node: ast.AST, *, at_start: bool) -> Iterator[str]:
    """Names of the imports below a node; `at_start`: of those that run when the module is loaded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module is not None and not child.level, "imports have the whole name"
            for name in child.names:
                whole = f"{child.module}.{name.name}"
                yield whole if whole in FILES else child.module
        elif not at_start or not (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
        ):
            yield from imported(child, at_start=at_start)


@cache
def imports(module: str, *, at_start: bool) -> frozenset[str]:
    if module not in FILES:
        return frozenset()
    return frozenset(imported(ast.parse(FILES[module].read_text()), at_start=at_start))


def part(module: str) -> str:
    """`shoplm.api.chat` -> `api`; `torch.nn` -> `torch`."""
    first, *rest = module.split(".")
    return rest[0] if first == "shoplm" and rest else first


def is_of(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def loaded(module: str) -> dict[str, str]:
    """What is loaded with a module, and which module loads it."""
    by: dict[str, str] = {}
    waiting = [module]
    while waiting:
        each = waiting.pop()
        for name in imports(each, at_start=True):
            if name not in by:
                by[name] = each
                waiting.append(name)
    return by


def test_no_two_parts_import_each_other() -> None:
    """Not in functions and not for types, either."""
    graph: dict[str, set[str]] = {}
    for module in FILES:
        others = {part(name) for name in imports(module, at_start=False) if is_of(name, "shoplm")}
        graph.setdefault(part(module), set()).update(others - {part(module)})
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("unknown", WITHOUT)
def test_a_part_never_loads_what_it_may_not_know(unknown: str) -> None:
    parts = set(WITHOUT[unknown].split())
    assert parts <= {part(module) for module in FILES}, "mend the table here and in docs/architecture.md"
    for module in FILES:
        if part(module) in parts:
            for name, by in loaded(module).items():
                assert not is_of(name, unknown), f"{module} may not know {unknown}, and {by} imports {name}"


@pytest.mark.parametrize("name", ONLY_IMPORTS)
def test_a_part_imports_few_others(name: str) -> None:
    for module in FILES:
        if part(module) == name:
            others = {part(each) for each in imports(module, at_start=False) if is_of(each, "shoplm")}
            assert others <= {name, *ONLY_IMPORTS[name]}, module


def test_protobuf_stays_with_who_speaks_it() -> None:
    speaks = {part(module) for module in FILES for name in imports(module, at_start=False) if is_of(name, "shoplm.v1")}
    assert speaks == {"api", "bench", "client", "explain"}
