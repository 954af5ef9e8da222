"""Item output rows, fitted on stored hidden states of the frozen base.

Logits of item i at hidden state h: z_i = w_i . h + b_i. Rows start as zero, biases as a multiple of log popularity.
Rows are built from shared parts, so that an item bought ten times learns from its kind:

    w_i = P a_i + u_type(i) + d_i

a_i are the leading principal components of the item's text embedding, u is one row per product type and d the item's
own. Loss: cross-entropy of the full softmax over all items with several positives, the next basket's items,

    - mean over the basket's items i of log softmax(z + repeat_weight * log(1 + decayed own count))_i,

so the model learns what counting does not already say. The weights of counting and popularity are tuned later, on a
later window (`shoplm.training.scoring`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from shoplm.training.examples import Examples
from torch import Tensor, nn

ATTRIBUTE_DIMENSIONS = 64
STATE_DIMENSIONS = 256
_PRIOR_EXAMPLES = 500
_PRIOR_PENALTY = 1e-4  # keeps the weights finite where one of them explains everything
_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class RankerSettings:
    """How the rows are fitted."""

    epochs: int = 6
    patience: int = 2  # epochs without a better validation before it stops
    batch: int = 256
    learning_rate: float = 2e-4
    item_decay: float = 0.3  # pulls what is the item's own towards its kind
    shared_decay: float = 0.02
    state_dropout: float = 0.2


@dataclass(frozen=True)
class OutputRows:
    """What the bundle stores: logits = rows . hidden + bias."""

    rows: Tensor  # [items, H] fp32
    bias: Tensor  # [items] fp32

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, items] of hidden states [N, H]."""
        return torch.addmm(self.bias, hidden, self.rows.T)

    def scaled(self, factor: float) -> OutputRows:
        return OutputRows(self.rows * factor, self.bias * factor)

    def rounded(self, centre: Tensor) -> OutputRows:
        """Rounded as it is stored, in fp16. The states' mean `centre` [H] is large against their spread, so the bias
        takes up what rounding the rows would shift it by."""
        rows = self.rows.half().float()
        return OutputRows(rows, self.bias + (self.rows - rows) @ centre)


@dataclass(frozen=True)
class StateSpace:
    """Hidden states seen along their leading principal components, scaled to about one."""

    mean: Tensor  # [H]
    projection: Tensor  # [H, K]

    @classmethod
    def fit(cls, hidden: Tensor, dimensions: int) -> StateSpace:
        """Principal components of the standardised states; each is divided by its deviation, small ones by less."""
        mean, deviation = hidden.mean(0), hidden.std(0, correction=0) + 1e-3
        standard = (hidden - mean) / deviation
        values, vectors = principal_axes(standard)
        values, vectors = values.flip(0)[:dimensions].clamp(min=0), vectors.flip(1)[:, :dimensions]
        floor = 0.05 * values.mean() + _EPSILON
        return cls(mean, vectors / (values + floor).sqrt() / deviation[:, None])

    def project(self, hidden: Tensor) -> Tensor:
        """[N, K]."""
        return (hidden - self.mean) @ self.projection

    def fold(self, rows: Tensor, bias: Tensor) -> OutputRows:
        """Rows [items, K] on projected states as rows on the states themselves."""
        full = rows @ self.projection.T
        return OutputRows(full, bias - full @ self.mean)


class Ranker(nn.Module):
    """The parts that output rows are made of."""

    def __init__(self, attributes: Tensor, types: Tensor, prior: CountPrior, dimensions: int) -> None:
        """`attributes` [items, A], `types` [items] int64; `prior` is where the fit starts."""
        super().__init__()
        items = len(types)
        self.register_buffer("attributes", attributes)
        self.register_buffer("types", types)
        self.shared = nn.Parameter(torch.zeros(attributes.shape[1], dimensions))
        self.of_type = nn.Parameter(torch.zeros(int(types.max()) + 1 if items else 1, dimensions))
        self.own = nn.Parameter(torch.zeros(items, dimensions))
        self.bias = nn.Parameter(prior.bias.clone())
        self.repeat_weight = nn.Parameter(torch.tensor(prior.repeat_weight))

    def rows(self) -> Tensor:
        """[items, K]."""
        attributes, types = self.attributes, self.types
        assert isinstance(attributes, Tensor) and isinstance(types, Tensor)
        return attributes @ self.shared + self.of_type[types] + self.own

    def loss(self, states: Tensor, examples: Examples, batch: NDArray[np.integer]) -> Tensor:
        """Mean over the batch. `states` [batch, K]."""
        return basket_loss(torch.addmm(self.bias, states, self.rows().T), self.repeat_weight, examples, batch)


def basket_loss(logits: Tensor, repeat_weight: Tensor, examples: Examples, batch: NDArray[np.integer]) -> Tensor:
    """Multi-positive cross-entropy of `logits` [batch, items] with the count term added, mean over the batch."""
    device = logits.device
    at, column, count = (part.to(device) for part in examples.owned.select(batch))
    logits = logits.index_put((at, column), repeat_weight * count, accumulate=True)
    at, column, one = (part.to(device) for part in examples.baskets.select(batch))
    nothing = torch.zeros(len(batch), device=device)
    size = nothing.index_add(0, at, one)
    positive = nothing.index_add(0, at, logits[at, column] / size[at])
    return (torch.logsumexp(logits, dim=1) - positive).mean()


