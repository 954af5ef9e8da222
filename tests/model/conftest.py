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

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TinyModel = Callable[[str], Path]

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
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "mistral": transformers.MistralConfig,
        "smollm3": transformers.SmolLM3Config,
    }[family]
    config = config_class(**{**COMMON, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(20180101 + list(FAMILIES).index(family))
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


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Runs the test once for every supported family."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def default_base() -> Path:
    """Folder of the converted default base model. Mark users with `real_base`."""
    from shoplm.model.base import cached_default_base

    folder = cached_default_base()
    if folder is None:
        pytest.skip("the default base model is not in the local cache: run `make base` once to fetch and convert it")
    return folder
