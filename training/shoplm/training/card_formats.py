"""The card's section about the C++ decoder's formats, and the manifest's list of those that a bundle bears."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from shoplm.bundle import read_manifest, write_manifest
from shoplm.training.card_sections import with_section
from shoplm.training.format_gate import Loss


def record(folder: Path, format: str, customers: int, costs: Sequence[Loss]) -> None:
    """Put what a format of weights costs into the card of a bundle, and whether it may be served with it into its
    manifest."""
    manifest = read_manifest(folder, verify=False)
    others = tuple(each for each in manifest.cpu_formats if each != format)
    formats = (*others, format) if all(cost.holds for cost in costs) else others
    write_manifest(folder, msgspec.structs.replace(manifest, cpu_formats=tuple(sorted(formats))))
    card = folder / "card.md"
    card.write_text(with_section(card.read_text("utf-8"), section(format, customers, costs)), "utf-8")


def section(format: str, customers: int, costs: Sequence[Loss]) -> str:
    """As text."""
    name = format.upper()
    broken = [cost.metric for cost in costs if not cost.holds]
    verdict = f"Over its limit: {', '.join(broken)}." if broken else "All are within their limits."
    rows = [
        f"| {cost.metric} | {cost.reference:.4f} | {cost.found:.4f} | {cost.loss:+.4f} | {cost.limit:g} |"
        for cost in costs
    ]
    return "\n\n".join(
        (
            f"## Weights in {name} on a CPU",
            f"What it costs that the C++ decoder computes with {name} instead of bf16, on {customers:,} customers: a "
            "share of NDCG, a rise of the Brier scores, and a share of the perplexity of the base's own answers. "
            + verdict,
            "\n".join((f"| metric | bf16 | {name} | loss | limit |", "|---|---:|---:|---:|---:|", *rows)),
        )
    )
