"""Kernel tests run under Triton's interpreter, which must be chosen before Triton is imported: a process of its own.

`pytest tests/kernels` chooses it here. In a wider run without TRITON_INTERPRET=1 this folder is not collected, and the
summary says so: half the tests of a process cannot use the interpreter while the other half does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent
# Test modules are imported one by one (importlib mode); what they share lies beside them.
sys.path.insert(0, str(FOLDER))
OWN_PROCESS = "run them in a process of their own: TRITON_INTERPRET=1 pytest tests/kernels"


def _only_target(config: pytest.Config) -> bool:
    """Whether every target on the command line lies in this folder."""
    targets = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    return bool(targets) and all(target.is_relative_to(FOLDER) for target in targets)


def pytest_configure(config: pytest.Config) -> None:
    """Choose the interpreter if this folder is all that runs and Triton has not been imported yet."""
    if _only_target(config) and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the folder out of a run that does not interpret; `pytest_terminal_summary` tells."""
    return True if os.environ.get("TRITON_INTERPRET") != "1" and collection_path.is_relative_to(FOLDER) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in plain sight that the kernel tests did not run."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        terminalreporter.write_line(f"tests/kernels was NOT collected; {OWN_PROCESS}", red=True)


def _patch_once() -> None:
    """Spare the interpreter's repeated work: it patches Triton's language again for every device function that a kernel
    calls, which finds it patched already and is a quarter of the tests' time. Without effect on other versions."""
    import triton.language  # not above: the choice of interpreting is made when Triton is imported
    from triton.language import core
    from triton.runtime import interpreter

    patch: Any = getattr(interpreter, "_patch_lang", None)
    scope: Any = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:
        return
    patched: set[int] = set()  # the modules that the kernel which runs now has patched

    class Scope(scope):  # type: ignore[misc]
        def restore(self) -> None:
            super().restore()
            patched.clear()

    def patch_once(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values() if value in (triton.language, core)}
        if modules <= patched:
            return Scope()
        patched.update(modules)
        return patch(function)

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_once


@pytest.fixture(scope="session")
def launches_of() -> Callable[[str], dict[str, Any]]:
    """What Triton's launcher would compile, from a script of this folder in a process that does not interpret."""

    def run(script: str) -> dict[str, Any]:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        finished = subprocess.run(
            [sys.executable, str(FOLDER / script)], env=environment, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stderr
        return dict(json.loads(finished.stdout))

    return run


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    _patch_once()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    """Every test starts from the same random state, alone or in a full run."""
    torch.manual_seed(20240607)
