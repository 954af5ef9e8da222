"""A whole training run, and a whole evaluation."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file
from shoplm.bundle import ShopManifest, read_manifest
from shoplm.catalog.items import read_catalog
from shoplm.engine.load import load_backend
from shoplm.engine.spec import EngineSpec
from shoplm.errors import BundleError, ConfigurationError
from shoplm.features import FEATURE_VERSION
from shoplm.history import utc_moment
from shoplm.model.base import Base, bundle_base, resolve_base
from shoplm.model.origin import Origin
from shoplm.readout.habits import load_habits
from shoplm.readout.rebuy import load_rebuy
from shoplm.retrieval import read_texts
from shoplm.served import check_base, load_served
from shoplm.training import pipeline
from shoplm.training.adapt.causal import CPU
from shoplm.training.adapt.chat_kept import measure_adapter
from shoplm.training.bundle_writer import Identity, choose_demo_customers, write_bundle
from shoplm.training.card import render_card
from shoplm.training.card_explanations import record
from shoplm.training.catalogue import ShopItems, choose_items
from shoplm.training.determinism import deterministic
from shoplm.training.evaluation import measure
from shoplm.training.explanations import measure_explanations, shuffled
from shoplm.training.formats import UNROUNDED, Formats
from shoplm.training.habits import read_habits
from shoplm.training.heads import Head, Standard
from shoplm.training.hidden import HiddenStates
from shoplm.training.histories import Histories
from shoplm.training.log import ShopLog
from shoplm.training.model import Model
from shoplm.training.predictions import Predictor
from shoplm.training.ranker import OutputRows, RankerSettings
from shoplm.training.report import ExplanationResult, Report, Sample
from shoplm.training.scoring import Weights
from shoplm.training.scratch import MINUTES_SHARE, ScratchRun, scratch_size
from shoplm.training.shop import Shop
from shoplm.training.timeline import make_timeline
from shoplm.training.watch import Watch
from shoplm.vocabulary import SPECIAL_TEXTS

_SPEED_CUSTOMERS = 3
_KV_BYTES = 256 << 20  # of the engine that explanations are measured with


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """What `shoplm train` was asked for."""

    out: Path
    base: str | None
    adapter: Path | None
    knowledge: Path | None
    name: str
    title: str
    preamble: str
    currency: str
    notice: str
    notes: str  # for the card
    history_tokens: int
    history_block: int
    minutes: float | None  # None: as long as needed
    max_customers: int | None  # None: as many as the time allows
    demo_customers: int
    epochs: int
    seed: int
    work: Path
    explained: int = 0  # customers whose explanations are measured
    device: torch.device = CPU  # of what is trained from nothing


@dataclass(frozen=True)
class Loaded:
    """A base and what it computes for this shop."""

    base: Base
    states: HiddenStates
    embeddings: torch.Tensor  # [items, H]: input rows of the catalogue's items
    input_rows: torch.Tensor | None  # [shop tokens, H] where the bundle has to store them


class Run:
    """One training run: everything is loaded and numbered here, computed in `train`."""

    def __init__(self, request: TrainRequest, log: ShopLog, watch: Watch) -> None:
        """Raises ConfigurationError for a log that cannot be cut in time and a base that cannot be used, BundleError
        for a text that cannot be read."""
        torch.manual_seed(request.seed)
        self._request = request
        self._watch = watch
        size = scratch_size(request.base)
        base = None if size is not None else resolve_base(request.base)
        if request.knowledge is not None:
            passages = len(read_texts(request.knowledge))
            watch.say(f"{passages:,} passages for chat in the .md files of {request.knowledge}")
        watch.say("numbering customers and items")
        self._shop = pipeline.prepare(log)
        self._schema = pipeline.prompt_schema(
            self._shop,
            request.preamble,
            request.history_tokens,
            request.history_block,
            adapted=request.adapter is not None or (base is not None and base.origin is Origin.ADAPTED),
        )
        self._catalog = pipeline.write_items(self._shop.items, request.work / "items")
        self._scratch: ScratchRun | None = None
        self._loaded: Loaded | None = None
        if base is not None:
            self._loaded = self._load(base, None)
        elif request.adapter is not None:
            raise ConfigurationError(f"--base {request.base} trains a base of its own: leave --adapter out")
        elif size is not None:
            arguments = (self._shop, self._catalog, self._schema, request.work, request.seed)
            self._scratch = ScratchRun(size, *arguments, device=request.device)

    def _load(self, base: Base, input_rows: torch.Tensor | None) -> Loaded:
        request = self._request
        self._watch.say(f"loading {base.name}")
        states, reader = pipeline.hidden_states(
            self._shop, self._catalog, base, self._schema, request.work, request.seed, request.adapter, input_rows
        )
        first = len(SPECIAL_TEXTS)
        return Loaded(base, states, reader.input_rows[first : first + len(self._catalog)], input_rows)

    def estimate(self) -> list[tuple[str, str]]:
        """What a run would do: (what, value)."""
        request, shop = self._request, self._shop
        if self._scratch is not None:
            return [*self._facts(), *self._scratch_estimate(self._scratch)]
        assert self._loaded is not None
        per_customer = self._loaded.states.estimate_tokens()
        speed = self._loaded.states.measure_speed(_SPEED_CUSTOMERS)
        wanted = min(request.max_customers or len(shop.histories), len(shop.histories))
        seconds = wanted * per_customer / speed
        if request.minutes is not None:
            seconds = min(seconds, pipeline.HIDDEN_SHARE * 60.0 * request.minutes)
        customers = min(wanted, int(seconds * speed / max(per_customer, 1e-9)))
        return [
            *self._facts(),
            ("tokens per customer", f"{per_customer:,.0f}"),
            ("tokens per second here", f"{speed:,.0f}"),
            ("customers", f"{customers:,} of {len(shop.histories):,}"),
            ("tokens", f"{customers * per_customer:,.0f}"),
            ("epochs", f"at most {request.epochs}"),
            ("minutes for hidden states", f"{seconds / 60.0:.1f}"),
        ]

    def _facts(self) -> list[tuple[str, str]]:
        shop = self._shop
        return [
            ("events", f"{len(shop.log.events):,}"),
            ("items with a token of their own", f"{len(shop.items.row_item):,}"),
            ("product types", f"{len(shop.items.types):,}"),
            ("training ends", utc_moment(shop.timeline.test_at)),
        ]

    def _scratch_estimate(self, scratch: ScratchRun) -> list[tuple[str, str]]:
        seconds, steps = scratch.seconds_per_step(), scratch.epoch_steps()
        if self._request.minutes is not None:
            steps = min(steps, int(MINUTES_SHARE * 60.0 * self._request.minutes / seconds))
        return [
            ("customers", f"{len(self._shop.histories):,}"),
            ("training steps", f"{steps:,}"),
            ("seconds per step here", f"{seconds:.2f}"),
            ("minutes for training the base", f"{steps * seconds / 60.0:.1f}"),
        ]

    def train(self) -> Report:
        """Compute, fit, measure, write. Returns the numbers of the card."""
        request, shop, watch = self._request, self._shop, self._watch
        if self._scratch is not None:
            made = self._scratch.train(request.minutes, watch)
            self._loaded = self._load(made.base, made.input_rows)
        assert self._loaded is not None
        base, states = self._loaded.base, self._loaded.states
        wanted = request.max_customers or len(shop.histories)
        begun = time.monotonic()
        table, read = pipeline.compute_states(
            states,
            wanted,
            request.minutes,
            lambda done, total, tokens: watch.advance("hidden states", done, total, tokens),
        )
        watch.say(f"{len(table):,} hidden states after {(time.monotonic() - begun) / 60.0:.1f} minutes")
        settings = replace(RankerSettings(), epochs=request.epochs)
        with deterministic():
            fitted = pipeline.fit(
                shop,
                table,
                self._loaded.embeddings,
                seed=request.seed,
                settings=settings,
                watch=watch,
            )
        report = measure(shop, table, read, fitted.model, request.seed, watch.say)
        if request.adapter is not None:
            chat = measure_adapter(
                shop, self._catalog, base, self._schema, request.adapter, request.work, request.seed, watch
            )
            report = msgspec.structs.replace(report, chat=chat)
        identity = Identity(request.name, request.title, request.currency, request.notice)
        card = render_card(shop, base, self._schema, fitted, report, identity, request.notes)
        write_bundle(
            request.out,
            shop,
            base,
            self._schema,
            fitted.model,
            report,
            identity,
            card=card,
            watch=watch,
            adapter=request.adapter,
            input_rows=self._loaded.input_rows,
            knowledge=request.knowledge,
            demo_customers=choose_demo_customers(shop, request.demo_customers, request.seed),
        )
        if request.explained:
            found = explain_bundle(request.out, shop, base, customers=request.explained, seed=request.seed, watch=watch)
            record(request.out, found)
            report = msgspec.structs.replace(report, explanations=found)
        return report


def evaluate_bundle(
    folder: Path,
    log: ShopLog,
    *,
    base: str | None,
    work: Path,
    max_customers: int | None,
    explained: int,
    watch: Watch,
    formats: Formats = UNROUNDED,
) -> Report:
    """Measure a bundle with the log that it was trained on; explanations of so many customers. Raises BundleError
    where they do not belong together.

    `formats`: rankings and predictions with the base, its keys and values rounded like those of the GPU backend.
    """
    manifest = read_manifest(folder)
    resolved = bundle_base(folder, base)
    check_base(folder, manifest, resolved)
    _check_format(manifest, folder)
    card = msgspec.json.decode((folder / "metrics.json").read_bytes(), type=Sample)
    shop = shop_of_bundle(folder, manifest, log)
    if shop.fingerprint != card.log:
        raise BundleError(
            f"{folder} was trained on other events, items or profiles; evaluate with the files that it was trained on"
        )
    watch.say(f"loading {resolved.name}")
    adapter, catalog = folder if manifest.has_adapter else None, read_catalog(folder)
    common = (shop, catalog, resolved, manifest.prompt)
    states, _ = pipeline.hidden_states(*common, work, card.seed, adapter, stored_input_rows(folder), formats)
    wanted = min(max_customers or card.customers, card.customers)
    table, read = states.compute(
        wanted, None, lambda done, total, tokens: watch.advance("hidden states", done, total, tokens)
    )
    report = measure(shop, table, read, read_model(folder, manifest), card.seed, watch.say)
    if adapter is not None and formats == UNROUNDED:
        chat = measure_adapter(*common, adapter, work, card.seed, watch)
        report = msgspec.structs.replace(report, chat=chat)
    if not explained:
        return report
    found = explain_bundle(folder, shop, resolved, customers=explained, seed=card.seed, watch=watch)
    return msgspec.structs.replace(report, explanations=found)


def explain_bundle(
    folder: Path, shop: Shop, base: Base, *, customers: int, seed: int, watch: Watch
) -> ExplanationResult:
    """How true the explanations of a bundle are, as it is served."""
    served = load_served(base, folder, verify=False)
    assert served.shop is not None
    spec = EngineSpec(str(base.folder), str(folder), kv_cache_bytes=_KV_BYTES)
    return measure_explanations(
        shop,
        served.shop,
        served.prompts,
        load_backend(spec),
        load_backend(spec, lambda weights: shuffled(weights, seed)),
        customers=customers,
        seed=seed,
        advance=lambda done, total: watch.advance("explanations", done, total, 0),
    )


def stored_input_rows(folder: Path) -> torch.Tensor | None:
    """[shop tokens, H] where the bundle has rows of its own; else they are made from the items' words."""
    return load_file(folder / "weights.safetensors").get("input_rows")


