"""One stage: `python -m gpu_stages NAME --out DIR [--smoke]`, started by `gpu.py`, which sets the paths.

Ends with 0, with 1 where a row failed, with 3 where a module that the stage needs is missing (the last line names it).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path

MISSING = 3
# Name -> (module, function, keywords of it).
STAGES: dict[str, tuple[str, str, dict[str, int]]] = {
    **{f"correct-attention-{part + 1}": ("correctness", "attention", {"part": part, "parts": 6}) for part in range(6)},
    "correct-ops": ("correctness_ops", "ops", {}),
    "correct-backend": ("backend", "equality", {}),
    "correct-formats": ("backend", "formats", {}),
    "prefill": ("kernels", "prefill", {}),
    "decode": ("kernels", "decode", {}),
    "beams": ("kernels", "beams", {}),
    "ops": ("ops", "ops", {}),
    "step": ("backend", "steps", {}),
    "search": ("backend", "searches", {}),
    "server": ("server", "throughput", {}),
}
NEEDS = {
    "backend": ("msgspec", "safetensors"),
    "server": (
        "msgspec", "safetensors", "grpc", "google.protobuf", "pydantic", "pydantic_settings", "typer",
        "tokenizers", "prometheus_client", "shoplm.v1",
    ),
}  # fmt: skip


def main() -> int:
    """Run the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    module, function, keywords = STAGES[options.stage]
    missing = [name for name in NEEDS.get(module, ()) if not _exists(name)]
    if missing:
        print(", ".join(missing))
        return MISSING
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    from gpu_stages.common import Stage  # after the choice of interpreting, which is made at Triton's import

    stage = Stage(options.stage, options.out / f"{options.stage}.jsonl", options.smoke)
    getattr(importlib.import_module(f"gpu_stages.{module}"), function)(stage, **keywords)
    return 1 if stage.failed else 0


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # of a package above it
        return False


if __name__ == "__main__":
    sys.exit(main())
