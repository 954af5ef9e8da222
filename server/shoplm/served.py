"""What is served, but for the model itself: metadata, tokenizer, catalogue, demo customers. No torch, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from shoplm.bundle import HeadSpec, ShopManifest, read_manifest
from shoplm.catalog.items import Catalog, read_catalog
from shoplm.demo_customers import DemoHistory, read_demo_customers
from shoplm.errors import BundleError
from shoplm.features import FEATURE_VERSION, kinds_in
from shoplm.grounding import Grounding
from shoplm.history import EVENT_KINDS, EventKind, History
from shoplm.model.base import Base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.tokenizer import Tokenizer
from shoplm.prompt import PromptBuilder
from shoplm.readout.habits import HabitTable, load_habits
from shoplm.readout.rebuy import OwnItems, Rebuy, load_rebuy, own_items
from shoplm.readout.targets import check_spec
from shoplm.retrieval import Knowledge, read_knowledge
from shoplm.vocabulary import ShopVocabulary


@dataclass(frozen=True)
class Shop:
    """A bundle, as far as it can be read without torch."""

    manifest: ShopManifest
    catalog: Catalog
    vocabulary: ShopVocabulary
    demo: dict[str, DemoHistory]
    knowledge: Knowledge
    grounding: Grounding
    feature_means: NDArray[np.float32]  # [F]: the dense features of an average customer; empty without heads
    habits: HabitTable
    rebuy: Rebuy | None

    def own_items(self, history: History) -> OwnItems:
        """What scores read of the customer's purchases."""
        score = self.manifest.score
        return own_items(history, score.decay_days, self.rebuy, score.rebuy_weight)

    def knows(self, history: History) -> bool:
        """Whether an event of the history counts: one of the kind that is recommended, or of another that the heads
        were fitted on. Without one, answers are what is usual in the shop."""
        return bool(self._counting[history.kind].any())

    @cached_property
    def _counting(self) -> NDArray[np.bool_]:
        """Whether events count, by kind."""
        counting = np.zeros(len(EventKind), np.bool_)
        counting[EVENT_KINDS[self.manifest.recommends]] = True
        if len(self.feature_means):
            counting[list(kinds_in(self.feature_means.tolist()))] = True
        return counting

    @property
    def targets(self) -> tuple[HeadSpec, ...]:
        return self.manifest.targets


class ModelVersion(NamedTuple):
    """What every answer names. Without a bundle, the first two are empty."""

    bundle: str
    version: str
    base_model: str


@dataclass(frozen=True)
class Served:
    """The base model's text side and, where there is one, the shop."""

    base: Base
    tokenizer: Tokenizer
    prompts: PromptBuilder
    shop: Shop | None

    @property
    def model_version(self) -> ModelVersion:
        if self.shop is None:
            return ModelVersion("", "", self.base.name)
        return ModelVersion(self.shop.manifest.name, self.shop.manifest.version, self.base.name)

    @cached_property
    def cache_root(self) -> str:
        """Prefixes are shared below one root only."""
        if self.shop is None:
            return self.base.fingerprint
        return f"{self.base.fingerprint}/{self.shop.manifest.name}/{self.shop.manifest.version}"

    @property
    def vocabulary_size(self) -> int:
        """All valid token ids are below this."""
        return self.base.config.vocab_size if self.shop is None else self.shop.vocabulary.size


def server_version() -> str:
    """The version of the installed distribution."""
    return version("shoplm")


def load_served(base: Base, bundle: Path | None, *, verify: bool = True) -> Served:
    """Read base and bundle. Raises BaseModelError and BundleError naming what cannot be used."""
    tokenizer = Tokenizer.from_folder(base.folder)
    template = ChatTemplate.from_folder(base.folder)
    if bundle is None:
        return Served(base, tokenizer, PromptBuilder(tokenizer, template), None)
    manifest = read_manifest(bundle, verify=verify)
    check_base(bundle, manifest, base)
    _check_heads(bundle, manifest)
    catalog = read_catalog(bundle)
    vocabulary = ShopVocabulary(base.config.vocab_size, manifest.level_sizes, manifest.type_count)
    codes = _read_codes(bundle, manifest, len(catalog))
    knowledge = read_knowledge(bundle)
    shop = Shop(
        manifest,
        catalog,
        vocabulary,
        read_demo_customers(bundle, manifest, catalog),
        knowledge,
        Grounding(knowledge, catalog, manifest.currency, manifest.score.decay_days),
        _read_weights(bundle, "head.input_mean") if manifest.targets else np.zeros(0, np.float32),
        load_habits(bundle, manifest),
        load_rebuy(bundle, manifest),
    )
    return Served(base, tokenizer, PromptBuilder(tokenizer, template, manifest.prompt, vocabulary, codes), shop)


def check_base(bundle: Path, manifest: ShopManifest, base: Base) -> None:
    """Raises BundleError where the bundle was trained on another base."""
    wanted = manifest.base
    if wanted.fingerprint != base.fingerprint:
        raise BundleError(
            f"{bundle}: was trained on {wanted.name} ({wanted.fingerprint[:12]}), not on {base.name} "
            f"({base.fingerprint[:12]}); name its own base with --base, or train it again on this one"
        )
    found = (base.config.hidden_size, base.config.vocab_size)
    if (wanted.hidden_size, wanted.vocab_size) != found:
        raise BundleError(
            f"{bundle}: base.hidden_size and base.vocab_size are {wanted.hidden_size} and {wanted.vocab_size}, "
            f"but {base.name} has {found[0]} and {found[1]}"
        )


def _check_heads(bundle: Path, manifest: ShopManifest) -> None:
    """Raises BundleError where a target cannot be computed here: found at start, not in a call."""
    if manifest.feature_version != FEATURE_VERSION:
        raise BundleError(
            f"{bundle}: feature_version is {manifest.feature_version}, this server computes {FEATURE_VERSION}; "
            "train the bundle again"
        )
    if manifest.targets:
        (values,) = _read_weights(bundle, "head.bias").shape
        for spec in manifest.targets:
            check_spec(spec, values)


def _read_codes(bundle: Path, manifest: ShopManifest, items: int) -> NDArray[np.int32] | None:
    """[items, depth] where an item has several codes; None where its code is its row."""
    if manifest.depth == 1:
        if manifest.level_sizes[0] != items:
            raise BundleError(f"{bundle}: level_sizes is {manifest.level_sizes[0]}, but there are {items} items")
        return None
    codes: NDArray[np.int32] = _read_weights(bundle, "codes")
    if codes.shape != (items, manifest.depth):
        raise BundleError(f"{bundle}: codes has shape {codes.shape}, expected {(items, manifest.depth)}")
    return codes


def _read_weights(bundle: Path, name: str) -> NDArray[Any]:
    """One small tensor of weights.safetensors."""
    path = bundle / "weights.safetensors"
    try:
        with safe_open(path, framework="numpy") as weights:
            tensor: NDArray[Any] = weights.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path}: {name} cannot be read: {error}") from error
    return tensor
