"""ModelConfig agrees with transformers, and refuses what the decoder cannot compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shoplm.errors import BaseModelError
from shoplm.model.config import SUPPORTED_ARCHITECTURES, ModelConfig, RopeConfig, parse_config
from shoplm.model.rope import rope_frequencies, rope_tables

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 100,
}


def _transformers_frequencies(config: Any) -> tuple[torch.Tensor, float]:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq, rotary.attention_scaling


def test_agrees_with_transformers(tiny_model: Callable[[str], Path], family: str) -> None:
    import transformers

    folder = tiny_model(family)
    ours, theirs = ModelConfig.from_folder(folder), transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    attention = model.model.layers[0].self_attn
    assert (ours.vocab_size, ours.hidden_size) == tuple(model.model.embed_tokens.weight.shape)
    assert ours.num_layers == len(model.model.layers)
    assert ours.num_heads * ours.head_dim == attention.q_proj.out_features
    assert ours.num_kv_heads * ours.head_dim == attention.k_proj.out_features
    assert ours.qkv_size == 2 * attention.k_proj.out_features + attention.q_proj.out_features
    assert ours.qkv_bias == (attention.q_proj.bias is not None)
    assert ours.output_bias == (attention.o_proj.bias is not None)
    assert ours.qk_norm == hasattr(attention, "q_norm")
    assert ours.tied_head == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert ours.sliding_windows == tuple(
        getattr(layer.self_attn, "sliding_window", None) or (theirs.sliding_window if family == "mistral" else None)
        for layer in model.model.layers
    )
    assert ours.uses_rope == tuple(bool(getattr(layer.self_attn, "use_rope", 1)) for layer in model.model.layers)
    assert ours.eos_token_ids == (2,) and ours.bos_token_id == 1
    frequencies, factor = rope_frequencies(ours.rope, ours.head_dim)
    expected, expected_factor = _transformers_frequencies(theirs)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
        {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "attention_factor": 0.7, "truncate": False},
        {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "mscale": 0.8, "mscale_all_dim": 1.2, "beta_fast": 16},
    ],
)
def test_rope_scaling_agrees_with_transformers(rope: dict[str, Any]) -> None:
    import transformers

    rope = {**rope, "original_max_position_embeddings": 8192}
    raw = {**MINIMAL, "head_dim": 64, "max_position_embeddings": 32768, "rope_parameters": rope}
    config = parse_config(raw)
    frequencies, factor = rope_frequencies(config.rope, config.head_dim)
    reference = transformers.LlamaConfig(**{key: value for key, value in raw.items() if key != "architectures"})
    expected, expected_factor = _transformers_frequencies(reference)
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)
    plain, _ = rope_frequencies(RopeConfig(rope["rope_theta"]), config.head_dim)
    assert not torch.allclose(frequencies, plain), "this scaling changes nothing, so the test shows nothing"


def test_rope_tables() -> None:
    cosines, sines = rope_tables(RopeConfig(10000.0, "yarn", 4.0, 64, attention_factor=2.0), 8, 5)
    assert cosines.shape == sines.shape == (5, 4)
    torch.testing.assert_close(cosines[0], torch.full((4,), 2.0))
    torch.testing.assert_close(cosines**2 + sines**2, torch.full((5, 4), 4.0))


def test_reads_the_fields_of_transformers_4() -> None:
    config = parse_config({**MINIMAL, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}})
    assert config.rope == RopeConfig(5e5, "linear", 2.0)
    assert config.head_dim == 16 and config.num_kv_heads == 4 and not config.tied_head


def test_sliding_windows() -> None:
    qwen = {**MINIMAL, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 32, "max_window_layers": 3}
    assert parse_config(qwen).sliding_windows == (None,) * 4
    assert parse_config({**qwen, "use_sliding_window": True}).sliding_windows == (None, None, None, 32)
    mistral = {**MINIMAL, "architectures": ["MistralForCausalLM"]}
    assert parse_config({**mistral, "sliding_window": 7}).sliding_windows == (7,) * 4
    assert parse_config({**mistral, "sliding_window": None}).sliding_windows == (None,) * 4


def test_end_tokens_come_from_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MINIMAL, "eos_token_id": 5}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (5,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (7, 5)


def test_no_base_is_refused_for_its_first_token() -> None:
    assert parse_config({**MINIMAL, "bos_token_id": [1, 2]}).bos_token_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": None, "model_type": "mamba"}, "model_type 'mamba'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ],
)
def test_refuses(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MINIMAL, **change}))
    with pytest.raises(BaseModelError) as caught:
        ModelConfig.from_folder(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_unsupported_architecture_lists_the_supported() -> None:
    with pytest.raises(BaseModelError) as caught:
        parse_config({**MINIMAL, "architectures": ["GemmaForCausalLM"]})
    assert all(name in str(caught.value) for name in SUPPORTED_ARCHITECTURES)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_missing_or_broken_config_is_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)
