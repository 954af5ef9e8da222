"""Hatch build hook: compiles `protos/shoplm/v1/*.proto` into the git-ignored `protos/gen`.

Run directly (`python protos/build_hook.py`) it does the same after a change to a .proto.
"""

from __future__ import annotations

import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent


def _stub_arguments(out: Path) -> list[str]:
    """protoc's arguments for type stubs, which only type checkers need; none where mypy-protobuf is missing."""
    arguments = []
    for name in ("mypy", "mypy_grpc"):
        beside = Path(sys.executable).parent / f"protoc-gen-{name}"
        program = str(beside) if beside.exists() else shutil.which(f"protoc-gen-{name}")
        if program:
            arguments += [f"--plugin=protoc-gen-{name}={program}", f"--{name}_out={out}"]
    return arguments


def generate(out: Path = ROOT / "gen") -> list[Path]:
    """Compile every proto; returns the generated files. Raises RuntimeError with protoc's exit code."""
    from grpc_tools import protoc

    out.mkdir(parents=True, exist_ok=True)
    sources = sorted(str(path) for path in (ROOT / "shoplm").rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{ROOT}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        *_stub_arguments(out),
        *sources,
    ]
    code = protoc.main(arguments)
    if code != 0:
        raise RuntimeError(f"protoc failed with exit code {code}; see its messages above")
    package = out / "shoplm" / "v1"
    (package / "__init__.py").touch()
    return sorted(p for p in package.iterdir() if p.suffix in {".py", ".pyi"})


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script without hatchling
    pass
else:

    class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
        """Generates the gRPC code before a wheel or an editable install is built."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            generated = generate()
            build_data["artifacts"].extend(f"/{path.relative_to(ROOT.parent)}" for path in generated)


if __name__ == "__main__":
    for path in generate():
        sys.stdout.write(f"{path.relative_to(ROOT.parent)}\n")
