"""Argument checks shared by the element-wise, sampling and beam ops: cheap, once per call, before anything is launched.

A kernel that is given a wrong stride reads somebody else's memory in silence; these checks compare a few tuples and
cost about a microsecond each, nothing inside a captured graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    contiguous: bool = False,
) -> None:
    """Raise unless `tensor` has `shape` (None = any size), one of `dtypes`, lies on `device`, last dimension packed.

    Raises:
        ValueError: wrong number of dimensions, size, device or stride.
        TypeError: wrong dtype.
    """
    if tensor.dim() != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} is {tensor.dtype}, expected one of: {names}; convert it before the call")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}; move it before the call")
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has last stride {tensor.stride(-1)}, expected 1; pass a packed last dimension")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())}, expected a contiguous tensor")


def leading_stride(tensor: torch.Tensor) -> int:
    """Stride of dimension 0, made canonical where it has one row (torch leaves such a stride arbitrary).

    Without this a step of one token could carry an odd stride and make Triton compile a second specialisation.
    """
    if tensor.shape[0] > 1:
        return tensor.stride(0)
    return math.prod(tensor.shape[1:])
