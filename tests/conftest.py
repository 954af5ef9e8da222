"""Tiny random models of every supported family, and the default base model from the local cache.

The tiny models are made by transformers with a fixed seed. Every parameter is random, also those that transformers
initialises to a constant (biases, norms), so that a part of the model that is left out changes the result.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TinyModel = Callable[[str], Path]

hypothesis.settings.register_profile("shoplm", deadline=None)  # on a shared machine any example may take long
hypothesis.settings.load_profile("shoplm")

VOCAB_SIZE = 448  # more rows than the tokenizers have tokens, as in many published models
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 56,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Each family shows another trait: what is named here is what a decoder or a loader can get wrong.
FAMILIES: dict[str, dict[str, Any]] = {
    # untied head, llama3 RoPE, sharded checkpoint
    "llama": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    # tied head, three heads on one
    "smollm2": {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    # QKV bias, linear RoPE scaling, tied head, a sliding window from the second layer on
    "qwen2": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        "tie_word_embeddings": True,
    },
    # QK-norm, head_dim that is not hidden_size / heads, YaRN
    "qwen3": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    # sliding window, sentencepiece-style tokenizer
    "mistral": {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    # every second layer without RoPE
    "smollm3": {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "no_rope_layer_interval": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        "pad_token_id": 0,
    },
}
# As smollm2, as wide as the C++ decoder's tiles.
TILED: dict[str, Any] = {
    **FAMILIES["smollm2"],
    "hidden_size": 192,
    "intermediate_size": 128,
}

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a test model.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INSTRUCTIONS = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CHAT_TEMPLATES = {"llama": HEADERS, "mistral": INSTRUCTIONS}
CORPUS = (
    "The shop sells milk, bread, cheese and apples. A customer bought two apples and one bread yesterday.",
    "Please recommend something for the customer who bought milk. You are a helpful assistant of the shop.",
    "What is the return policy? Returns are accepted within thirty days. Delivery is free over fifty euros.",
    "user assistant system question answer hello there, how are you today? I am fine, thank you very much.",
)


def _byte_level_tokenizer() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM: bytes are the alphabet, special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2 and Mistral: a leading space as `▁`, unknown characters as bytes."""
    trained = Tokenizer(models.BPE())
    trained.train_from_iterator(
        ["▁" + text.replace(" ", "▁") for text in CORPUS], trainers.BpeTrainer(vocab_size=120, show_progress=False)
    )
    state = _model_state(trained)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(state["vocab"], key=state["vocab"].__getitem__)
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _model_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """The `model` part of tokenizer.json: vocabulary and merges."""
    state: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return state


def _save_tiny_model(family: str, folder: Path) -> None:
    import torch

    transformers: Any = importlib.import_module("transformers")  # partly untyped
    config_class = {
        "llama": transformers.LlamaConfig,
        "smollm2": transformers.LlamaConfig,
        "native": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
        "smollm3": transformers.SmolLM3Config,
    }[family]
    traits = TILED if family == "native" else FAMILIES[family]
    config = config_class(**{**COMMON, **traits})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(20180101 + [*FAMILIES, "native"].index(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if name.endswith("norm.weight") else 0.25 * noise)
    model.save_pretrained(folder, max_shard_size="60KB" if family == "llama" else "1GB")
    tokenizer = _sentencepiece_tokenizer() if family == "mistral" else _byte_level_tokenizer()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if family != "mistral":
        tokens = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    fast.chat_template = CHAT_TEMPLATES.get(family, CHATML)
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """`tiny_model(family)`: folder of a tiny fp32 model with tokenizer and chat template, made once per session."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            _save_tiny_model(family, folder)
            folders[family] = folder
        return folders[family]

    return make


GGUF_ARCHITECTURES = {"smollm2": "llama", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "mistral": "llama"}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def _save_tiny_gguf(family: str, folder: Path, path: Path, quantisation: str) -> None:
    """Writes a tiny model as llama.cpp's converter would: other names, queries and keys in pairs for `llama`."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    writer = gguf.GGUFWriter(path, GGUF_ARCHITECTURES[family])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings", 0))
    if family == "mistral":
        writer.add_sliding_window(config["sliding_window"])
    _add_gguf_tokenizer(writer, folder, family)
    kind = gguf.GGMLQuantizationType[quantisation]
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            stem, _, suffix = name.rpartition(".")
            layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
            part = stem.split(".", 3)[3] if layer is not None else stem
            if GGUF_ARCHITECTURES[family] == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                tensor = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
            target = f"{GGUF_NAMES[part]}.{suffix}" if layer is None else f"blk.{layer}.{GGUF_NAMES[part]}.{suffix}"
            matrix = tensor.ndim > 1 and quantisation != "F32" and tensor.shape[-1] % 32 == 0
            data = gguf.quants.quantize(tensor, kind) if matrix else np.ascontiguousarray(tensor)
            writer.add_tensor(target, data, raw_dtype=kind if matrix else None)
    if rope["rope_type"] == "llama3":
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        plain = LlamaConfig(**{**config, "rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"]}})
        factors = LlamaRotaryEmbedding(plain).inv_freq / LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_gguf_tokenizer(writer: Any, folder: Path, family: str) -> None:
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(saved["model"]["vocab"], key=saved["model"]["vocab"].__getitem__)
    special = {token["content"] for token in saved["added_tokens"]}
    padding = [f"[PAD{index}]" for index in range(len(vocabulary), VOCAB_SIZE)]
    types = [3 if token in special else 6 if token.startswith("<0x") else 1 for token in vocabulary]
    writer.add_token_list([*vocabulary, *padding])
    writer.add_token_types([*types, *(5 for _ in padding)])
    if family == "mistral":
        ranks = {"".join(pair): -float(rank) for rank, pair in enumerate(saved["model"]["merges"])}
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([ranks.get(token, -1e6) for token in (*vocabulary, *padding)])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATES.get(family, CHATML))


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_gguf(family, "F32")`: the tiny model, or another of its family in `folder`, as a GGUF file."""

    def make(family: str, quantisation: str, folder: Path | None = None) -> Path:
        path = tmp_path_factory.mktemp("gguf") / f"tiny-{family}-{quantisation}.gguf"
        _save_tiny_gguf(family, folder or tiny_model(family), path, quantisation)
        return path

    return make


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Runs the test once for every supported family."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def default_base() -> Path:
    """Folder of the converted default base model. Mark users with `real_base`."""
    from shoplm.model.base_cache import DEFAULT_MODEL, cache_folder, converted

    folder = cache_folder() / "bases" / DEFAULT_MODEL.folder_name
    if not converted(folder):
        pytest.skip("the default base model is not in the local cache: start `make serve` once to fetch and convert it")
    return folder
