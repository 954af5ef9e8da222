"""A converted GGUF file is the model that it was made from."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from shoplm.errors import BaseModelError
from shoplm.model.chat_template import ChatTemplate, Piece
from shoplm.model.config import ModelConfig
from shoplm.model.convert import convert_gguf
from shoplm.model.gguf_tokenizer import gguf_tokenizer
from shoplm.model.tokenizer import Tokenizer

TinyModel = Callable[[str], Path]
TinyGguf = Callable[..., Path]


def _load(folder: Path) -> Any:
    return importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family_name", ["smollm2", "qwen3", "mistral"])
def test_converts_what_was_written(
    tiny_model: TinyModel, tiny_gguf: TinyGguf, family_name: str, tmp_path: Path
) -> None:
    original = tiny_model(family_name)
    seen: list[tuple[int, int]] = []
    convert_gguf(tiny_gguf(family_name, "F32"), tmp_path, lambda done, total: seen.append((done, total)))
    expected, actual = _load(original).state_dict(), _load(tmp_path).state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_folder(original)
    assert ChatTemplate.from_folder(tmp_path).source == ChatTemplate.from_folder(original).source
    ours, theirs = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(original)
    for text in ("Hello milk,  42 naïve 日本\n", "", " a<|im_end|></s>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode_pieces([Piece(text, None)]) == theirs.encode_pieces([Piece(text, None)])
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.end_token_ids == theirs.end_token_ids == (2,)
    assert seen[-1][0] == seen[-1][1] > 0 and seen == sorted(seen)


def test_qkv_bias(tiny_model: TinyModel, tiny_gguf: TinyGguf, tmp_path: Path) -> None:
    """GGUF does not say which layers of a Qwen2 have a sliding window, so this compares the weights alone."""
    convert_gguf(tiny_gguf("qwen2", "F32"), tmp_path)
    expected, actual = _load(tiny_model("qwen2")).state_dict(), _load(tmp_path).state_dict()
    assert "model.layers.0.self_attn.q_proj.bias" in actual
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert ModelConfig.from_folder(tmp_path).rope == ModelConfig.from_folder(tiny_model("qwen2")).rope


@pytest.mark.parametrize(("quantisation", "dtype", "tolerance"), [("Q8_0", torch.bfloat16, 0.01), ("F16", None, 1e-3)])
def test_quantised(
    tiny_model: TinyModel, tiny_gguf: TinyGguf, tmp_path: Path, quantisation: str, dtype: Any, tolerance: float
) -> None:
    from safetensors.torch import load_file

    convert_gguf(tiny_gguf("qwen3", quantisation), tmp_path)
    actual = load_file(tmp_path / "model.safetensors")
    expected = _load(tiny_model("qwen3")).state_dict()
    assert {tensor.dtype for tensor in actual.values()} == {dtype or torch.bfloat16}
    for name, tensor in expected.items():
        assert (actual[name].float() - tensor).abs().max() <= tolerance * max(1.0, float(tensor.abs().max())) + 0.004


def test_bf16_rounds_to_nearest_even(tiny_gguf: TinyGguf, tiny_model: TinyModel, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    original, folder = tmp_path / "original", tmp_path / "converted"
    shutil.copytree(tiny_model("qwen3"), original)
    folder.mkdir()
    tensors = load_file(original / "model.safetensors")
    name = "model.norm.weight"  # a vector stays fp32 in the file, also in a quantised model
    half = 2.0**-8  # of the distance of two bf16 numbers between 1 and 2
    tensors[name][:4] = torch.tensor([1 + half, 1 + 3 * half, -1 - half, 1.99 + half / 3])
    save_file(tensors, original / "model.safetensors")
    convert_gguf(tiny_gguf("qwen3", "Q8_0", original), folder)
    assert torch.equal(load_file(folder / "model.safetensors")[name], tensors[name].bfloat16())


def test_llama3_rope(tiny_model: TinyModel, tiny_gguf: TinyGguf, tmp_path: Path) -> None:
    """GGUF holds Llama 3's RoPE scaling as factors; they are recognised, or refused if they are not Llama 3's."""
    with pytest.raises(BaseModelError, match=r"rope_freqs.*not those of Llama 3"):
        convert_gguf(tiny_gguf("llama", "F32"), tmp_path)  # the tiny model's pretraining had a shorter context
    original, folder = tmp_path / "original", tmp_path / "converted"
    shutil.copytree(tiny_model("llama"), original)
    folder.mkdir()
    raw = json.loads((original / "config.json").read_text())
    raw["rope_parameters"] |= {"factor": 32.0, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    (original / "config.json").write_text(json.dumps(raw))
    convert_gguf(tiny_gguf("llama", "F32", original), folder)
    assert ModelConfig.from_folder(folder).rope == ModelConfig.from_folder(original).rope
    expected, actual = _load(original).state_dict(), _load(folder).state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def _fields(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a"], "token_type": [1], "merges": []}
    return {f"tokenizer.ggml.{name}": value for name, value in {**fields, **changes}.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "falcon"}, "pre-tokenizer 'falcon'"),
        ({"pre": None}, "pre-tokenizer None"),
        ({"model": "t5"}, "tokenizer 't5'"),
        ({"tokens": None}, r"no tokenizer\.ggml\.tokens"),
        ({"token_type": [1, 1]}, "1 tokens but 2 token types"),
    ],
)
def test_refuses_tokenizers_that_it_would_get_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        gguf_tokenizer(_fields(**changes))


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "it's 2018  ok", ["it", "'s", " 2018", " ", " ok"]),
        ("smollm", "it's 2018  ok", ["it", "'s", " ", "2", "0", "1", "8", " ", " ok"]),
        ("llama-bpe", "IT'S 20181\n\n ok!\n", ["IT", "'S", " ", "201", "81", "\n\n", " ok", "!\n"]),
        ("qwen2", "IT'S 2018\n\n ok!\n", ["IT", "'S", " ", "2", "0", "1", "8", "\n\n", " ok", "!\n"]),
    ],
)
def test_words_are_split_as_the_model_was_trained(pre: str, text: str, words: list[str]) -> None:
    splitter = gguf_tokenizer(_fields(pre=pre)).pre_tokenizer
    assert splitter is not None
    assert [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)] == words


def _write(path: Path, architecture: str, **values: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in values.items():
        writer.add_uint32(name.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_refuses_models_that_it_cannot_convert(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    folder.mkdir()
    with pytest.raises(BaseModelError, match=r"architecture 'gemma' is not supported; supported are llama"):
        convert_gguf(_write(tmp_path / "a.gguf", "gemma"), folder)
    with pytest.raises(BaseModelError, match="split over several"):
        convert_gguf(_write(tmp_path / "b.gguf", "llama", split__count=3), folder)
    with pytest.raises(BaseModelError, match=r"b\.gguf.*no llama\.attention\.head_count"):
        convert_gguf(_write(tmp_path / "b.gguf", "llama"), folder)
    with pytest.raises(BaseModelError, match="a sliding window"):
        convert_gguf(_write(tmp_path / "c.gguf", "qwen2", qwen2__attention__sliding_window=7), folder)
    (tmp_path / "d.gguf").write_bytes(b"GGUF and then nothing")
    with pytest.raises(BaseModelError, match="cannot be read as GGUF"):
        convert_gguf(tmp_path / "d.gguf", folder)


def test_refuses_values_that_are_not_finite(tiny_model: TinyModel, tiny_gguf: TinyGguf, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged, folder = tmp_path / "damaged", tmp_path / "converted"
    shutil.copytree(tiny_model("qwen3"), damaged)
    folder.mkdir()
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"output_norm\.weight has values that are not finite"):
        convert_gguf(tiny_gguf("qwen3", "F32", damaged), folder)
    tensors["model.norm.weight"][3] = 3.4e38
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"output_norm\.weight has values beyond 3\.39e\+38, the largest of BF16"):
        convert_gguf(tiny_gguf("qwen3", "F16", damaged), folder)
