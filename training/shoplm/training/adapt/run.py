"""`shoplm adapt`: from a bundle and its log to an adapter in PEFT's format."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from shoplm.bundle import read_manifest
from shoplm.catalog.items import read_catalog
from shoplm.errors import BundleError
from shoplm.model.base import resolve_base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.tokenizer import Tokenizer
from shoplm.prompt import PromptBuilder
from shoplm.retrieval import read_knowledge
from shoplm.training.adapt.conversations import FactWriter, talk_prompts
from shoplm.training.adapt.model import AdaptedModel
from shoplm.training.adapt.replay import load_replays, write_replays
from shoplm.training.adapt.trainer import AdapterTrainer, AdaptSettings
from shoplm.training.catalogue import token_texts
from shoplm.training.log import ShopLog
from shoplm.training.ranker import OutputRows
from shoplm.training.run import shop_of_bundle

Say = Callable[[str], None]
_TALK_PROMPTS = 480


@dataclass(frozen=True, slots=True)
class AdaptRequest:
    """What `shoplm adapt` was asked for."""

    bundle: Path
    out: Path
    base: str | None
    steps: int
    rank: int
    seed: int


def adapt(request: AdaptRequest, log: ShopLog, say: Say, progress: Callable[[str, int, int], None]) -> Path:
    """Train an adapter; returns its folder. Raises BundleError where bundle, base and log do not belong together."""
    manifest = read_manifest(request.bundle)
    base = resolve_base(request.base)
    if manifest.base.fingerprint != base.fingerprint:
        raise BundleError(f"{request.bundle} was trained on {manifest.base.name}, not on these weights of {base.name}")
    shop = shop_of_bundle(request.bundle, manifest, log)
    catalog = read_catalog(request.bundle)
    tokenizer = Tokenizer.from_folder(base.folder)
    builder = PromptBuilder(
        tokenizer,
        ChatTemplate.from_folder(base.folder),
        manifest.prompt,
        shop.items.vocabulary(base.config.vocab_size),
    )
    request.out.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(request.seed)
    replays = load_replays(request.out / "replays.json")
    if replays is None:
        say("the base answers prompts whose answers are to be kept")
        replays = write_replays(
            request.out / "replays.json",
            base.folder,
            builder,
            talk_prompts(catalog, _TALK_PROMPTS, random),
            tokenizer.end_token_ids,
            seed=request.seed,
            progress=lambda done, total: progress("answers", done, total),
        )
    tensors = load_file(request.bundle / "weights.safetensors")
    rows = OutputRows(tensors["output_rows.0"].float(), tensors["output_bias.0"].float())
    torch.manual_seed(request.seed)
    model = AdaptedModel(
        base.folder,
        [tokenizer.encode(text) for text in token_texts(catalog)],
        rows,
        manifest.score.repeat_weight,
        len(shop.timeline.horizons),
        request.rank,
    )
    facts = FactWriter(catalog, read_knowledge(request.bundle).passages, manifest.currency)
    settings = AdaptSettings(steps=request.steps, rank=request.rank, decay_days=manifest.score.decay_days)
    trainer = AdapterTrainer(model, builder, shop, facts, replays, tokenizer, settings, request.out)
    begun = time.monotonic()

    def report(step: int, losses: dict[str, float]) -> None:
        progress("steps", step, request.steps)
        text = ", ".join(f"{name} {value:.3f}" for name, value in sorted(losses.items()))
        say(f"step {step}: {text}; {trainer.tokens / (time.monotonic() - begun):.0f} tokens/s")

    trainer.run(report)
    return request.out / "adapter"
