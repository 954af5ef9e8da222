"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) in PEFT's format, merged into the base where it is loaded.

An adapted projection is W + s B A, with B [out, r], A [r, in] and s = alpha / r, or alpha / sqrt(r) for rank-stabilised
ones (Kalajdzievski, arXiv:2312.03732). The sum is taken in fp32 and rounded once, to the dtype that is served.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from shoplm.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shoplm.errors import BaseModelError
from shoplm.model.config import read_json
from torch import Tensor

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_REFUSED = ("use_dora", "modules_to_save", "layer_replication", "megatron_config")


@dataclass(frozen=True)
class LowRank:
    """One projection's change."""

    down: Tensor  # A [r, in]
    up: Tensor  # B [out, r]
    scale: float

    def add_to(self, weight: Tensor) -> Tensor:
        """fp32 [out, in]."""
        return torch.addmm(weight.float(), self.up.float(), self.down.float(), alpha=self.scale)


class Adapter:
    """All changes of an adapter, by the name of the tensor that they are added to."""

    def __init__(self, folder: Path, changes: dict[str, LowRank]) -> None:
        self.folder = folder
        self._changes = changes
        self._left = set(changes)

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """`weight`, or its sum with the change that the adapter has for it. Raises BaseModelError where they do not
        fit."""
        change = self._changes.get(name)
        if change is None:
            return weight
        self._left.discard(name)
        shape = (change.up.shape[0], change.down.shape[1])
        if shape != tuple(weight.shape):
            raise BaseModelError(
                f"the adapter in {self.folder} changes {name} as if it were {list(shape)}, but the base's is "
                f"{list(weight.shape)}: it belongs to another base"
            )
        return change.add_to(weight)

    def finish(self) -> None:
        """Raises BaseModelError if a change has not been asked for."""
        if self._left:
            raise BaseModelError(
                f"the adapter in {self.folder} changes {min(self._left)}, which this base does not have or which is "
                "not a projection of its layers"
            )


def read_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors. Raises BaseModelError saying what is not supported."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise BaseModelError(f"{path} does not exist; an adapter is a folder that PEFT has saved")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise BaseModelError(f"{path}: peft_type is {config.get('peft_type')!r}, only LORA adapters can be merged")
    for name in _REFUSED:
        if config.get(name):
            raise BaseModelError(f"{path}: {name} is {config[name]!r}, which is not supported")
    if config.get("bias", "none") != "none":
        raise BaseModelError(f"{path}: bias is {config['bias']!r}, only adapters that leave biases alone can be merged")
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"{folder / ADAPTER_WEIGHTS} cannot be read as safetensors: {error}") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise BaseModelError(f"{folder / ADAPTER_WEIGHTS}: {key} is not a low-rank matrix of a projection")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    changes = {}
    for module, pair in pairs.items():
        if len(pair) != 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise BaseModelError(f"{folder / ADAPTER_WEIGHTS}: the two matrices of {module} do not fit each other")
        changes[f"{module}.weight"] = LowRank(pair["A"], pair["B"], _scale(config, module, pair["A"].shape[0]))
    return Adapter(folder, changes)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    alpha = float(_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", rank)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """The value whose key, a regular expression, is the module's name or its end, as PEFT reads them."""
    for key, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default