@dataclass(frozen=True)
class CountPrior:
    """The likeliest mixture of counting and popularity, which the model then improves on."""

    repeat_weight: float
    bias: Tensor  # [items]: a multiple of log popularity

    @classmethod
    def fit(cls, examples: Examples, counts: NDArray[np.int64], seed: int) -> CountPrior:
        """Both weights by maximum likelihood on some of the examples. `counts` [items] of the training data."""
        numbers = torch.from_numpy(counts.astype(np.float32))
        log_popularity = torch.log((numbers + 1.0) / (numbers.sum() + len(numbers)))
        if not len(examples):
            return cls(1.0, log_popularity)
        size = min(_PRIOR_EXAMPLES, len(examples))
        batch = np.sort(np.random.default_rng(seed).choice(len(examples), size, replace=False))
        weights = torch.tensor([4.0, 0.5], requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=30, line_search_fn="strong_wolfe")

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = basket_loss((weights[1] * log_popularity).expand(size, -1), weights[0], examples, batch)
            loss = loss + _PRIOR_PENALTY * weights.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(step)  # type: ignore[no-untyped-call]
        repeat, popularity = weights.detach().tolist()
        return cls(repeat, popularity * log_popularity)


def attribute_components(embeddings: Tensor, dimensions: int = ATTRIBUTE_DIMENSIONS) -> Tensor:
    """[items, A]: leading principal components of the items' text embeddings [items, H], each with deviation one; one
    zero column where all texts are the same."""
    centred = embeddings.float() - embeddings.float().mean(0)
    values, vectors = principal_axes(centred)
    values, vectors = values.flip(0)[:dimensions], vectors.flip(1)[:, :dimensions]
    kept = values > _EPSILON * values[0].clamp(min=_EPSILON)
    if not bool(kept.any()):
        return torch.zeros(len(embeddings), 1)
    components: Tensor = centred @ (vectors[:, kept] / values[kept].sqrt())
    return components


def fit_ranker(
    hidden: Tensor,
    examples: Examples,
    embeddings: Tensor,
    types: NDArray[np.int32],
    counts: NDArray[np.int64],
    *,
    settings: RankerSettings,
    seed: int,
    validate: Callable[[OutputRows, float], float],
    progress: Callable[[int, int, float], None],
) -> tuple[OutputRows, float]:
    """The rows of the epoch that `validate` (rows, repeat weight -> quality) likes best, and its repeat weight.

    `hidden` [N, H] is aligned with `examples`; `embeddings` [items, H] are of the items' texts. Without any example the
    rows are zero and the bias is log popularity.
    """
    generator = torch.Generator().manual_seed(seed)
    space = StateSpace.fit(hidden, min(STATE_DIMENSIONS, hidden.shape[1], max(len(hidden), 1)))
    model = Ranker(
        attribute_components(embeddings),
        torch.from_numpy(types.astype(np.int64)),
        CountPrior.fit(examples, counts, seed),
        space.projection.shape[1],
    )
    states = space.project(hidden)
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.shared, model.of_type], "weight_decay": settings.shared_decay},
            {"params": [model.own], "weight_decay": settings.item_decay},
            {"params": [model.bias], "weight_decay": 0.0},
            {"params": [model.repeat_weight], "weight_decay": 0.0, "lr": 10.0 * settings.learning_rate},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
    )
    batches = -(-len(examples) // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=max(batches * settings.epochs, 2),
        pct_start=0.1,
    )
    best = _folded(space, model)
    best_quality = validate(*best)
    stale = 0
    for epoch in range(settings.epochs if len(examples) else 0):
        order = torch.randperm(len(examples), generator=generator).numpy()
        for start in range(0, len(order), settings.batch):
            batch = order[start : start + settings.batch]
            kept = torch.rand(len(batch), states.shape[1], generator=generator) >= settings.state_dropout
            noisy = states[batch] * kept / (1.0 - settings.state_dropout)
            loss = model.loss(noisy, examples, batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            progress(epoch * batches + start // settings.batch + 1, settings.epochs * batches, float(loss.detach()))
        candidate = _folded(space, model)
        quality = validate(*candidate)
        stale = 0 if quality > best_quality else stale + 1
        if quality > best_quality:
            best, best_quality = candidate, quality
        if stale >= settings.patience:
            break
    return best


def _folded(space: StateSpace, model: Ranker) -> tuple[OutputRows, float]:
    with torch.no_grad():
        return space.fold(model.rows(), model.bias.detach().clone()), float(model.repeat_weight)


def principal_axes(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [H] and -vectors [H, H] of the covariance of `centred` [N, H], ascending. In fp64: where rows are few
    or alike, fp32 may not converge."""
    values, vectors = torch.linalg.eigh((centred.T @ centred / max(len(centred), 1)).double())
    return values.to(centred.dtype), vectors.to(centred.dtype)
