"""A trained base takes the place of an older one, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from shoplm.errors import ConfigurationError
from shoplm.model.origin import Origin, read_origin
from shoplm.training.adapt.saved_base import saved_base

Make = Callable[[Path], object]


def save(folder: Path, words: str, origin: Origin = Origin.ADAPTED) -> None:
    with saved_base(folder, origin) as partial:
        partial.mkdir()
        (partial / "config.json").write_text("{}")
        (partial / "words.txt").write_text(words)


def test_an_empty_folder_and_an_older_base_are_replaced(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save(base, "first")
    save(base, "second")
    assert (base / "words.txt").read_text() == "second"
    assert read_origin(base) is Origin.ADAPTED
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_is_not_written_to_its_end_replaces_nothing(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save(base, "first")
    with pytest.raises(RuntimeError, match="power"), saved_base(base, Origin.ADAPTED):
        raise RuntimeError("the power failed")
    assert (base / "words.txt").read_text() == "first"


def a_folder_of_other_things(base: Path) -> None:
    base.mkdir()
    (base / "mine.txt").write_text("mine")


def a_published_base(base: Path) -> None:
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "llama"}')


def a_base_from_nothing(base: Path) -> None:
    save(base, "from nothing", Origin.SCRATCH)


def a_file(base: Path) -> None:
    base.write_text("mine")


def a_link(base: Path) -> None:
    save(base.with_name("elsewhere"), "elsewhere")
    base.symlink_to("elsewhere")


@pytest.mark.parametrize("make", [a_folder_of_other_things, a_published_base, a_base_from_nothing, a_file, a_link])
def test_other_things_stay(tmp_path: Path, make: Make) -> None:
    base = tmp_path / "base"
    make(base)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match=f"^{base} is there and is no base that was trained like this"):
        save(base, "second")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
