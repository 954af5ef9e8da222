"""The decoder's weights as torch tensors, read from a Hugging Face folder of safetensors.

Tensors are read one by one from the memory-mapped files and copied to where they stay, in the dtype they stay in:
beside the finished weights there is never more than one tensor of the checkpoint in memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from shoplm.errors import BaseModelError
from shoplm.model.adapter import Adapter, LowRankPath
from shoplm.model.config import ModelConfig
from shoplm.model.weight_files import CONVERTED, weight_files

_SHOWN_NAMES = 4
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")  # written by old versions; computed from the config here


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Sizes: H hidden, I intermediate, Q query heads x head_dim, K key-value heads x head_dim.

    Projections are [out, in], as `torch.nn.functional.linear` takes them.
    """

    input_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [Q + 2 K, H]: query, key and value rows, in this order
    qkv_bias: torch.Tensor | None  # [Q + 2 K]
    query_norm: torch.Tensor | None  # [head_dim]
    key_norm: torch.Tensor | None  # [head_dim]
    output: torch.Tensor  # [H, Q]
    output_bias: torch.Tensor | None  # [H]
    mlp_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [2 I, H]: gate rows, then up rows
    down: torch.Tensor  # [H, I]
    paths: Mapping[str, LowRankPath] = field(default_factory=dict)  # of an adapter kept apart, by the projection's name

    def with_products(self, change: Callable[[torch.Tensor], torch.Tensor]) -> LayerWeights:
        """`change` made to each of the four projections, and to nothing else."""
        return replace(
            self,
            qkv=change(self.qkv),
            output=change(self.output),
            gate_up=change(self.gate_up),
            down=change(self.down),
        )

    def float(self) -> LayerWeights:
        """The same values in fp32."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        wide = {name: value.float() for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **wide, paths={name: path.to(torch.float32) for name, path in self.paths.items()})


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights of a decoder, in one dtype and on one device."""

    embedding: torch.Tensor  # [vocab_size, H]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [H]
    lm_head: torch.Tensor  # [vocab_size, H]; the same tensor as `embedding` where the head is tied

    def float(self) -> DecoderWeights:
        """The same values in fp32."""
        embedding = self.embedding.float()
        layers = tuple(layer.float() for layer in self.layers)
        head = embedding if self.lm_head is self.embedding else self.lm_head.float()
        return DecoderWeights(embedding, layers, self.final_norm.float(), head)


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    adapter: Adapter | None = None,
    *,
    apart: bool = False,
) -> DecoderWeights:
    """Reads model.safetensors, or the shards that model.safetensors.index.json lists, and merges the adapter, or keeps
    it `apart`.

    Raises BaseModelError where files or tensors are missing, damaged, not finite, of another shape, or left over.
    """
    with ExitStack() as stack:
        reader = _Reader(stack, folder, dtype, torch.device(device), adapter, apart=apart)
        hidden, vocabulary = config.hidden_size, config.vocab_size
        embedding = reader.take("model.embed_tokens.weight", vocabulary, hidden)
        layers = tuple(_load_layer(reader, config, layer) for layer in range(config.num_layers))
        final_norm = reader.take("model.norm.weight", hidden)
        if config.tied_head:
            reader.ignore("lm_head.weight")
            lm_head = embedding
        else:
            lm_head = reader.take("lm_head.weight", vocabulary, hidden)
        reader.finish()
    return DecoderWeights(embedding, layers, final_norm, lm_head)


