"""Formats of fewer bits: a GPU's, as a measurement on a CPU rounds like them, or the CPU's own."""

from __future__ import annotations

from dataclasses import dataclass

PERPLEXITY_RISE = {"model": 0.0, "int8": 0.02, "fp8": 0.02, "int4": 0.05}  # that a format may cost: a share


@dataclass(frozen=True)
class Formats:
    """How the base's weights, and keys and values, are rounded."""

    weights: str = "model"
    kv: str | None = None  # None: as the CPU's own backend keeps them; else, not `of_cpu`, rounded by torch operations
    of_cpu: bool = False  # as the C++ decoder computes, not as the GPU's kernels round

    @property
    def name(self) -> str:
        """The formats in words."""
        parts = [f"weights {self.weights}"] if self.weights != "model" else []
        parts += [f"keys and values {self.kv}"] if self.kv not in (None, "model") else []
        return ", ".join(parts) + (" of the CPU" if self.of_cpu else "")

    @property
    def reference(self) -> Formats:
        """The same arithmetic without rounding."""
        return Formats(kv=None if self.kv is None or self.of_cpu else "model", of_cpu=self.of_cpu)

    @property
    def perplexity_rise(self) -> float:
        """What both together may cost."""
        return max(PERPLEXITY_RISE[self.weights], PERPLEXITY_RISE[self.kv or "model"])


UNROUNDED = Formats()
