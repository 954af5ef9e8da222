"""Loaded weights equal those of transformers, and a checkpoint that does not fit is refused with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shoplm.errors import BaseModelError
from shoplm.model.config import ModelConfig
from shoplm.model.weight_files import weight_files
from shoplm.model.weights import DecoderWeights, load_weights


@pytest.fixture
def checkpoint(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a tiny model that a test may damage."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_model("qwen3"), folder)
    return folder


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_equals_transformers(tiny_model: Callable[[str], Path], family: str) -> None:
    import transformers

    folder = tiny_model(family)
    config = ModelConfig.from_folder(folder)
    ours = load_weights(folder, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = model.state_dict()

    def same(tensor: torch.Tensor | None, *names: str) -> None:
        assert tensor is not None
        assert torch.equal(tensor, torch.cat([state.pop(name) for name in names]))

    same(ours.embedding, "model.embed_tokens.weight")
    same(ours.final_norm, "model.norm.weight")
    assert (ours.lm_head is ours.embedding) == config.tied_head
    same(ours.lm_head, "lm_head.weight")
    for index, layer in enumerate(ours.layers):
        prefix = f"model.layers.{index}."
        qkv = [f"{prefix}self_attn.{part}_proj" for part in "qkv"]
        same(layer.qkv, *(f"{name}.weight" for name in qkv))
        if layer.qkv_bias is not None:
            same(layer.qkv_bias, *(f"{name}.bias" for name in qkv))
        if layer.query_norm is not None:
            same(layer.query_norm, f"{prefix}self_attn.q_norm.weight")
            same(layer.key_norm, f"{prefix}self_attn.k_norm.weight")
        same(layer.output, f"{prefix}self_attn.o_proj.weight")
        same(layer.gate_up, f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight")
        same(layer.down, f"{prefix}mlp.down_proj.weight")
        same(layer.input_norm, f"{prefix}input_layernorm.weight")
        same(layer.mlp_norm, f"{prefix}post_attention_layernorm.weight")
    assert not state, f"weights that were not loaded: {list(state)}"


def test_sharded(tiny_model: Callable[[str], Path]) -> None:
    assert len(weight_files(tiny_model("llama"))) > 1


def test_casts_to_the_wanted_dtype(checkpoint: Path) -> None:
    weights = load_weights(checkpoint, ModelConfig.from_folder(checkpoint), torch.bfloat16)
    assert {tensor.dtype for tensor in _tensors(weights)} == {torch.bfloat16}
    stored = load_file(checkpoint / "model.safetensors")["model.norm.weight"]
    assert torch.equal(weights.final_norm, stored.bfloat16())


def test_does_not_hold_the_file(checkpoint: Path) -> None:
    """The weights own their memory: replacing the file under a running server must not change them."""
    weights = load_weights(checkpoint, ModelConfig.from_folder(checkpoint))
    before = weights.final_norm.clone()
    path = checkpoint / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(8 + int.from_bytes(path.read_bytes()[:8], "little"))
        file.write(bytes(path.stat().st_size - file.tell()))
    assert torch.equal(weights.final_norm, before)


def test_attention_bias(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """A Llama with attention_bias has a bias on all four projections."""
    shutil.copytree(tiny_model("smollm2"), tmp_path / "base")
    folder = tmp_path / "base"
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "attention_bias": True}))

    def add_biases(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "self_attn" in name and name.endswith(".weight")]:
            tensors[name.replace(".weight", ".bias")] = torch.arange(float(len(tensors[name])))

    _edit(folder, add_biases)
    layer = load_weights(folder, ModelConfig.from_folder(folder)).layers[1]
    assert layer.qkv_bias is not None and layer.output_bias is not None
    assert layer.output_bias.tolist() == list(range(48)) and layer.qkv_bias.tolist() == [
        *range(48),
        *range(16),
        *range(16),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"), "missing tensors: 1 (model.layers.1."),
        (lambda tensors: tensors.update({"model.layers.9.x": torch.ones(1)}), "unexpected tensors: 1 (model.layers.9"),
        (lambda tensors: tensors.pop("lm_head.weight"), "missing tensors: 1 (lm_head.weight)"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), "has shape (3,), but config.json asks"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}), "torch.int8"),
    ],
)
def test_refuses_tensors_that_do_not_fit(
    checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    _edit(checkpoint, change)
    with pytest.raises(BaseModelError) as caught:
        load_weights(checkpoint, ModelConfig.from_folder(checkpoint))
    assert message in str(caught.value) and str(checkpoint) in str(caught.value)


def test_ignores_stored_frequencies(checkpoint: Path) -> None:
    _edit(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_weights(checkpoint, ModelConfig.from_folder(checkpoint))


def test_reports_every_missing_tensor_at_once(checkpoint: Path) -> None:
    config = replace(ModelConfig.from_folder(checkpoint), qkv_bias=True)
    with pytest.raises(BaseModelError, match=r"missing tensors: 6 .*k_proj\.bias.*\.\.\."):
        load_weights(checkpoint, config)


def test_refuses_truncated_and_absent_files(
    checkpoint: Path, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="cannot be read as safetensors"):
        load_weights(checkpoint, ModelConfig.from_folder(checkpoint))
    path.unlink()
    with pytest.raises(BaseModelError, match="does not exist"):
        weight_files(checkpoint)
    sharded = tmp_path / "sharded"
    shutil.copytree(tiny_model("llama"), sharded)
    weight_files(sharded)[1].unlink()
    with pytest.raises(BaseModelError, match=r"00002-of-.* does not exist"):
        weight_files(sharded)
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(BaseModelError, match="not a file of this folder"):
        weight_files(sharded)


def _tensors(weights: DecoderWeights) -> list[torch.Tensor]:
    tensors = [weights.embedding, weights.final_norm, weights.lm_head]
    for layer in weights.layers:
        fields = (getattr(layer, name) for name in layer.__slots__)
        tensors += [tensor for tensor in fields if isinstance(tensor, torch.Tensor)]
    return tensors


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(checkpoint: Path, value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, :2] = torch.tensor([value, -value])

    _edit(checkpoint, damage)
    with pytest.raises(BaseModelError, match=f"tensor {name} in .* has values that are not finite"):
        load_weights(checkpoint, ModelConfig.from_folder(checkpoint))


def test_large_values_whose_sum_is_not_finite_are_fine(checkpoint: Path) -> None:
    _edit(checkpoint, lambda tensors: tensors["model.norm.weight"][:4].fill_(3e38))
    assert load_weights(checkpoint, ModelConfig.from_folder(checkpoint)).final_norm[3] == torch.tensor(3e38)
