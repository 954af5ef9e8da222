"""The base as transformers loads it, and the device that it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from shoplm.errors import ConfigurationError
from shoplm.model.linear import packing_supported
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")


def training_device(name: str) -> torch.device:
    """The device of that name, such as `cpu`, `cuda` or `cuda:1`; `auto` is a GPU where torch finds one. Raises
    ConfigurationError for one that cannot be trained on here."""
    if name == "auto":
        return torch.device("cuda") if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {name}: not auto, cpu, cuda or one GPU as cuda:0")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigurationError(f"--device {name}: torch {torch.__version__} finds {found} GPUs")
    return device


def trunk_dtype(device: torch.device) -> torch.dtype:
    """What a trunk is trained in: bf16, but fp32 on a CPU without instructions for bf16, where a backward product of it
    takes fourteen times as long."""
    return torch.bfloat16 if device.type == "cuda" or packing_supported() else torch.float32


def load_causal(folder: Path, device: torch.device, *, checkpointing: bool) -> Any:
    """The base on `device`, in `trunk_dtype`. With `checkpointing`, activations are computed again in the backward
    pass: less memory, more time."""
    causal: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=trunk_dtype(device), attn_implementation="sdpa")
    if checkpointing:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return causal.to(device)
