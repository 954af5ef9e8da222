"""Boosted stumps as units of a head: steps in single features, which a sum of weights cannot make.

Gradient boosting with trees of one split (scikit-learn) is a sum of a step in one feature each. A step at t between two
neighbouring values a < t < b of the training is drawn as a ramp from a to b by two units:

    [x > t]  ~  relu((x - a) / (b - a)) - relu((x - b) / (b - a))

which is the same for every value that was seen, and half a step between them.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from shoplm.training.heads import Head
from sklearn.ensemble import GradientBoostingClassifier

FEWEST_ROWS = 1000  # with fewer, steps are chance
MOST_ROWS = 20_000  # at random
_ROUNDS, _LEARNING_RATE, _LEAST_IN_LEAF = 200, 0.05, 40
_LEAST_RAMP = 0.02  # standard deviations

Floats = NDArray[np.float32]


def fit_stumps(standard: Floats, outcome: NDArray[np.bool_], seed: int) -> Head:
    """The log-odds of `outcome` [N], which has both, for rows [N, F]: one value, which reads no hidden state."""
    rows = np.arange(len(outcome))
    if len(rows) > MOST_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MOST_ROWS, replace=False))
    model = GradientBoostingClassifier(
        n_estimators=_ROUNDS,
        learning_rate=_LEARNING_RATE,
        max_depth=1,
        min_samples_leaf=min(_LEAST_IN_LEAF, max(len(rows) // 4, 1)),
        random_state=seed,
    )
    model.fit(standard[rows], outcome[rows])
    share = float(outcome[rows].mean())
    bias, steps = np.log(share / (1.0 - share)), defaultdict[tuple[int, float], float](float)
    for (stump,) in model.estimators_:
        tree = stump.tree_
        values = _LEARNING_RATE * tree.value[:, 0, 0]
        if tree.node_count == 1:  # no split leaves enough rows on both sides
            bias += values[0]
            continue
        below, above = values[tree.children_left[0]], values[tree.children_right[0]]
        bias += below
        steps[int(tree.feature[0]), float(tree.threshold[0])] += float(above - below)
    return _as_units(steps, bias, standard[rows])


def _as_units(steps: dict[tuple[int, float], float], bias: float, standard: Floats) -> Head:
    """`steps`: (feature, threshold) -> height."""
    width = standard.shape[1]
    unit_weight, unit_bias, weight = [], [], []
    for (feature, threshold), height in sorted(steps.items()):
        column = standard[:, feature]
        low, high = float(column[column <= threshold].max()), float(column[column > threshold].min())
        if high - low < _LEAST_RAMP:
            low, high = threshold - _LEAST_RAMP / 2, threshold + _LEAST_RAMP / 2
        steepness = 1.0 / (high - low)
        for corner, sign in ((low, 1.0), (high, -1.0)):
            reads = np.zeros(width, np.float32)
            reads[feature] = steepness
            unit_weight.append(reads)
            unit_bias.append(-corner * steepness)
            weight.append(sign * height)
    return Head(
        weight=np.concatenate([np.zeros(width), weight])[None].astype(np.float32),
        bias=np.array([bias], np.float32),
        unit_weight=np.array(unit_weight, np.float32).reshape(len(weight), width),
        unit_bias=np.array(unit_bias, np.float32),
    )
