"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) in PEFT's format, merged into the base where it is loaded, or
kept apart from it.

An adapted projection is W + s B A, with B [out, r], A [r, in] and s = alpha / r, or alpha / sqrt(r) for rank-stabilised
ones (Kalajdzievski, arXiv:2312.03732). Merged, the sum is taken in fp32 and rounded once, to the dtype that is served.
Apart, each product is W x + s B (A x): a few per cent more work, for weights whose format would round the change away.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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
_REFUSED = (
    "use_dora",
    "modules_to_save",
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
)
# Beginnings that take their part out of the base: the adapter fits what is left of it, unless PEFT converted it.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LowRankPath:
    """What is added to W x: up (down x)."""

    down: Tensor  # [R, in]
    up: Tensor  # [out, R], with the scale in it

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> LowRankPath:
        """A copy in that dtype, on that device."""
        return LowRankPath(self.down.to(device, dtype), self.up.to(device, dtype))


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
        change = self._change(name, tuple(weight.shape))
        return weight if change is None else change.add_to(weight)

    def path(self, rows: Mapping[str, int], inputs: int) -> LowRankPath | None:
        """What is added to a product whose weight stacks these tensors [rows, inputs], in fp32; None where nothing is
        changed. Raises as `merge`."""
        changes = [(size, self._change(name, (size, inputs))) for name, size in rows.items()]
        downs = [change.down.float() for _, change in changes if change is not None]
        if not downs:
            return None
        # A tensor without a change has a block of no columns.
        ups = [torch.zeros(size, 0) if change is None else change.up.float() * change.scale for size, change in changes]
        return LowRankPath(torch.cat(downs), torch.block_diag(*ups))  # type: ignore[no-untyped-call]

    def _change(self, name: str, shape: tuple[int, ...]) -> LowRank | None:
        change = self._changes.get(name)
        if change is None:
            return None
        self._left.discard(name)
        found = (change.up.shape[0], change.down.shape[1])
        if found != shape:
            raise BaseModelError(
                f"the adapter in {self.folder} changes {name} as if it were {list(found)}, but the base's is "
                f"{list(shape)}: it belongs to another base"
            )
        return change

    def finish(self) -> None:
        """Raises BaseModelError if a change has not been asked for."""
        if self._left:
            raise BaseModelError(
                f"the adapter in {self.folder} changes {min(self._left)}, which this base does not have or which is "
                "not a projection of its layers"
            )


def keeps_apart(weight_format: str) -> bool:
    """Whether an adapter is better kept beside weights of this format than merged: a grid of 16 values rounds away most
    of what an adapter changes."""
    return weight_format == "int4"


def read_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors. Raises BaseModelError saying what is not supported."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise BaseModelError(f"{path} does not exist; an adapter is a folder that PEFT has saved")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise BaseModelError(f"{path}: peft_type is {config.get('peft_type')!r}, only LORA adapters are supported")
    for name in _REFUSED:
        if config.get(name):
            raise BaseModelError(f"{path}: {name} is {config[name]!r}, which is not supported")
    if config.get("bias", "none") != "none":
        raise BaseModelError(f"{path}: bias is {config['bias']!r}, only adapters that leave biases alone are supported")
    if str(begun := config.get("init_lora_weights")).lower().startswith(_CHANGES_BASE):
        raise BaseModelError(
            f"{path}: init_lora_weights is {begun!r}, so the adapter belongs to a base that was changed "
            "before training; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"{folder / ADAPTER_WEIGHTS} cannot be read as safetensors: {error}") from error
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise BaseModelError(f"{folder / ADAPTER_WEIGHTS}: {key} is not a low-rank matrix of a projection")
        if not bool(torch.isfinite(tensor).all()):
            raise BaseModelError(f"{folder / ADAPTER_WEIGHTS}: {key} has values that are not finite")
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