def read_model(folder: Path, manifest: ShopManifest) -> Model:
    """The tensors and weights of a bundle with items of one code."""
    tensors = load_file(folder / "weights.safetensors")
    rows = OutputRows(tensors["output_rows.0"].float(), tensors["output_bias.0"].float())
    predictor = None
    if manifest.targets:
        mean, scale = tensors["head.input_mean"].numpy(), tensors["head.input_scale"].numpy()
        standard = Standard(mean, scale, *tensors["head.input_range"].numpy())
        head = Head(
            tensors["head.weight"].numpy(),
            tensors["head.bias"].numpy(),
            tensors["head.unit_weight"].numpy() if "head.unit_weight" in tensors else None,
            tensors["head.unit_bias"].numpy() if "head.unit_bias" in tensors else np.zeros(0, np.float32),
        )
        predictor = Predictor(standard, head, manifest.targets, {})
    score = manifest.score
    weights = Weights(
        1.0,
        score.repeat_weight,
        score.popularity_weight,
        score.decay_days,
        score.loyalty_weight,
        score.goes_with_weight,
        score.rebuy_weight,
        adopt=score.adopt_weight,
    )
    return Model(
        rows,
        tensors["popularity"].float(),
        weights,
        read_habits(score, tensors),
        load_rebuy(folder, manifest),
        load_habits(folder, manifest).adopt,
        predictor,
    )