def _load_layer(reader: _Reader, config: ModelConfig, layer: int) -> LayerWeights:
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    hidden, middle, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query_size, key_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
    rows = {f"{attention}.q_proj": query_size, f"{attention}.k_proj": key_size, f"{attention}.v_proj": key_size}
    qkv = {f"{name}.weight": size for name, size in rows.items()}
    output, down = f"{attention}.o_proj.weight", f"{mlp}.down_proj.weight"
    gate_up = {f"{mlp}.gate_proj.weight": middle, f"{mlp}.up_proj.weight": middle}
    paths = {
        "qkv": reader.path(qkv, hidden),
        "output": reader.path({output: hidden}, query_size),
        "gate_up": reader.path(gate_up, hidden),
        "down": reader.path({down: hidden}, middle),
    }
    return LayerWeights(
        input_norm=reader.take(f"{prefix}.input_layernorm.weight", hidden),
        qkv=reader.take_rows(qkv, hidden),
        qkv_bias=reader.take_rows({f"{name}.bias": size for name, size in rows.items()}) if config.qkv_bias else None,
        query_norm=reader.take(f"{attention}.q_norm.weight", head_dim) if config.qk_norm else None,
        key_norm=reader.take(f"{attention}.k_norm.weight", head_dim) if config.qk_norm else None,
        output=reader.take(output, hidden, query_size),
        output_bias=reader.take(f"{attention}.o_proj.bias", hidden) if config.output_bias else None,
        mlp_norm=reader.take(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=reader.take_rows(gate_up, hidden),
        down=reader.take(down, hidden, middle),
        paths={name: path for name, path in paths.items() if path is not None},
    )


class _Reader:
    """Hands out each tensor of a checkpoint once, checked and cast, and knows which were not asked for."""

    def __init__(
        self,
        stack: ExitStack,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        adapter: Adapter | None,
        *,
        apart: bool,
    ) -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._adapter, self._apart = adapter, apart
        self._is_checked = (folder / CONVERTED).is_file()
        self._files: dict[str, Any] = {}  # tensor name -> open file
        for path in weight_files(folder):
            try:
                opened = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise BaseModelError(f"{path} cannot be read as safetensors: {error}") from error
            for name in opened.keys():  # noqa: SIM118 - not a dict: it has no iterator
                self._files[name] = opened
        self._missing: list[str] = []
        self._left = {name for name in self._files if not _DERIVED.search(name)}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of this shape in the wanted dtype; a missing one is reported by `finish`, together with others."""
        return self._fill([(name, shape)], shape)

    def take_rows(self, rows: dict[str, int], *columns: int) -> torch.Tensor:
        """Several tensors [rows, *columns], one below the other."""
        parts = [(name, (count, *columns)) for name, count in rows.items()]
        return self._fill(parts, (sum(rows.values()), *columns))

    def path(self, rows: dict[str, int], inputs: int) -> LowRankPath | None:
        """What an adapter kept apart does to a product, whose weight is these tensors, one below the other."""
        path = self._adapter.path(rows, inputs) if self._adapter is not None and self._apart else None
        return None if path is None else path.to(self._dtype, self._device)

    def ignore(self, name: str) -> None:
        """This tensor may be in the checkpoint, but is not needed."""
        self._left.discard(name)

    def finish(self) -> None:
        """Raises BaseModelError if a tensor was missing or has not been asked for."""
        problems = [
            f"{text} {len(names)} ({', '.join(sorted(names)[:_SHOWN_NAMES])}{', ...' * (len(names) > _SHOWN_NAMES)})"
            for text, names in (("missing tensors:", self._missing), ("unexpected tensors:", list(self._left)))
            if names
        ]
        if problems:
            raise BaseModelError(
                f"the weights in {self._folder} do not fit its config.json: {'; '.join(problems)}. "
                "The download may be incomplete, or the files belong to another model"
            )
        if self._adapter is not None:
            self._adapter.finish()

    def _fill(self, parts: list[tuple[str, tuple[int, ...]]], shape: tuple[int, ...]) -> torch.Tensor:
        absent = [name for name, _ in parts if name not in self._files]
        self._missing += absent
        if absent:
            self._left -= {name for name, _ in parts}
            return torch.empty(0)  # never seen: `finish` raises
        result = torch.empty(shape, dtype=self._dtype, device=self._device)
        start = 0
        for name, part_shape in parts:
            tensor = self._read(name, part_shape)
            result[start : start + part_shape[0]].copy_(tensor)
            start += part_shape[0]
        return result

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        self._left.discard(name)
        try:
            tensor: torch.Tensor = self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise BaseModelError(f"tensor {name} in {self._folder} is damaged: {error}") from error
        if tuple(tensor.shape) != shape:
            raise BaseModelError(
                f"tensor {name} in {self._folder} has shape {tuple(tensor.shape)}, but config.json asks for {shape}"
            )
        if not tensor.is_floating_point():
            raise BaseModelError(f"tensor {name} in {self._folder} has dtype {tensor.dtype}, not a floating-point one")
        if not self._is_checked:
            self._check(name, tensor)
        return tensor if self._adapter is None or self._apart else self._adapter.merge(name, tensor)

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        # A sum is not finite if a part of it is not, and costs half of what it takes to look at each.
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))) and not bool(torch.isfinite(tensor).all()):
            raise BaseModelError(f"tensor {name} in {self._folder} has values that are not finite: it is damaged")
