"""A GGUF file as a Hugging Face folder: config, tokenizer, chat template, and dequantised weights.

Done once per file (see `shoplm.model.base`). Tensors are dequantised and written one by one, so the memory needed is
that of the largest. Quantised weights become bf16: the rounding is far below the quantisation's own error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from shoplm.errors import BaseModelError
from shoplm.model.gguf_tokenizer import gguf_tokenizer

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
}
# llama.cpp turns neighbouring dimensions where Hugging Face turns the two halves; these files are reordered for that.
_REORDERED = ("llama", "smollm3")
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_KEPT = ("F32", "F16")  # all else becomes BF16
_LARGEST = {"F32": np.inf, "F16": 65504.0, "BF16": 3.3895314e38}


def convert_gguf(path: Path, folder: Path, progress: Progress = lambda done, total: None) -> None:
    """Writes the model in `path` to the existing, empty `folder`. Raises BaseModelError if it cannot be converted."""
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise BaseModelError(f"{path} cannot be read as GGUF: {error}") from error
    try:
        config = _config(fields, {tensor.name: tensor for tensor in reader.tensors})
        tokenizer = gguf_tokenizer(fields)
        names = {tensor.name: _hugging_face_name(tensor.name) for tensor in reader.tensors}
    except BaseModelError as error:
        raise BaseModelError(f"{path}: {error}") from error
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(fields))
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": _end_ids(fields)})
    tensors = [(names[tensor.name], tensor) for tensor in reader.tensors if tensor.name != _ROPE_FACTORS]
    _write_weights(folder / "model.safetensors", tensors, config, fields["general.architecture"], progress)


def _config(fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, from the metadata and from which tensors there are."""
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise BaseModelError(
            f"GGUF architecture {architecture!r} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    if fields.get("split.count", 1) > 1:
        raise BaseModelError("the model is split over several GGUF files; merge them with llama-gguf-split --merge")
    get = _Metadata(fields, architecture)
    class_name, model_type = _ARCHITECTURES[architecture]
    window = get("attention.sliding_window", 0)
    if architecture == "llama" and window:
        class_name, model_type = "MistralForCausalLM", "mistral"
    elif window:
        raise BaseModelError(f"a sliding window ({window}) is not supported in {architecture} GGUF files")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", get("rope.dimension_count", hidden // heads))
    if get("rope.dimension_count", head_dim) != head_dim or get("attention.value_length", head_dim) != head_dim:
        raise BaseModelError("RoPE over a part of the head, or values of another size than keys, are not supported")
    if "token_embd.weight" not in tensors:
        raise BaseModelError("the GGUF file has no tensor token_embd.weight")
    ends = _end_ids(fields)
    return {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": get("context_length"),
        "rope_parameters": _rope(get, tensors, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if ends else None,
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[_stored_type(tensors.values())],
        **({"sliding_window": window} if window else {}),
    }


class _Metadata:
    """The fields of one architecture, without its prefix."""

    def __init__(self, fields: Mapping[str, Any], architecture: str) -> None:
        self._fields, self._prefix = fields, f"{architecture}."

    def __call__(self, name: str, default: Any = None) -> Any:
        value = self._fields.get(self._prefix + name, default)
        if value is None:
            raise BaseModelError(f"the GGUF file has no {self._prefix}{name}")
        if isinstance(value, list):
            raise BaseModelError(f"{self._prefix}{name} differs between layers, which is not supported")
        return value


def _rope(get: _Metadata, tensors: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _shortest(get("rope.freq_base", 10_000.0))}
    kind = get("rope.scaling.type", "none")
    if _ROPE_FACTORS in tensors:
        return _llama3_rope(rope, _dequantise(tensors[_ROPE_FACTORS]), head_dim)
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise BaseModelError(f"RoPE scaling {kind!r} is not supported; supported are linear and yarn")
    rope |= {"rope_type": kind, "factor": _shortest(get("rope.scaling.factor"))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    return rope


def _llama3_rope(rope: dict[str, Any], factors: NDArray[np.float32], head_dim: int) -> dict[str, Any]:
    """GGUF stores what Llama 3 divides each frequency by; the config names the formula. Found by trying it."""
    from shoplm.model.config import RopeConfig
    from shoplm.model.rope import rope_frequencies

    theta, factor = rope["rope_theta"], _shortest(factors.max())
    scaled, _ = rope_frequencies(RopeConfig(theta, "llama3", factor, 8192, 1.0, 4.0), head_dim)
    plain, _ = rope_frequencies(RopeConfig(theta), head_dim)
    expected = (plain / scaled).numpy()
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-3):
        raise BaseModelError(
            f"the RoPE factors in {_ROPE_FACTORS} are not those of Llama 3; use the safetensors folder"
        )
    return rope | {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _shortest(value: float) -> float:
    """1e-05 for the fp32 number that prints as 9.999999747378752e-06 in fp64."""
    return float(str(np.float32(value)))


def _end_ids(fields: Mapping[str, Any]) -> list[int]:
    """End of text, of turn and of message, as far as the file names them."""
    ids = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(int(token) for token in ids if token is not None))


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[f"{name}_token"] = tokens[token]
    template = fields.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})


