"""What readouts read of a bundle's weights.safetensors: tensors by name, all of a net's or none, of shapes that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from shoplm.errors import BundleError

Read = Callable[[str], NDArray[Any] | None]  # a tensor; None: it is not there
Shape = tuple[int, ...]


@contextmanager
def opened(bundle: Path) -> Iterator[tuple[Read, int]]:
    """How tensors of a bundle's folder are read, and how many items it has. Raises BundleError where it cannot be
    read, and for a ValueError within."""
    path = bundle / "weights.safetensors"
    try:
        with safe_open(path, framework="numpy") as weights:
            known = set(weights.keys())
            (items,) = weights.get_slice("popularity").get_shape()
            yield lambda name: weights.get_tensor(name) if name in known else None, items
    except (OSError, SafetensorError, ValueError) as error:
        raise BundleError(f"{path}: {error}") from error


def whole(read: Read, net: str, names: Sequence[str]) -> dict[str, NDArray[Any]] | None:
    """The tensors `net.name` by name; None where none is there. Raises ValueError where only some are."""
    found = {name: tensor for name in names if (tensor := read(f"{net}.{name}")) is not None}
    missing = [f"{net}.{name}" for name in names if name not in found]
    if found and missing:
        raise ValueError(f"{', '.join(missing)}: not there, but the other tensors of {net} are")
    return found or None


def check_shapes(net: str, shapes: Mapping[str, tuple[Shape, Shape]]) -> None:
    """Raises ValueError for the first tensor whose found shape is not the expected one."""
    for name, (found, expected) in shapes.items():
        if found != expected:
            raise ValueError(f"{net}.{name} has shape {found}, expected {expected}")