def _check_format(manifest: ShopManifest, folder: Path) -> None:
    if manifest.feature_version != FEATURE_VERSION:
        raise BundleError(
            f"{folder} has features of version {manifest.feature_version}, this code {FEATURE_VERSION}; train it again"
        )
    if manifest.depth != 1:
        raise BundleError(f"{folder} has item codes of depth {manifest.depth}; only depth 1 can be evaluated")


def shop_of_bundle(folder: Path, manifest: ShopManifest, log: ShopLog) -> Shop:
    """The shop as it was when the bundle was trained; the log must give the same items and the same cut."""
    timeline = make_timeline(log.start, log.end)
    until = datetime.fromisoformat(manifest.trained_until).timestamp()
    if abs(timeline.test_at - until) > 1.0:
        raise BundleError(
            f"{folder} was trained until {manifest.trained_until}, but this log would be cut at "
            f"{utc_moment(timeline.test_at)}; evaluate with the files that it was trained on"
        )
    items = choose_items(log, timeline.test_at)
    if _row_ids(items) != read_catalog(folder).item_ids:
        raise BundleError(f"{folder} has other items than this log gives; evaluate with the files it was trained on")
    return Shop(log, timeline, items, Histories(log, items, timeline.cutoffs))


def _row_ids(items: ShopItems) -> list[str]:
    ids = items.table["item_id"].to_numpy()
    return [str(item) for item in ids[np.asarray(items.row_item)]]
