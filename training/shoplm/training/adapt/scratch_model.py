"""A small decoder that starts from nothing: trunk and input rows are all its own, and it has no words to chat with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from shoplm.model.origin import Origin
from shoplm.training.adapt.causal import CPU
from shoplm.training.adapt.model import JointModel
from shoplm.training.adapt.saved_base import saved_base
from shoplm.training.ranker import CountPrior
from shoplm.vocabulary import SPECIAL_TEXTS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

INPUT_ROWS = "input_rows.safetensors"
_MAX_POSITIONS = 8192
_DEVIATION = 0.02


@dataclass(frozen=True, slots=True)
class ScratchSize:
    """Sizes of a Llama-shaped decoder with heads of 64."""

    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int

    @property
    def hidden_size(self) -> int:
        return 64 * self.heads


SIZES = {"small": ScratchSize(4, 4, 2, 768)}


class ScratchModel(JointModel):
    """Input and output rows of an item are the same while it is trained: few items are bought often enough for two."""

    saved_as, origin = "base", Origin.SCRATCH

    def __init__(
        self,
        size: ScratchSize,
        tokenizer: Path,
        text_size: int,
        item_types: NDArray[np.int32],
        type_count: int,
        prior: CountPrior,
        horizons: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        """`tokenizer` is a folder with the tokenizer's files; `item_types` [items] are product types: items of one type
        start near each other. Draws from torch's global generator."""
        config = LlamaConfig(
            vocab_size=text_size,
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=64,
            max_position_embeddings=_MAX_POSITIONS,
            tie_word_embeddings=True,
        )
        causal: Any = LlamaForCausalLM(config)
        causal.set_attn_implementation("sdpa")
        causal.to(device, dtype)
        table = nn.Parameter(_first_rows(text_size, item_types, type_count, size.hidden_size).to(device, dtype))
        super().__init__(causal.model, table, prior.bias, prior.repeat_weight, horizons)
        self.table = table
        self.layers, self.norm = causal.model.layers, causal.model.norm
        self._causal, self._tokenizer, self._text_size = [causal], tokenizer, text_size
        self._first_item = text_size + len(SPECIAL_TEXTS)
        self._items = len(item_types)

    @property
    def rows(self) -> Tensor:  # type: ignore[override]
        return self.table[self._first_item : self._first_item + self._items].float()

    def trunk_parameters(self) -> list[nn.Parameter]:
        return [self.table, *self.layers.parameters(), *self.norm.parameters()]

    def save(self, folder: Path) -> None:
        """A base for the server, and beside it the rows of the shop's tokens."""
        causal, rows = self._causal[0], self.table.detach().cpu()
        causal.get_input_embeddings().weight.data.copy_(rows[: self._text_size])
        with saved_base(folder, self.origin) as partial:
            causal.save_pretrained(str(partial))
            for path in sorted(self._tokenizer.iterdir()):
                shutil.copyfile(path, partial / path.name)
            save_file({"input_rows": rows[self._text_size :].contiguous()}, folder.parent / INPUT_ROWS)


def _first_rows(text_size: int, item_types: NDArray[np.int32], type_count: int, hidden_size: int) -> Tensor:
    """[text and shop tokens, H]."""
    of_type = _DEVIATION * torch.randn(type_count, hidden_size)
    items = 0.7 * (of_type[torch.from_numpy(item_types.astype(np.int64))] + _noise(len(item_types), hidden_size))
    return torch.cat((_noise(text_size + len(SPECIAL_TEXTS), hidden_size), items, of_type))


def _noise(count: int, hidden_size: int) -> Tensor:
    return _DEVIATION * torch.randn(count, hidden_size)
