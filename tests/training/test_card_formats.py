"""What formats of the CPU cost goes into the card, and into the manifest what may be served."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
from shoplm.bundle import read_manifest, write_manifest
from shoplm.training.card_formats import record
from shoplm.training.format_gate import Loss
from shoplm.training.formats import Formats

HOLDS, BROKEN = Loss("NDCG@10, by time", 0.25, 0.249, 0.004, 0.01), Loss("Brier, buys", 0.1, 0.11, 0.01, 0.002)


def test_a_format_may_be_served_as_long_as_it_holds(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(Path(__file__).parents[2] / "bundles" / "complete-journey", bundle)
    write_manifest(bundle, msgspec.structs.replace(read_manifest(bundle, verify=False), cpu_formats=()))
    record(bundle, Formats("int8", of_cpu=True), 20, [HOLDS])
    record(bundle, Formats("int4", of_cpu=True), 20, [HOLDS, BROKEN])
    assert read_manifest(bundle, verify=False).cpu_formats == ("int8",)
    card = (bundle / "card.md").read_text("utf-8")
    assert "| NDCG@10, by time | 0.2500 | 0.2490 | +0.0040 | 0.01 |" in card
    assert card.count("## Weights in INT8 on a CPU") == card.count("## Weights in INT4 on a CPU") == 1
    assert "Over its limit: Brier, buys." in card
    record(bundle, Formats("int8", of_cpu=True), 20, [BROKEN])
    record(bundle, Formats("int4", of_cpu=True), 20, [HOLDS])
    assert read_manifest(bundle, verify=False).cpu_formats == ("int4",)
    assert "Over its limit" in (bundle / "card.md").read_text("utf-8").split("## Weights in INT8")[1]
