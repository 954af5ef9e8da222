"""The two copies of a step between host and device: all its inputs in one, all its results in the other.

A copy costs a few microseconds of launch whatever its size, and a copy back is where the host waits. So arrays travel
packed, and results are asked for once, after everything of the step has been queued.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes: what the kernels' vector loads assume of a tensor's start


def packed_bytes(arrays: Sequence[NDArray[Any]]) -> int:
    """Bytes that `upload` needs for these arrays."""
    return sum(_padded(array.nbytes) for array in arrays)


def upload(arrays: Sequence[NDArray[Any]], device: torch.device, into: Tensor | None = None) -> list[Tensor]:
    """`arrays` on `device`, in one copy that the host does not wait for.

    `into` is a uint8 buffer that the copy goes to, in order with the device's work, so that the inputs of a captured
    graph stay where they are: arrays of the same shapes get the same places. Allocated when absent. Raises ValueError
    where it is too small.
    """
    target, places = _send(arrays, device, into)
    return [
        target[place : place + array.nbytes].view(torch.from_numpy(np.empty(0, array.dtype)).dtype).view(array.shape)
        for place, array in zip(places, arrays, strict=True)
    ]


def refill(arrays: Sequence[NDArray[Any]], device: torch.device, into: Tensor) -> None:
    """`upload` to where arrays of the same shapes are: their tensors are known already, and making them costs the host
    more than the copy."""
    _send(arrays, device, into)


def _send(arrays: Sequence[NDArray[Any]], device: torch.device, into: Tensor | None) -> tuple[Tensor, list[int]]:
    """The bytes on the device, and where each array's begin."""
    size = packed_bytes(arrays)
    # Pinned memory comes from torch's caching allocator, which hands it out again only after the copy has ended.
    staging = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    room = staging.numpy()
    places: list[int] = []
    start = 0
    for array in arrays:
        room[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        places.append(start)
        start += _padded(array.nbytes)
    if into is None:
        target = staging.to(device, non_blocking=True)
    elif into.numel() < size:
        raise ValueError(f"the input buffer has {into.numel()} bytes, the step needs {size}")
    else:
        target = into[:size]
        target.copy_(staging, non_blocking=True)
    return target, places


class Readback:
    """Results of one step: tensors of 4-byte elements, copied to the host together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: list[Tensor] = []
        self._size = 0
        self._host: Tensor | None = None
        self._done: torch.cuda.Event | None = None

    def add(self, values: Tensor) -> slice:
        """Queue `values` (fp32 or int32); returns where they will be in what `wait` gives."""
        flat = values.reshape(-1).view(torch.int32)
        place = slice(self._size, self._size + len(flat))
        self._parts.append(flat)
        self._size = place.stop
        return place

    def start(self) -> None:
        """Queue the copy behind the step's work."""
        if not self._parts:
            self._host = torch.zeros(0, dtype=torch.int32)
        elif self._device.type == "cuda":
            packed = torch.cat(self._parts)
            self._host = torch.empty(self._size, dtype=torch.int32, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
        else:
            self._host = torch.cat(self._parts)
        self._parts = []
        if self._device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> NDArray[np.int32]:
        """Wait for the copy, and so for the step. Results are views of it: fp32 ones by `.view(np.float32)`."""
        if self._host is None:
            raise RuntimeError("the copy was not started")
        if self._done is not None:
            self._done.synchronize()
        result: NDArray[np.int32] = self._host.numpy()
        return result


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