def _hugging_face_name(name: str) -> str:
    if name in _GLOBAL_NAMES or name == _ROPE_FACTORS:
        return _GLOBAL_NAMES.get(name, name)
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match.group(2) not in _LAYER_NAMES:
        raise BaseModelError(f"the GGUF file has a tensor {name}, which no supported architecture has")
    layer, part, kind = match.groups()
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _stored_type(tensors: Any) -> str:
    """The dtype to write: that of the matrices if all are F32 or all F16, else BF16."""
    kinds = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
    return kinds.pop() if len(kinds) == 1 and kinds <= set(_KEPT) else "BF16"


def _dequantise(tensor: Any) -> NDArray[np.float32]:
    """fp32, in the order of dimensions that numpy has: [out, in]."""
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise BaseModelError(f"quantisation {tensor.tensor_type.name} of {tensor.name} is not supported") from error
    result: NDArray[np.float32] = np.asarray(values, np.float32).reshape(tuple(int(n) for n in tensor.shape[::-1]))
    if not np.isfinite(result).all():
        raise BaseModelError(f"tensor {tensor.name} has values that are not finite: the file is damaged")
    return result


def _write_weights(
    path: Path, tensors: list[tuple[str, Any]], config: Mapping[str, Any], architecture: str, progress: Progress
) -> None:
    """A safetensors file, by its format: length of the header (u64), header (JSON), data one after another."""
    stored = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[config["dtype"]]
    width = 4 if stored == "F32" else 2
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        shape = [int(size) for size in tensor.shape[::-1]]
        begin, end = end, end + width * int(np.prod(shape))
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        done = 0
        for name, tensor in tensors:
            values = _dequantise(tensor)
            if architecture in _REORDERED and (projection := re.search(r"\.([qk])_proj\.", name)):
                field = "num_attention_heads" if projection.group(1) == "q" else "num_key_value_heads"
                values = _halves(values, config[field])
            if np.abs(values).max(initial=0) > _LARGEST[stored]:
                raise BaseModelError(
                    f"tensor {tensor.name} has values beyond {_LARGEST[stored]:.3g}, the largest of {stored}"
                )
            data = _cast(values, stored)
            file.write(data)
            done += len(data)
            progress(done, end)
        file.flush()
        os.fsync(file.fileno())


def _halves(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Each head's rows from neighbouring pairs (0, 1), (2, 3), ... to two halves."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _cast(values: NDArray[np.float32], stored: str) -> bytes:
    if stored == "F32":
        return values.astype("<f4").tobytes()
    if stored == "F16":
        return values.astype("<f2").tobytes()
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest_even = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return (nearest_even >> np.uint32(16)).astype("<u2").tobytes()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
