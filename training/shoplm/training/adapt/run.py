"""`shoplm adapt`: from a bundle and its log to an adapter in PEFT's format, or to a tuned base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from shoplm.bundle import read_manifest
from shoplm.catalog.items import read_catalog
from shoplm.engine.shop_texts import token_texts
from shoplm.errors import ConfigurationError
from shoplm.model.base import resolve_base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.tokenizer import Tokenizer
from shoplm.prompt import PromptBuilder
from shoplm.retrieval import read_knowledge
from shoplm.served import check_base
from shoplm.training.adapt.causal import CPU
from shoplm.training.adapt.chat_kept import (
    TALK_PROMPTS,
    held_out,
    measure_kept,
    some_prefixes,
    strength_that_keeps_chat,
)
from shoplm.training.adapt.conversations import FactWriter, talk_prompts
from shoplm.training.adapt.model import AdaptedModel, TalkingModel, TunedModel
from shoplm.training.adapt.replay import Replay, replays_of
from shoplm.training.adapt.saved_base import check_place
from shoplm.training.adapt.trainer import CHECKPOINT, AdaptSettings, JointTrainer, Talk
from shoplm.training.log import ShopLog
from shoplm.training.ranker import OutputRows
from shoplm.training.report import ChatKept
from shoplm.training.run import read_model, shop_of_bundle
from shoplm.training.watch import Watch

FULL_LEARNING_RATE = 3e-5  # ten times less than an adapter takes: every weight moves


@dataclass(frozen=True, slots=True)
class AdaptRequest:
    """What `shoplm adapt` was asked for."""

    bundle: Path
    out: Path
    base: str | None
    steps: int
    rank: int | None  # of the adapter; None: all layers of the base are trained
    checkpointing: bool
    seed: int
    device: torch.device = CPU


class AdaptRun:
    """One run: everything is loaded here, trained in `train`, weighed and measured in `finish`."""

    def __init__(self, request: AdaptRequest, log: ShopLog, watch: Watch) -> None:
        """Raises BundleError where bundle, base and log do not belong together, ConfigurationError where the
        result would replace other things."""
        self._request, self._watch = request, watch
        if request.rank is None:  # before hours of training, not at the first checkpoint
            check_place(request.out / TunedModel.saved_as, TunedModel.origin)
        else:
            _check_adapter_place(request.out)
        manifest = read_manifest(request.bundle)
        base = self._base = resolve_base(request.base)
        check_base(request.bundle, manifest, base)
        self._shop = shop_of_bundle(request.bundle, manifest, log)
        self._catalog = read_catalog(request.bundle)
        self._tokenizer = Tokenizer.from_folder(base.folder)
        self._builder = PromptBuilder(
            self._tokenizer,
            ChatTemplate.from_folder(base.folder),
            manifest.prompt,
            self._shop.items.vocabulary(base.config.vocab_size),
        )
        request.out.mkdir(parents=True, exist_ok=True)
        self._replays = self._answers("replays.json", TALK_PROMPTS, request.seed)
        rows = read_model(request.bundle, manifest).rows
        torch.manual_seed(request.seed)
        self._model = self._make_model(rows, manifest.score.repeat_weight)
        facts = FactWriter(self._catalog, read_knowledge(request.bundle), manifest.currency)
        settings = AdaptSettings(request.steps, decay_days=manifest.score.decay_days, seed=request.seed)
        if request.rank is None:
            settings = replace(settings, learning_rate=FULL_LEARNING_RATE)
        self._trainer = JointTrainer(
            self._model,
            self._builder,
            self._shop,
            settings,
            request.out,
            Talk(facts, self._replays, self._tokenizer),
        )

    def _make_model(self, rows: OutputRows, repeat_weight: float) -> TalkingModel:
        request, horizons = self._request, len(self._shop.timeline.horizons)
        texts = [self._tokenizer.encode(text) for text in token_texts(self._catalog)]
        common = (self._base.folder, texts, rows, repeat_weight, horizons)
        if request.rank is None:
            return TunedModel(*common, checkpointing=request.checkpointing, device=request.device)
        return AdaptedModel(*common, request.rank, checkpointing=request.checkpointing, device=request.device)

    @property
    def saved_as(self) -> str:
        """The folder of the result, in `out`."""
        return self._model.saved_as

    def train(self) -> None:
        """Train to the last step, from the checkpoint if there is one."""
        self._trainer.resume()
        self._trainer.run(self._watch)

    def finish(self) -> ChatKept:
        """Saves an adapter at the strength that keeps chat, and measures what is left of ordinary talk, on prompts that
        were used for neither."""
        model, seed = self._model, self._request.seed
        prefixes = some_prefixes(self._shop, self._builder, seed)
        fresh = self._held_out("held-out.json", part=0)
        if not isinstance(model, AdaptedModel):
            return measure_kept(model, self._builder, fresh, prefixes, self._watch)
        others = self._held_out("strength.json", part=1)
        strength = strength_that_keeps_chat(model, self._builder, others, self._watch)
        self._watch.say(f"the adapter is kept at {strength:g} times its trained strength")
        model.save(self._request.out / model.saved_as, strength)
        with model.at_strength(strength):
            return measure_kept(model, self._builder, fresh, prefixes, self._watch)

    def _held_out(self, name: str, part: int) -> list[Replay]:
        path, seed = self._request.out / name, self._request.seed
        parts = (self._catalog, self._base, self._builder, self._tokenizer, seed, self._watch)
        return held_out(path, *parts, part=part)

    def _answers(self, name: str, count: int, seed: int) -> list[Replay]:
        prompts = talk_prompts(self._catalog, count, np.random.default_rng(seed))
        ends = self._tokenizer.end_token_ids
        return replays_of(
            self._request.out / name,
            self._base.folder,
            self._builder,
            prompts,
            ends,
            seed=seed,
            progress=lambda done, total: self._watch.advance(f"the base's answers for {name}", done, total),
        )


def _check_adapter_place(out: Path) -> None:
    """Raises ConfigurationError where an adapter is there that no run in this folder goes on with."""
    folder = out / AdaptedModel.saved_as
    if folder.exists() and not (out / CHECKPOINT).exists():
        raise ConfigurationError(
            f"{folder} is there, and no checkpoint beside it that this run could go on from: its files would be lost; "
            "name another --out"
        )


def adapt(request: AdaptRequest, log: ShopLog, watch: Watch) -> Path:
    """Train an adapter, or all layers, and measure what is left of chat; returns the folder of the result."""
    run = AdaptRun(request, log, watch)
    run.train()
    kept = run.finish()
    (request.out / "kept.json").write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
    watch.say(
        f"perplexity of {kept.answers} held-out answers: base {kept.base:.2f}, adapted {kept.adapted:.2f}, behind a "
        f"history {kept.adapted_behind_history:.2f} (the base there: {kept.base_behind_history:.0f})"
    )
    return request.out / run.saved_as
