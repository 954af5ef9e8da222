"""Who takes part: name, class of precision, and the command of its worker."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peers.rows import Row

SIMD = ("avx2", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
FULL, INT8, INT4 = "bf16/f32", "int8", "int4"
OURS = "shoplm"


@dataclass(frozen=True, slots=True)
class Setting:
    """Where things are: the folder that `setup.sh` made, the base in Hugging Face's layout, the logs."""

    peers: Path
    base: Path
    logs: Path
    threads: int

    def model(self, name: str) -> Path:
        return self.peers / "models" / name

    def python(self, venv: str) -> Path:
        return self.peers / venv / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant. `precision` is the class within which it is compared."""

    name: str
    precision: str
    command: Callable[[Setting], list[str]]

    @property
    def ours(self) -> bool:
        return self.name.startswith(f"{OURS}-")

    def runs(self, row: Row) -> bool:
        """Four-bit weights are there for a single stream; transformers is there for its search."""
        return row.beams > 0 if self.name.startswith("transformers") else self.precision != INT4 or row.requests == 1


def cpu_flags() -> list[str]:
    """Which of the instruction sets that matter here this processor has."""
    cpuinfo = Path("/proc/cpuinfo")
    found = set(cpuinfo.read_text("utf-8").split()) if cpuinfo.is_file() else set()
    return [flag for flag in SIMD if flag in found]


def fitting(flags: Sequence[str]) -> list[str]:
    """Contestants that make sense on a processor: without products of bf16, peers of 16 bits take what is faster."""
    wide = "bf16" if "avx512_bf16" in flags else "f32"
    full = ["shoplm-bf16", "openvino-full", f"vllm-{wide}", f"llamacpp-{'bf16' if wide == 'bf16' else 'f16'}"]
    quantised = [f"{engine}-{kind}" for kind in (INT8, INT4) for engine in (OURS, "openvino", "llamacpp")]
    return [*full, *quantised, f"transformers-{wide}"]


def _ours(dtype: str, weight_format: str, *options: str) -> Callable[[Setting], list[str]]:
    def command(setting: Setting) -> list[str]:
        log = setting.logs / f"server-{'-'.join((dtype, weight_format, *options))}.log"
        arguments = [dtype, weight_format, str(setting.threads), str(log), *options]
        return [sys.executable, "-m", "peers.shoplm_worker", *arguments]

    return command


def _peer(venv: str, worker: str, model: str | None, *options: str) -> Callable[[Setting], list[str]]:
    """A peer on `model` of the folder's models, or on the base itself."""

    def command(setting: Setting) -> list[str]:
        folder = setting.base if model is None else setting.model(model)
        return [str(setting.python(venv)), "-m", f"peers.{worker}_worker", str(folder), *options, str(setting.threads)]

    return command


CONTESTANTS = {
    entry.name: entry
    for entry in (
        Entry("shoplm-bf16", FULL, _ours("bfloat16", "model")),
        Entry("shoplm-f32", FULL, _ours("float32", "model")),
        Entry("shoplm-int8", INT8, _ours("bfloat16", "int8")),
        Entry("shoplm-int4", INT4, _ours("bfloat16", "int4")),
        *(
            Entry(f"shoplm-{name}-unguessed", precision, _ours("bfloat16", weights, "--max-draft-tokens", "0"))
            for name, precision, weights in (("bf16", FULL, "model"), ("int8", INT8, "int8"), ("int4", INT4, "int4"))
        ),
        Entry("openvino-full", FULL, _peer("openvino", "openvino", "openvino-fp32")),
        Entry("openvino-int8", INT8, _peer("openvino", "openvino", "openvino-int8")),
        Entry("openvino-int4", INT4, _peer("openvino", "openvino", "openvino-int4")),
        Entry("llamacpp-bf16", FULL, _peer("llamacpp", "llamacpp", "bf16.gguf")),
        Entry("llamacpp-f16", FULL, _peer("llamacpp", "llamacpp", "f16.gguf")),
        Entry("llamacpp-int8", INT8, _peer("llamacpp", "llamacpp", "q8_0.gguf")),
        Entry("llamacpp-int4", INT4, _peer("llamacpp", "llamacpp", "q4_0.gguf")),
        Entry("vllm-bf16", FULL, _peer("vllm", "vllm", None, "bfloat16")),
        Entry("vllm-f32", FULL, _peer("vllm", "vllm", None, "float32")),
        Entry("transformers-bf16", FULL, _peer("transformers", "transformers", None, "bfloat16")),
        Entry("transformers-f32", FULL, _peer("transformers", "transformers", None, "float32")),
    )
}
