"""`shoplm adapt`: from a bundle and its log to an adapter in PEFT's format."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from shoplm.bundle import read_manifest
from shoplm.catalog.items import read_catalog
from shoplm.errors import BundleError
from shoplm.model.base import resolve_base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.tokenizer import Tokenizer
from shoplm.prompt import PromptBuilder
from shoplm.retrieval import read_knowledge
from shoplm.training.adapt.conversations import FactWriter, talk_prompts
from shoplm.training.adapt.kept import ChatKept, measure_kept
from shoplm.training.adapt.model import AdaptedModel
from shoplm.training.adapt.replay import Replay, replays_of
from shoplm.training.adapt.trainer import AdapterTrainer, AdaptSettings
from shoplm.training.catalogue import token_texts
from shoplm.training.evaluation import Say
from shoplm.training.log import ShopLog
from shoplm.training.run import Bar, read_model, shop_of_bundle

TALK_PROMPTS = 480
HELD_OUT_PROMPTS = 40


@dataclass(frozen=True, slots=True)
class AdaptRequest:
    """What `shoplm adapt` was asked for."""

    bundle: Path
    out: Path
    base: str | None
    steps: int
    rank: int
    seed: int


class AdaptRun:
    """One run: everything is loaded here, trained in `train`, measured in `measure`."""

    def __init__(self, request: AdaptRequest, log: ShopLog, say: Say, progress: Bar) -> None:
        """Raises BundleError where bundle, base and log do not belong together."""
        self._request, self._say, self._progress = request, say, progress
        manifest = read_manifest(request.bundle)
        base = self._base = resolve_base(request.base)
        if manifest.base.fingerprint != base.fingerprint:
            raise BundleError(
                f"{request.bundle} was trained on {manifest.base.name}, not on these weights of {base.name}"
            )
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
        self._model = AdaptedModel(
            base.folder,
            [self._tokenizer.encode(text) for text in token_texts(self._catalog)],
            rows,
            manifest.score.repeat_weight,
            len(self._shop.timeline.horizons),
            request.rank,
        )
        self._trainer = AdapterTrainer(
            self._model,
            self._builder,
            self._shop,
            FactWriter(self._catalog, read_knowledge(request.bundle).passages, manifest.currency),
            self._replays,
            self._tokenizer,
            AdaptSettings(request.steps, request.rank, decay_days=manifest.score.decay_days, seed=request.seed),
            request.out,
        )

    def train(self) -> None:
        """To the last step; from the checkpoint, if there is one."""
        begun, already = time.monotonic(), self._trainer.resume()

        def report(step: int, losses: dict[str, float]) -> None:
            self._progress("steps", step, self._request.steps)
            text = ", ".join(f"{name} {value:.3f}" for name, value in sorted(losses.items()))
            speed = (self._trainer.tokens - already) / (time.monotonic() - begun)
            self._say(f"step {step}: {text}; {speed:.0f} tokens/s")

        self._trainer.run(report)

    def measure(self) -> ChatKept:
        """What is left of ordinary talk, on prompts that were not trained on."""
        seed = self._request.seed + 1
        trained = {replay.suffix for replay in self._replays}
        fresh = [each for each in self._answers("held-out.json", HELD_OUT_PROMPTS, seed) if each.suffix not in trained]
        histories, until = self._shop.histories, self._shop.timeline.test_at
        customers = np.random.default_rng(seed).choice(len(histories), min(16, len(histories)), replace=False)
        prefixes = [self._builder.prefix(histories[customer].before(until)).tokens for customer in customers.tolist()]
        return measure_kept(self._model, self._builder, fresh, prefixes)

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
            progress=lambda done, total: self._progress(f"the base's answers for {name}", done, total),
        )


def adapt(request: AdaptRequest, log: ShopLog, say: Say, progress: Bar) -> Path:
    """Train an adapter and measure what is left of chat; returns the adapter's folder."""
    run = AdaptRun(request, log, say, progress)
    run.train()
    kept = run.measure()
    (request.out / "kept.json").write_bytes(msgspec.json.format(msgspec.json.encode(kept), indent=1) + b"\n")
    say(
        f"perplexity of {kept.answers} held-out answers: base {kept.base:.2f}, adapted {kept.adapted:.2f}, behind a "
        f"history {kept.adapted_behind_history:.2f} (the base there: {kept.base_behind_history:.0f})"
    )
    return request.out / "adapter"
