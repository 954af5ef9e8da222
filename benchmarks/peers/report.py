"""Medians, ratios at equal precision, and the table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from peers.contestants import Entry
from peers.rows import Row


@dataclass(slots=True)
class Cell:
    """What one contestant did in one row, by repeat; `failed` ends it."""

    seconds: dict[int, float] = field(default_factory=dict)
    cpu_seconds: dict[int, float] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    firsts: dict[int, list[int]] = field(default_factory=dict)
    failed: str | None = None
    unsupported: bool = False


Cells = Mapping[str, Mapping[str, Cell]]  # contestant, row


def _cell(cells: Cells, entry: Entry, row: Row) -> Cell:
    """An empty one where the contestant does not run the row."""
    return cells[entry.name].get(row.name, Cell(unsupported=True))


def median(row: Row, cell: Cell) -> float | None:
    """The row's value in its median repeat; None where there is none."""
    values = [row.value(seconds) for seconds in cell.seconds.values()]
    return statistics.median(values) if values else None


def median_ratio(row: Row, ours: Cell, peer: Cell) -> float | None:
    """The median of the ratios within each repeat that both finished: slow spells hit both."""
    common = ours.seconds.keys() & peer.seconds.keys()
    ratios = [row.ratio(row.value(ours.seconds[one]), row.value(peer.seconds[one])) for one in common]
    return statistics.median(ratios) if ratios else None


def ratios(rows: Sequence[Row], cells: Cells, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Us against each peer of equal precision, row by row; over 1 is ahead."""
    return [
        {"row": row.name, "ours": ours.name, "peer": peer.name, "ratio": round(ratio, 3)}
        for row in rows
        for ours in entries
        for peer in entries
        if ours.ours and not peer.ours and ours.precision == peer.precision
        if (ratio := median_ratio(row, _cell(cells, ours, row), _cell(cells, peer, row))) is not None
    ]


def agreement(row: Row, cells: Cells) -> dict[str, float]:
    """Share of requests whose first token is that of most contestants: low where one runs another model."""
    answers = {
        name: [
            (repeat, index, token)
            for repeat, tokens in of.get(row.name, Cell()).firsts.items()
            for index, token in enumerate(tokens)
        ]
        for name, of in cells.items()
    }
    votes: dict[tuple[int, int], Counter[int]] = {}
    for tokens in answers.values():
        for repeat, index, token in tokens:
            votes.setdefault((repeat, index), Counter())[token] += 1
    return {
        name: round(
            statistics.mean(votes[repeat, index].most_common(1)[0][0] == token for repeat, index, token in tokens), 3
        )
        for name, tokens in answers.items()
        if tokens
    }


def table(rows: Sequence[Row], cells: Cells, entries: Sequence[Entry]) -> str:
    """Markdown: contestants by precision; below each of ours, its ratio to the best peer of equal precision."""
    lines = ["| | precision | " + " | ".join(f"{row.name}, {row.unit}" for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 2) + "|")
    for entry in entries:
        written = [_written(row, _cell(cells, entry, row)) for row in rows]
        lines.append(f"| {entry.name} | {entry.precision} | " + " | ".join(written) + " |")
    found = ratios(rows, cells, entries)
    for entry in entries:
        if entry.ours:
            worst = [
                min(
                    (
                        (one["ratio"], one["peer"])
                        for one in found
                        if (one["ours"], one["row"]) == (entry.name, row.name)
                    ),
                    default=None,
                )
                for row in rows
            ]
            written = ["" if one is None else f"{one[0]:.2f} ({one[1]})" for one in worst]
            lines.append(f"| **{entry.name} / best peer** | {entry.precision} | " + " | ".join(written) + " |")
    failures = Counter(
        (entry.name, reason) for entry in entries for row in rows if (reason := _cell(cells, entry, row).failed)
    )
    lines += [f"\n{name} failed in {count} rows: {reason}" for (name, reason), count in failures.items()]
    return "\n".join(lines)


def _written(row: Row, cell: Cell) -> str:
    value = median(row, cell)
    if value is not None:
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return "failed" if cell.failed else "-"


def as_json(rows: Sequence[Row], cells: Cells, entries: Sequence[Entry]) -> dict[str, Any]:
    """All that was measured, with medians and units."""
    return {
        "rows": [{**asdict(row), "unit": row.unit, "agreement": agreement(row, cells)} for row in rows],
        "contestants": {
            entry.name: {
                row.name: {"median": median(row, cell := _cell(cells, entry, row)), **_measured(cell)} for row in rows
            }
            for entry in entries
        },
        "ratios": ratios(rows, cells, entries),
    }


def _measured(cell: Cell) -> dict[str, Any]:
    found = {
        "seconds": [round(value, 4) for value in cell.seconds.values()],
        "cpu_seconds": [round(value, 3) for value in cell.cpu_seconds.values()],
        "digests": list(cell.digests.values()),
    }
    return (
        found | ({"failed": cell.failed} if cell.failed else {}) | ({"unsupported": True} if cell.unsupported else {})
    )
