"""The GPU backend's formats of fewer bits, as a measurement on a CPU rounds like them."""

from __future__ import annotations

from dataclasses import dataclass

PERPLEXITY_RISE = {"model": 0.0, "int8": 0.02, "fp8": 0.02, "int4": 0.05}  # that a format may cost: a share


@dataclass(frozen=True)
class Formats:
    """How the base's weights, and keys and values, are rounded."""

    weights: str = "model"
    kv: str | None = None  # None: as the CPU's own backend keeps them; else by torch operations, which can round them

    @property
    def name(self) -> str:
        """For people."""
        parts = [f"weights {self.weights}"] if self.weights != "model" else []
        return ", ".join([*parts, *([f"keys and values {self.kv}"] if self.kv not in (None, "model") else [])])

    @property
    def reference(self) -> Formats:
        """The same arithmetic without rounding."""
        return Formats(kv=None if self.kv is None else "model")

    @property
    def perplexity_rise(self) -> float:
        """What both together may cost."""
        return max(PERPLEXITY_RISE[self.weights], PERPLEXITY_RISE[self.kv or "model"])


UNROUNDED = Formats()
