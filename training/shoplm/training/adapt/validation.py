"""How well a model that is being trained ranks: next baskets of a few customers, on the window that tunes weights."""

from __future__ import annotations

import numpy as np
import torch
from shoplm.prompt import PromptBuilder
from shoplm.training.adapt.model import JointModel
from shoplm.training.adapt.tensors import Branch, pass_inputs
from shoplm.training.examples import ranking_examples
from shoplm.training.samples import HiddenTable, Sample, Task, Use
from shoplm.training.scoring import Weights, Window
from shoplm.training.shop import Shop

CUSTOMERS = 32
_REPEAT_FACTORS = (1.0, 2.0, 4.0)  # ranking ten items takes more counting than the likeliest mixture


class BasketValidation:
    """NDCG@10 at `tuned_at` of the same customers each time. No label of the test is looked at."""

    def __init__(self, shop: Shop, builder: PromptBuilder, decay_days: float, seed: int) -> None:
        self._decay_days = decay_days
        moment = shop.timeline.tuned_at
        sample = Sample(moment, Task.RECOMMEND, Use.ITEM_TUNE, True)
        order = np.random.default_rng(seed).permutation(len(shop.histories)).tolist()
        customers = [customer for customer in order if len(shop.histories[customer].before(moment))]
        table = HiddenTable.bare([(customer, sample) for customer in customers[: 2 * CUSTOMERS]])
        examples = ranking_examples(
            table,
            np.arange(len(table)),
            shop.histories,
            shop.items.label_kind,
            before=shop.timeline.test_at,
            decay_days=decay_days,
        ).first(CUSTOMERS)
        self._window = Window(examples, shop.histories, torch.zeros(len(shop.items.row_item)))
        self._prompts = []
        for customer in examples.customer.tolist():
            known = shop.histories[customer].before(moment)
            prefix = builder.prefix(known)
            self._prompts.append((prefix.tokens, builder.recommend_suffix(known)))

    def __len__(self) -> int:
        return len(self._prompts)

    @torch.no_grad()
    def ndcg(self, model: JointModel) -> float:
        """Mean NDCG@10 with counting at its best of a few strengths. The model is left in training mode."""
        model.train(False)
        states = []
        for prefix, suffix in self._prompts:
            inputs = pass_inputs(prefix, [Branch(len(prefix), suffix)])
            states.append(model.hidden(inputs)[-1])
        model.train()
        logits = model.item_logits(torch.stack(states)).cpu() if states else None
        repeat = float(model.repeat_weight)
        tried = (Weights(1.0, repeat * factor, 0.0, self._decay_days) for factor in _REPEAT_FACTORS)
        return max(self._window.ndcg(weights, logits) for weights in tried)
