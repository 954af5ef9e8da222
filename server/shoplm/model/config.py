"""The shape of a decoder, read from a Hugging Face folder's config.json. No torch.

Supported are the decoders that differ from Llama only in what `ModelConfig` names: Llama, Mistral, Qwen2 and Qwen2.5,
Qwen3, SmolLM and SmolLM2 (which are Llama), and SmolLM3. Whatever a config asks for beyond that is refused here, with
the field and its value, rather than computed wrongly later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoplm.errors import BaseModelError

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)
_ROPE_KINDS = ("default", "linear", "llama3", "yarn")
_DEFAULT_ROPE_THETA = {"SmolLM3ForCausalLM": 2_000_000.0}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding. Which fields count depends on `kind`; see `shoplm.model.rope`."""

    theta: float
    kind: str = "default"  # default | linear | llama3 | yarn
    factor: float = 1.0  # linear, llama3, yarn
    original_max_positions: int = 0  # llama3, yarn: context length of the pretraining
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn, with mscale_all_dim: their ratio replaces the default attention factor
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: the ramp's ends are rounded to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a decoder needs to know beside its weights. Tuples per layer have `num_layers` entries."""

    architecture: str
    vocab_size: int  # rows of the embedding, padding included
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    uses_rope: tuple[bool, ...]  # per layer; False: no position embedding at all
    sliding_windows: tuple[int | None, ...]  # per layer: tokens that a query sees, itself included; None: all
    max_positions: int
    tied_head: bool  # the LM head is the embedding
    qkv_bias: bool
    output_bias: bool  # bias of the attention's output projection
    qk_norm: bool  # RMSNorm of each head's query and key, before RoPE
    # Of these a base's fingerprint is made, too; prompts and answers use the tokenizer's.
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # of generation_config.json, else of config.json

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise BaseModelError(
                f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise BaseModelError(f"head_dim {self.head_dim} is odd, but RoPE turns pairs of dimensions")
        for name, values in (("uses_rope", self.uses_rope), ("sliding_windows", self.sliding_windows)):
            if len(values) != self.num_layers:
                raise BaseModelError(f"{name} has {len(values)} entries for {self.num_layers} layers")

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def query_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def layer_parameters(self) -> int:
        """Numbers in the four products of one layer."""
        rows = self.qkv_size + self.num_heads * self.head_dim + 3 * self.intermediate_size
        return rows * self.hidden_size

    def context_tokens(self, most: int | None) -> int:
        """Positions that are served: the model's, or `most` of them."""
        return min(most or self.max_positions, self.max_positions)

    def kv_page_bytes(self, page_size: int, item_bytes: int) -> int:
        """Bytes of one page of `page_size` tokens: keys and values of all layers, `item_bytes` a number."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * page_size * item_bytes

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads config.json and, where there is one, generation_config.json. Raises BaseModelError."""
        raw = read_json(folder / "config.json")
        generation_path = folder / "generation_config.json"
        generation = read_json(generation_path) if generation_path.exists() else {}
        try:
            return parse_config(raw, generation)
        except BaseModelError as error:
            raise BaseModelError(f"{folder / 'config.json'}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a base model. Raises BaseModelError that names the file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(f"{path} does not exist, so {path.parent} is not a Hugging Face model folder") from error
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """The contents of config.json and generation_config.json as a ModelConfig. Raises BaseModelError."""
    architecture = _architecture(raw)
    _refuse_unsupported(raw)
    num_layers = _integer(raw, "num_hidden_layers")
    num_heads = _integer(raw, "num_attention_heads")
    hidden_size = _integer(raw, "hidden_size")
    max_positions = _integer(raw, "max_position_embeddings")
    attention_bias = bool(raw.get("attention_bias", False)) and architecture != "MistralForCausalLM"
    qwen2 = architecture == "Qwen2ForCausalLM"
    return ModelConfig(
        architecture=architecture,
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_integer(raw, "num_key_value_heads", num_heads),
        head_dim=_integer(raw, "head_dim", 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads),
        rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope=_rope(raw, max_positions, _DEFAULT_ROPE_THETA.get(architecture, 10_000.0)),
        uses_rope=_uses_rope(raw, architecture, num_layers),
        sliding_windows=_sliding_windows(raw, architecture, num_layers),
        max_positions=max_positions,
        tied_head=bool(raw.get("tie_word_embeddings", architecture == "SmolLM3ForCausalLM")),
        qkv_bias=attention_bias or qwen2,
        output_bias=attention_bias and not qwen2,
        qk_norm=architecture == "Qwen3ForCausalLM",
        bos_token_id=_bos(raw),
        eos_token_ids=_eos(raw, generation or {}),
    )


def _architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or []
    name = names[0] if isinstance(names, Sequence) and not isinstance(names, str) and names else None
    if name not in SUPPORTED_ARCHITECTURES:
        given = name if name is not None else f"missing (model_type {raw.get('model_type')!r})"
        raise BaseModelError(
            f"architecture {given} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return str(name)


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise BaseModelError(
            f"the weights are quantised ({method}); give an unquantised safetensors folder, or a GGUF file"
        )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise BaseModelError(f"hidden_act {activation!r} is not supported; supported is 'silu'")
    if raw.get("mlp_bias"):
        raise BaseModelError("mlp_bias true is not supported: none of the supported families' published models has it")


def _integer(raw: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = raw.get(field)
    if value is None:
        if default is None:
            raise BaseModelError(f"{field} is missing")
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BaseModelError(f"{field} is {value!r}, but must be a positive integer")
    return value


def _number(raw: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = raw.get(field)
    if value is None:
        if default is None:
            raise BaseModelError(f"{field} is missing")
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise BaseModelError(f"{field} is {value!r}, but must be a positive number")
    return float(value)


def _rope(raw: Mapping[str, Any], max_positions: int, default_theta: float) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4)."""
    scaling: Mapping[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = _number(scaling, "rope_theta", _number(raw, "rope_theta", default_theta))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise BaseModelError(f"RoPE scaling {kind!r} is not supported; supported are {', '.join(_ROPE_KINDS)}")
    share = scaling.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise BaseModelError(f"partial_rotary_factor {share} is not supported: RoPE turns all of a head or nothing")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, factor=_number(scaling, "factor"))
    original = _integer(scaling, "original_max_position_embeddings", max_positions)
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            factor=_number(scaling, "factor"),
            original_max_positions=original,
            low_freq_factor=_number(scaling, "low_freq_factor"),
            high_freq_factor=_number(scaling, "high_freq_factor"),
        )
    return RopeConfig(
        theta,
        kind,
        factor=_number(scaling, "factor", max_positions / original),
        original_max_positions=original,
        beta_fast=_number(scaling, "beta_fast", 32.0),
        beta_slow=_number(scaling, "beta_slow", 1.0),
        attention_factor=scaling.get("attention_factor"),
        mscale=scaling.get("mscale"),
        mscale_all_dim=scaling.get("mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
    )


def _uses_rope(raw: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[bool, ...]:
    if architecture != "SmolLM3ForCausalLM":
        return (True,) * num_layers
    listed = raw.get("no_rope_layers")  # despite the name, 1 marks a layer with RoPE
    if listed is not None:
        return tuple(bool(value) for value in listed)
    interval = _integer(raw, "no_rope_layer_interval", 4)
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))


def _sliding_windows(raw: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: every layer. Qwen and SmolLM3: only with use_sliding_window, and only the layers of that type."""
    everywhere = architecture == "MistralForCausalLM"
    if architecture == "LlamaForCausalLM" or not (everywhere or raw.get("use_sliding_window")):
        return (None,) * num_layers
    if raw.get("sliding_window") is None:
        return (None,) * num_layers
    window = _integer(raw, "sliding_window")
    if everywhere:
        return (window,) * num_layers
    types = raw.get("layer_types")
    if types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if architecture == "SmolLM3ForCausalLM":
        return tuple(None if rope else window for rope in _uses_rope(raw, architecture, num_layers))
    first = raw.get("max_window_layers", 28)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _bos(raw: Mapping[str, Any]) -> int | None:
    value = raw.get("bos_token_id")
    return value if isinstance(value, int) else None


def _eos(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    if value is None:
        value = raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) for token in ids):
        raise BaseModelError(f"eos_token_id is {value!r}, but must be an integer or a list of integers")
    return tuple(ids)
