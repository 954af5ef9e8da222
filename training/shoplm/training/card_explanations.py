"""The card's section about explanations, and its way into a bundle: they are measured on the bundle as it is served."""

from __future__ import annotations

from pathlib import Path

import msgspec
from shoplm.bundle import file_hash, read_manifest, write_manifest
from shoplm.training.card_sections import with_section
from shoplm.training.report import Deletion, ExplanationResult, Report, shown

HEADING = "## Explanations"
WANTED_SPEARMAN, WANTED_RATIO = 0.6, 2.0


def explanations(result: ExplanationResult) -> str:
    """The section as text."""
    rows = [
        ("effects on the score of a recommendation", result.score),
        ("effects on the model's term alone", result.model),
        *((f"effects on the prediction: {target}", value) for target, value in result.predictions.items()),
        ("effects on the term of a model of shuffled weights (should be near 0)", result.randomised),
    ]
    table = ["| | Spearman |", "|---|---:|", *(f"| {name} | {shown(value, '.2f')} |" for name, value in rows)]
    lines = [
        HEADING,
        f"Effects that an explanation names, against leave-one-out: a part of the history is taken out and everything "
        f"is computed again. {result.customers} customers seen from the beginning of the test, their first "
        f"recommendations, up to {result.parts} parts each (items and latest visits); means of the rank correlations.",
        "\n".join(table),
        f"Taking out the three items of the largest effects moves {_moved('the score', result.deletion)}; by the "
        f"model's share of the effects, it moves {_moved('its term', result.model_deletion)}. "
        f"{result.cited_in_history:.0%} of the cited items are in the history.",
        *_missed(result),
    ]
    return "\n\n".join(lines)


def record(folder: Path, result: ExplanationResult) -> None:
    """Put the numbers into metrics.json and card.md of a bundle, in place of older ones, and the former's new hash into
    its manifest."""
    metrics = folder / "metrics.json"
    report = msgspec.json.decode(metrics.read_bytes(), type=Report)
    report = msgspec.structs.replace(report, explanations=result)
    metrics.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    manifest = read_manifest(folder, verify=False)
    hashes = {**manifest.hashes, metrics.name: file_hash(metrics)}
    write_manifest(folder, msgspec.structs.replace(manifest, hashes=hashes))
    card = folder / "card.md"
    card.write_text(with_section(card.read_text("utf-8"), explanations(result)), "utf-8")


def _moved(what: str, deletion: Deletion) -> str:
    ratio = "" if deletion.ratio is None else f" ({deletion.ratio:.1f} times as far)"
    return (
        f"{what} by {deletion.cited:.2f}, three others as recent and as often bought by {deletion.matched:.2f}{ratio}"
    )


def _missed(result: ExplanationResult) -> list[str]:
    missed = [
        f"{name} {shown(value, '.2f')} instead of {WANTED_SPEARMAN:g}"
        for name, value in (("the score", result.score), ("the model's term", result.model))
        if value is not None and value < WANTED_SPEARMAN
    ]
    missed += [
        f"taking out cited items: {deletion.ratio:.1f} times as far by {name}, instead of {WANTED_RATIO:g}"
        for name, deletion in (("the score", result.deletion), ("the model's share", result.model_deletion))
        if deletion.ratio is not None and deletion.ratio < WANTED_RATIO
    ]
    if not missed:
        return []
    return [
        f"Below what was wanted: {'; '.join(missed)}. Hiding keys does not take back what later tokens have read of "
        "them."
    ]
