"""The card's section about the C++ decoder's formats, and the manifest's list of those that a bundle bears."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from shoplm.bundle import read_manifest, write_manifest
from shoplm.training.card_sections import with_section
from shoplm.training.format_gate import Loss
from shoplm.training.formats import Formats


def record(folder: Path, formats: Formats, customers: int, costs: Sequence[Loss]) -> None:
    """Put what formats cost into the card of a bundle, and whether it may be served with one of weights alone into its
    manifest."""
    if formats.kv is None:
        manifest = read_manifest(folder, verify=False)
        others = tuple(each for each in manifest.cpu_formats if each != formats.weights)
        listed = (*others, formats.weights) if all(cost.holds for cost in costs) else others
        write_manifest(folder, msgspec.structs.replace(manifest, cpu_formats=tuple(sorted(listed))))
    card = folder / "card.md"
    card.write_text(with_section(card.read_text("utf-8"), section(formats, customers, costs)), "utf-8")


def section(formats: Formats, customers: int, costs: Sequence[Loss]) -> str:
    """The section as text."""
    parts = {"weights": formats.weights, "keys and values": formats.kv or "model"}
    rounded = {what: format.upper() for what, format in parts.items() if format != "model"}
    heading = " and ".join(f"{what} in {format}" for what, format in rounded.items())
    name = "/".join(rounded.values())
    broken = [cost.metric for cost in costs if not cost.holds]
    verdict = f"Over its limit: {', '.join(broken)}." if broken else "All are within their limits."
    rows = [
        f"| {cost.metric} | {cost.reference:.4f} | {cost.found:.4f} | {cost.loss:+.4f} | {cost.limit:g} |"
        for cost in costs
    ]
    return "\n\n".join(
        (
            f"## {heading[0].upper()}{heading[1:]} on a CPU",
            f"What it costs that the C++ decoder has {heading} instead of bf16, on {customers:,} customers: a "
            "share of NDCG, a rise of the Brier scores, and a share of the perplexity of the base's own answers. "
            + verdict,
            "\n".join((f"| metric | bf16 | {name} | loss | limit |", "|---|---:|---:|---:|---:|", *rows)),
        )
    )
