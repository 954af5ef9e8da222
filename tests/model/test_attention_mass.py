"""Attention mass is that of the model, by transformers' eager attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from shoplm.model.attention_mass import attention_mass
from shoplm.model.config import ModelConfig
from shoplm.model.weights import load_weights
from transformers import AutoModelForCausalLM

TinyModel = Callable[[str], Path]
SPANS = ((0, 5), (5, 30), (30, 47), (47, 48))


@pytest.mark.parametrize("family", ["smollm2", "qwen2", "qwen3", "mistral"])
def test_mass_is_the_models_own_attention(tiny_model: TinyModel, family: str) -> None:
    folder = tiny_model(family)
    tokens = np.random.default_rng(2).integers(3, 448, 48).tolist()
    config = ModelConfig.from_folder(folder)
    mass = attention_mass(config, load_weights(folder, config), None, tokens, SPANS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        layers = model(torch.tensor([tokens]), output_attentions=True).attentions
    for found, layer in zip(mass, layers, strict=True):
        expected = [layer[0, :, -1, start:end].sum(-1).numpy() for start, end in SPANS]
        np.testing.assert_allclose(found, np.stack(expected, -1), atol=1e-4)
    np.testing.assert_allclose(mass.sum(-1), 1.0, atol=1e-5)
