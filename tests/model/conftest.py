"""Makes importable what these tests share, and gives those of the C++ decoder each of its forms."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
from shoplm.model.native.library import InstructionSet, NativeLibrary

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parent))

Emulate = Callable[[InstructionSet], NativeLibrary]


@pytest.fixture(scope="session")
def emulate(tmp_path_factory: pytest.TempPathFactory) -> Emulate:
    """`emulate(instructions)`: the emulated form, built once per test session, whose processes share it."""
    from native_forms import emulated_library

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated-decoder"
    folder.mkdir(exist_ok=True)
    return lru_cache(lambda instructions: emulated_library(instructions, folder))


@pytest.fixture
def library(request: pytest.FixtureRequest, emulate: Emulate) -> NativeLibrary:
    """Each form: the real one where this machine has its instructions, else the emulated one."""
    found: NativeLibrary | InstructionSet = request.param
    return emulate(found) if isinstance(found, InstructionSet) else found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Only tests that want the decoder's forms pay for looking what this machine has."""
    if "library" not in metafunc.fixturenames:
        return
    from native_forms import real_library

    params = []
    for instructions in InstructionSet:
        real = real_library(instructions)
        if isinstance(real, NativeLibrary):
            params.append(pytest.param(real, id=instructions))
        elif instructions is InstructionSet.AVX2:
            params.append(pytest.param(instructions, id=instructions, marks=pytest.mark.skip(reason=real)))
        else:
            params.append(pytest.param(instructions, id=f"{instructions}-emulated"))
    metafunc.parametrize("library", params, indirect=True)
