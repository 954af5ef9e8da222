"""`--base scratch:small`: a small decoder trained on the shop's log alone, before anything else is fitted.

For shops that want no chat and the least to compute. Trained as an adapter is (`shoplm.training.adapt.trainer`), on
next baskets and purchases within each horizon, behind the same prompts; its words are a small vocabulary of the shop's
texts. The result is a base like any other, which lies in the bundle.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from safetensors.torch import load_file
from shoplm.bundle import PromptSchema
from shoplm.catalog.items import Catalog
from shoplm.engine.shop_texts import token_texts
from shoplm.errors import ConfigurationError
from shoplm.model.base import Base, resolve_base
from shoplm.model.chat_template import ChatTemplate
from shoplm.model.tokenizer import Tokenizer
from shoplm.prompt import PromptBuilder
from shoplm.training.adapt.causal import CPU, trunk_dtype
from shoplm.training.adapt.saved_base import check_place
from shoplm.training.adapt.scratch_model import INPUT_ROWS, SIZES, ScratchModel, ScratchSize
from shoplm.training.adapt.trainer import AdaptSettings, JointTrainer
from shoplm.training.ranker import CountPrior
from shoplm.training.shop import Shop
from shoplm.training.watch import Watch
from tokenizers import ByteLevelBPETokenizer

PREFIX = "scratch:"
MINUTES_SHARE = 0.6  # of --minutes; the other states and fits take the rest
EPOCHS = 6  # at most so many passes over every customer
FEWEST_STEPS = 20
DECAY_DAYS = 120.0
_END = "<|end|>"
_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
_VOCABULARY = 1024
_PRIOR_CUSTOMERS = 64
_SETTINGS = AdaptSettings(
    steps=0,
    passes_per_step=8,
    learning_rate=2e-3,
    head_learning_rate=2e-3,
    trunk_decay=0.05,
    decay_days=DECAY_DAYS,
)


def scratch_size(reference: str | None) -> ScratchSize | None:
    """What `--base` asks to train from nothing; None for a base that exists. Raises ConfigurationError."""
    if reference is None or not reference.startswith(PREFIX):
        return None
    name = reference.removeprefix(PREFIX)
    if name not in SIZES:
        known = ", ".join(f"{PREFIX}{each}" for each in SIZES)
        raise ConfigurationError(f"--base {reference}: from nothing there are {known}")
    return SIZES[name]


@dataclass(frozen=True)
class Scratch:
    """A trained base and the rows of the shop's tokens."""

    base: Base
    input_rows: torch.Tensor  # [shop tokens, H]


class Plan(msgspec.Struct, frozen=True):
    """Kept beside the checkpoint, so that a stopped run goes on with the same schedule."""

    steps: int
    ended_at: int | None = None  # the last step, once the run is over


class ScratchRun:
    """One training from nothing; a stopped one goes on in the same folder."""

    def __init__(
        self,
        size: ScratchSize,
        shop: Shop,
        catalog: Catalog,
        schema: PromptSchema,
        work: Path,
        seed: int,
        *,
        device: torch.device = CPU,
    ) -> None:
        self._shop, self._seed = shop, seed
        identity = (msgspec.to_builtins(schema), repr(size), shop.fingerprint, seed)
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = work / f"scratch-{digest[:16]}"
        check_place(self.folder / ScratchModel.saved_as, ScratchModel.origin)
        tokenizer_folder = self.folder / "tokenizer"
        texts = [schema.preamble, *schema.attributes, *token_texts(catalog)]
        write_tokenizer(tokenizer_folder, texts)
        tokenizer = Tokenizer.from_folder(tokenizer_folder)
        vocabulary = shop.items.vocabulary(tokenizer.vocab_size)
        self._builder = PromptBuilder(tokenizer, ChatTemplate.from_folder(tokenizer_folder), schema, vocabulary)
        torch.manual_seed(seed)
        self._model = ScratchModel(
            size,
            tokenizer_folder,
            tokenizer.vocab_size,
            shop.items.row_types,
            len(shop.items.types),
            self._prior(),
            len(shop.timeline.horizons),
            trunk_dtype(device),
            device,
        )

    def train(self, minutes: float | None, watch: Watch) -> Scratch:
        """Train as many steps as fit into the share of the minutes; at most `EPOCHS` passes over the customers."""
        deadline = None if minutes is None else time.monotonic() + MINUTES_SHARE * 60.0 * minutes
        path = self.folder / "plan.json"
        plan = msgspec.json.decode(path.read_bytes(), type=Plan) if path.exists() else self._plan(deadline)
        path.write_bytes(msgspec.json.encode(plan))
        if plan.ended_at is None:
            watch.say(f"training a decoder from nothing, {plan.steps:,} steps of {_SETTINGS.passes_per_step} customers")
            trainer = self._trainer(plan.steps)
            trainer.resume()
            trainer.run(watch, deadline)
            path.write_bytes(msgspec.json.encode(msgspec.structs.replace(plan, ended_at=trainer.step)))
        base = resolve_base(str(self.folder / self._model.saved_as))
        return Scratch(replace(base, name=base.origin.value), load_file(self.folder / INPUT_ROWS)["input_rows"])

    def seconds_per_step(self) -> float:
        """Seconds of a training step on this machine; the model and the random draws are left as they were."""
        return self._trainer(1).seconds_per_step()

    def epoch_steps(self) -> int:
        """Steps of the whole run where time does not matter."""
        return max(EPOCHS * len(self._shop.histories) // _SETTINGS.passes_per_step, FEWEST_STEPS)

    def _plan(self, deadline: float | None) -> Plan:
        if deadline is None:
            return Plan(self.epoch_steps())
        seconds = self.seconds_per_step()
        fitting = int(0.9 * (deadline - time.monotonic()) / seconds)  # what is left is for validation and checkpoints
        return Plan(max(min(self.epoch_steps(), fitting), FEWEST_STEPS))

    def _trainer(self, steps: int) -> JointTrainer:
        settings = replace(_SETTINGS, steps=steps, seed=self._seed)
        return JointTrainer(self._model, self._builder, self._shop, settings, self.folder, None)

    def _prior(self) -> CountPrior:
        """Counting and popularity, from the training part of some customers."""
        shop = self._shop
        order = np.random.default_rng(self._seed).permutation(len(shop.histories))[:_PRIOR_CUSTOMERS]
        table = shop.bare_table(order)
        examples = shop.training_examples(table, DECAY_DAYS)
        return CountPrior.fit(examples, shop.row_counts_before(shop.timeline.tuned_at), self._seed)


def write_tokenizer(folder: Path, texts: Sequence[str]) -> None:
    """A byte-level vocabulary of the shop's own texts (BPE, Sennrich et al., arXiv:1508.07909), with a chat template
    that only frames the preamble."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        sorted(set(texts)), vocab_size=_VOCABULARY, min_frequency=2, show_progress=False, special_tokens=[_END]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": _END, "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
