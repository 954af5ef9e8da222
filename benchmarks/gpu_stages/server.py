"""End-to-end throughput through gRPC: a server of its own on loopback, random weights of the 135M model's shape.

Needs what the server needs and the generated protobuf code; `gpu.py` skips the stage where something is missing.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from shoplm.bench.launch import own_server
from shoplm.bench.offline import OUTPUTS, PROMPTS, run_offline
from shoplm.model.config import ModelConfig
from shoplm.model.weights import DecoderWeights
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gpu_stages.common import Stage
from gpu_stages.models import CONFIGS, random_weights


def throughput(stage: Stage) -> None:
    """Prompt and output tokens per second of many requests at once."""
    folder = stage.path.parent / "base"
    folder.mkdir(exist_ok=True)
    config = CONFIGS["135M"]
    save_base(folder, config, random_weights(config, torch.bfloat16, torch.device("cpu")))
    backend = ["--backend", "torch"] if stage.smoke else ["--backend", "triton", "--graph-seconds", "10"]
    arguments = ["--base", str(folder), *backend, "--max-step-tokens", "8192"]
    with own_server(arguments, stage.path.parent / "server.log", start_seconds=70.0) as server:
        wide = stage.size(128, 2)
        for shape in (PROMPTS, OUTPUTS):
            runs = stage.size(3, 1)
            result = asyncio.run(run_offline(server.address, replace(shape, requests=wide), runs=runs))
            label = f"{wide} x {shape.prompt_tokens} in, {shape.output_tokens} out"
            stage.row(f"prompt tokens, {label}", result.prompt_tokens_per_second, "token/s")
            stage.row(f"output tokens, {label}", result.output_tokens_per_second, "token/s")


def save_base(folder: Path, config: ModelConfig, weights: DecoderWeights) -> None:
    """A Hugging Face folder: config, weights under their published names, and a byte-level tokenizer."""
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": [config.architecture],
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "vocab_size": config.vocab_size,
                "max_position_embeddings": config.max_positions,
                "rms_norm_eps": config.rms_norm_eps,
                "rope_theta": config.rope.theta,
                "tie_word_embeddings": config.tied_head,
                "eos_token_id": 0,
            }
        )
    )
    tensors = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for at, layer in enumerate(weights.layers):
        prefix = f"model.layers.{at}"
        q, k, v = layer.qkv[:query], layer.qkv[query:-key], layer.qkv[-key:]
        gate, up = layer.gate_up.chunk(2)
        named = {
            "input_layernorm": layer.input_norm, "post_attention_layernorm": layer.mlp_norm, "self_attn.q_proj": q,
            "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": layer.output, "mlp.gate_proj": gate,
            "mlp.up_proj": up, "mlp.down_proj": layer.down,
        }  # fmt: skip
        tensors |= {f"{prefix}.{name}.weight": tensor.clone() for name, tensor in named.items()}
    save_file(tensors, folder / "model.safetensors")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a shop sells things"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": _CHAT}))


_CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
