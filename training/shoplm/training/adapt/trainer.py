"""Joint training: baskets, behaviour and chat behind one prefix, in one pass per customer.

    loss = cross-entropy of the next basket (as `shoplm.training.ranker`)
         + cross-entropy of a purchase within each horizon
         + KL(base without history || adapted behind the history) on the base's own answers
         + cross-entropy of the answers that repeat the shop's facts

A model that does not talk is trained on the first two alone. The third is what lets chat read the customer's prefix:
the adapted model, behind item tokens that the base has never seen, must say what the base says without them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from shoplm.errors import ConfigurationError
from shoplm.history import History
from shoplm.model.tokenizer import Tokenizer
from shoplm.prompt import PromptBuilder
from shoplm.retrieval import Passage
from shoplm.training.adapt.conversations import FactWriter
from shoplm.training.adapt.model import JointModel, TalkingModel
from shoplm.training.adapt.replay import Replay
from shoplm.training.adapt.tensors import Branch, pass_inputs
from shoplm.training.adapt.validation import BasketValidation
from shoplm.training.labels import behaviour
from shoplm.training.packing import pack_samples
from shoplm.training.ranker import basket_loss
from shoplm.training.samples import HiddenTable, Sample, Task, Use, samples_of
from shoplm.training.shop import Shop
from shoplm.training.watch import LOSS, NDCG, Watch
from torch import Tensor
from torch.nn import functional

CHECKPOINT = "checkpoint.pt"  # in the folder of the run
CHECKPOINT_STEPS = 25
STAGE = "training steps"


@dataclass(frozen=True, slots=True)
class AdaptSettings:
    """How a model is trained."""

    steps: int
    passes_per_step: int = 4
    learning_rate: float = 4e-4  # of the trunk
    head_learning_rate: float = 1e-4
    trunk_decay: float = 0.0  # pulls the trunk's weights towards zero
    talk_share: float = 0.5  # of the passes that carry a talk conversation
    facts: int = 2  # of a pass; half as many where no customer is in it
    bare_share: float = 0.2  # of the passes that have no history: chat without a customer
    chat_weight: float = 1.0
    behaviour_weight: float = 0.3
    decay_days: float = 120.0
    warm_up: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Talk:
    """What chat is trained on."""

    facts: FactWriter
    replays: Sequence[Replay]
    tokenizer: Tokenizer

    def fact(self, builder: PromptBuilder, random: np.random.Generator) -> Replay:
        """A fact as a conversation behind any prefix."""
        fact = self.facts.draw(random)
        answer = (*self.tokenizer.encode(fact.answer), self.tokenizer.end_token_ids[0])
        return Replay(encode_chat(builder, fact.question, fact.passages), answer)


@dataclass(slots=True)
class Losses:
    """Sums and counts of each part since the last report."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> Tensor:
        self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        self.counts[name] = self.counts.get(name, 0) + 1
        return value

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class JointTrainer:
    """Draws customers at random, step by step; a stopped run goes on where its checkpoint was."""

    def __init__(
        self,
        model: JointModel,
        builder: PromptBuilder,
        shop: Shop,
        settings: AdaptSettings,
        folder: Path,
        talk: Talk | None,
    ) -> None:
        self.model, self.settings, self.step, self.tokens = model, settings, 0, 0
        self._builder, self._shop, self._talk, self._folder = builder, shop, talk, folder
        self._random = np.random.default_rng(settings.seed)
        self._validation = BasketValidation(shop, builder, settings.decay_days, settings.seed)
        # The trunk multiplies in bf16, whose rounding would swallow small updates: they are summed up in fp32.
        self._masters = [parameter.detach().float() for parameter in model.trunk_parameters()]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": self._masters, "lr": settings.learning_rate, "weight_decay": settings.trunk_decay},
                {"params": model.head_parameters(), "lr": settings.head_learning_rate, "weight_decay": 0.01},
            ],
            betas=(0.9, 0.98),
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)

    def run(self, watch: Watch, deadline: float | None = None) -> None:
        """Train until `settings.steps` or, at a checkpoint, `deadline` (time.monotonic). Each checkpoint records the
        mean losses since the one before and the NDCG."""
        self.model.train()
        losses, already = Losses(), self.tokens
        while self.step < self.settings.steps:
            self._learn(losses)
            self._update()
            self.step += 1
            watch.advance(STAGE, self.step, self.settings.steps, self.tokens - already)
            if self.step % CHECKPOINT_STEPS == 0 or self.step == self.settings.steps:
                self._save()
                values = losses.means()
                if self._validation:
                    values[NDCG] = self._validation.ndcg(self.model)
                watch.record(STAGE, self.step, values)
                losses = Losses()
                if deadline is not None and time.monotonic() > deadline:
                    return

    def _learn(self, losses: Losses) -> None:
        """The gradients of one step."""
        for _ in range(self.settings.passes_per_step):
            loss = self._pass(losses)
            if loss is not None:
                (loss / self.settings.passes_per_step).backward()  # type: ignore[no-untyped-call]

    def seconds_per_step(self) -> float:
        """Measured on the second of two steps, which change nothing: neither weights nor what is drawn next."""
        state, tokens = self._random.bit_generator.state, self.tokens
        self.model.train()
        self._learn(Losses())
        begun = time.perf_counter()
        self._learn(Losses())
        seconds = time.perf_counter() - begun
        self.model.zero_grad()
        self._random.bit_generator.state, self.tokens = state, tokens
        return seconds

    def _update(self) -> None:
        pairs = list(zip(self._masters, self.model.trunk_parameters(), strict=True))
        for master, parameter in pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self.model.zero_grad()
        for master, parameter in pairs:
            parameter.data.copy_(master)

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        done = step / max(self.settings.steps, 1)
        if done < self.settings.warm_up:
            return max(done, 1.0 / max(self.settings.steps, 1)) / self.settings.warm_up
        return 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    # ---- one pass ------------------------------------------------------------------------------------------------

    def _pass(self, losses: Losses) -> Tensor | None:
        random, shop = self._random, self._shop
        customer = int(random.integers(len(shop.histories)))
        bare = random.random() < self.settings.bare_share and self._talk is not None
        known = shop.histories[customer].before(shop.timeline.tuned_at)
        packs = [] if bare else pack_samples(self._builder, known, self._samples(known))
        pack = packs[0] if packs else None
        prefix = pack.prefix if pack is not None else self._builder.prefix(None).tokens
        branches: list[Branch] = []
        if pack is not None:
            branches += [Branch(length, suffix) for length, suffix in zip(pack.lengths, pack.suffixes, strict=True)]
        chats = self._chats(bare or pack is None)
        branches += [Branch(len(prefix), chat.suffix + chat.answer) for chat, _ in chats]
        inputs = pass_inputs(prefix, branches)
        if not branches:
            return None
        hidden = self.model.hidden(inputs)
        self.tokens += len(inputs.tokens)
        parts: list[Tensor] = []
        if pack is not None:
            ends = [start + len(b.tokens) - 1 for start, b in zip(inputs.starts, branches, strict=True)]
            parts += self._shop_losses(customer, pack.samples, hidden[ends[: len(pack.samples)]], losses)
        first = len(branches) - len(chats)
        for start, (chat, talk) in zip(inputs.starts[first:], chats, strict=True):
            state = start + len(chat.suffix) - 1  # gives the answer's first token
            states = hidden[state : state + len(chat.answer)]
            weight = self.settings.chat_weight / (1 if talk else self.settings.facts)
            parts.append(weight * self._chat_loss(states, chat, losses, talk=talk))
        return losses.add(LOSS, torch.stack(parts).sum()) if parts else None

    def _samples(self, history: History) -> list[Sample]:
        """Moments of training, before any label that is tuned or tested on."""
        kept = Use.ITEM_TRAIN | Use.HEAD_TRAIN
        return [sample for sample in samples_of(history, self._shop.timeline) if sample.use & kept]

    def _chats(self, bare: bool) -> list[tuple[Replay, bool]]:
        """Conversations of this pass, and whether each is talk."""
        if self._talk is None:
            return []
        chats, replays = [], self._talk.replays
        for _ in range(self.settings.facts):
            if not bare or self._random.random() < 0.5:
                chats.append((self._talk.fact(self._builder, self._random), False))
        if replays and (bare or self._random.random() < self.settings.talk_share):
            chats.append((replays[int(self._random.integers(len(replays)))], True))
        return chats

    def _shop_losses(self, customer: int, samples: Sequence[Sample], hidden: Tensor, losses: Losses) -> list[Tensor]:
        shop = self._shop
        table = HiddenTable.bare([(customer, sample) for sample in samples])
        parts = []
        examples = shop.training_examples(table, self.settings.decay_days)
        if len(examples):
            logits = self.model.item_logits(hidden[torch.from_numpy(examples.sample)])
            loss = basket_loss(logits, self.model.repeat_weight, examples, np.arange(len(examples)))
            parts.append(losses.add("basket", loss))
        heads = table.where(Task.PREDICT, Use.HEAD_TRAIN)
        if len(heads) and shop.timeline.horizons:
            longest, history = shop.timeline.horizons[-1], shop.histories[customer]
            delays = [
                behaviour(history, moment, longest, shop.items.row_prices).delay_days
                for moment in table.moment[heads].tolist()
            ]
            wanted = [[float(delay < horizon) for horizon in shop.timeline.horizons] for delay in delays]
            logits = self.model.purchase_logits(hidden[torch.from_numpy(heads)])
            loss = functional.binary_cross_entropy_with_logits(logits, torch.tensor(wanted, device=hidden.device))
            parts.append(self.settings.behaviour_weight * losses.add("purchase", loss))
        return parts

    def _chat_loss(self, states: Tensor, chat: Replay, losses: Losses, *, talk: bool) -> Tensor:
        """`states` [N, H] give the answer's N tokens in this pass."""
        assert isinstance(self.model, TalkingModel)
        logits = self.model.text_logits(states)
        if not talk:
            return losses.add("fact", functional.cross_entropy(logits, torch.tensor(chat.answer, device=logits.device)))
        with torch.no_grad():
            teacher = self.model.answer_logits(self._builder.prefix(None).tokens, chat, adapted=False)
            target = teacher.log_softmax(-1)
        loss = functional.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1).mean()
        return losses.add("talk", loss)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        trained = {name: value.detach() for name, value in self.model.named_parameters() if value.requires_grad}
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "steps": self.settings.steps,
            "random": json.dumps(self._random.bit_generator.state),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "masters": self._masters,
            "trained": trained,
        }
        temporary = self._folder / ".checkpoint.partial"
        torch.save(state, temporary)
        temporary.replace(self._folder / CHECKPOINT)
        self.model.save(self._folder / self.model.saved_as)

    def resume(self) -> int:
        """Go on from the checkpoint, if there is one; how many tokens were trained on before."""
        path = self._folder / CHECKPOINT
        if not path.exists():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["steps"] != self.settings.steps:
            raise ConfigurationError(
                f"{path} is of a run of {state['steps']} steps, not {self.settings.steps}: change --steps or --out"
            )
        self.model.load_state_dict(state["trained"], strict=False)
        for master, saved in zip(self._masters, state["masters"], strict=True):
            master.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._random.bit_generator.state = json.loads(state["random"])
        self.step, self.tokens = state["step"], state["tokens"]
        return self.tokens


def encode_chat(builder: PromptBuilder, question: str, passages: Sequence[Passage]) -> tuple[int, ...]:
    """Tokens of a question and its passages behind any prefix, as the server writes them."""
    prefix = builder.prefix(None)
    prompt = builder.chat(prefix, [("user", question)], [passage.line for passage in passages])
    return prompt[len(prefix.tokens) :]
