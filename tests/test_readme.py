"""What the README shows is what the demo shop answers."""

from __future__ import annotations

import re
from pathlib import Path

from shoplm.bundle import read_manifest

ROOT = Path(__file__).parents[1]


def test_the_answers_shown_are_those_of_the_shipped_bundle() -> None:
    manifest = read_manifest(ROOT / "bundles" / "complete-journey", verify=False)
    shown = re.findall(rf"^{manifest.name} (\w+) on (\S+);", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert len(shown) == 3
    assert set(shown) == {(manifest.version, manifest.base.name)}
