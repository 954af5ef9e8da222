"""No path of training, tuning or calibration sees what is measured later.

The proof: the future is replaced by another one, and everything that was fitted stays the same to the last bit.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoplm.errors import ConfigurationError
from shoplm.features import dense_features
from shoplm.model.base import Base
from shoplm.training import pipeline
from shoplm.training.adapt.scratch_model import ScratchSize
from shoplm.training.adopting import adopt_tensors, bundled_adopt, fit_adopt, shop_tables
from shoplm.training.evaluation import TUNE_EXAMPLES, tuning_window
from shoplm.training.habits import shop_habits
from shoplm.training.labels import next_basket
from shoplm.training.log import ShopLog
from shoplm.training.predictions import weekly_rows
from shoplm.training.ranker import RankerSettings
from shoplm.training.rebuying import bundled_rebuy, fit_rebuy, item_features, rebuy_tensors
from shoplm.training.samples import HiddenTable, Task, Use, samples_of
from shoplm.training.scoring import Weights
from shoplm.training.scratch import ScratchRun
from shoplm.training.shop import Shop
from shoplm.training.timeline import HORIZONS, make_timeline
from shoplm.training.watch import Watch

pytestmark = pytest.mark.usefixtures("quick_heads")
DAY = 86_400.0
HIDDEN = 12


@pytest.fixture(scope="module")
def shop(tiny_shop_log: ShopLog) -> Shop:
    return pipeline.prepare(tiny_shop_log)


def states(shop: Shop) -> HiddenTable:
    """All samples, with states from which the next basket before `test_at` can be read: a model on them is worth its
    weight. Stands in for the base, whose prompts are tested by themselves."""
    bare = shop.bare_table(np.arange(len(shop.histories)))
    random = np.random.default_rng(0)
    codes = random.normal(size=(len(shop.items.row_item), HIDDEN))
    hidden = 3.0 + 0.1 * random.normal(size=(len(bare), HIDDEN))
    for index in range(len(bare)):
        history = shop.histories[int(bare.customer[index])]
        label = next_basket(history, float(bare.moment[index]), shop.items.label_kind, shop.timeline.test_at)
        if label is not None:
            hidden[index] += codes[label.rows].sum(axis=0)
    return dataclasses.replace(bare, hidden=hidden.astype(np.float32))


def with_another_future(shop: Shop) -> Shop:
    """The same log up to `test_at`; after it, other items, prices and times, and other campaign outcomes."""
    random = np.random.default_rng(99)
    test_at, log = shop.timeline.test_at, shop.log
    late = log.events["time"].to_numpy() >= test_at
    item = log.events["item"].to_numpy().copy()
    item[late] = random.integers(0, len(log.item_ids), late.sum())
    time = log.events["time"].to_numpy().copy()
    time[late] = random.uniform(test_at, shop.timeline.end - 1.0, late.sum())
    price = log.events["price"].to_numpy().copy()
    price[late] = 1000.0
    events = log.events.with_columns(pl.Series("item", item), pl.Series("time", time), pl.Series("price", price)).sort(
        "customer", "time", "basket", "kind", "item"
    )
    ended = log.campaigns["end"].to_numpy() > test_at
    redeemed = np.where(ended, ~log.campaigns["redeemed"].to_numpy(), log.campaigns["redeemed"].to_numpy())
    campaigns = log.campaigns.with_columns(pl.Series("redeemed", redeemed))
    changed = dataclasses.replace(log, events=events, campaigns=campaigns)
    items = pipeline.choose_items(changed, test_at)
    return Shop(changed, shop.timeline, items, pipeline.Histories(changed, items, shop.timeline.cutoffs))


def fitted(shop: Shop) -> pipeline.Fitted:
    embeddings = torch.from_numpy(np.random.default_rng(5).normal(size=(len(shop.items.row_item), HIDDEN))).float()
    return pipeline.fit(
        shop,
        states(shop),
        embeddings,
        seed=3,
        settings=RankerSettings(epochs=3, batch=64, learning_rate=5e-3),
        watch=Watch(),
    )


def test_another_future_leaves_everything_that_is_fitted_as_it_is(shop: Shop) -> None:
    one, two = fitted(shop), fitted(with_another_future(shop))
    assert one.model.weights == two.model.weights
    assert one.model.rows.rows.abs().max() > 0
    assert torch.equal(one.model.rows.rows, two.model.rows.rows)
    assert torch.equal(one.model.rows.bias, two.model.rows.bias)
    assert torch.equal(one.model.popularity, two.model.popularity)
    assert one.model.rebuy is not None and two.model.rebuy is not None
    tensors = [{**each.model.habits.tensors(), **rebuy_tensors(each.model.rebuy)} for each in (one, two)]
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name
    assert one.model.predictor is not None and two.model.predictor is not None
    assert len(one.model.predictor.specs) >= 8
    assert one.model.predictor.specs == two.model.predictor.specs
    np.testing.assert_array_equal(one.model.predictor.head.weight, two.model.predictor.head.weight)
    np.testing.assert_array_equal(one.model.predictor.standard.mean, two.model.predictor.standard.mean)


def test_another_past_changes_what_is_fitted(shop: Shop) -> None:
    """The comparison above can fail: a model fitted on other events is another one."""
    log = shop.log
    random = np.random.default_rng(1)
    shuffled, prices = (random.permutation(log.events[name].to_numpy()) for name in ("item", "price"))
    events = log.events.with_columns(pl.Series("item", shuffled), pl.Series("price", prices))
    other = dataclasses.replace(log, events=events)
    one, two = fitted(shop), fitted(pipeline.prepare(other))
    assert not torch.equal(one.model.rows.rows, two.model.rows.rows)
    assert not np.array_equal(one.model.habits.loyalty, two.model.habits.loyalty)
    for fit in (fit_rebuy, fit_adopt):
        nets = [fit(each, states(each), 3) for each in (shop, pipeline.prepare(other))]
        assert nets[0] is not None and nets[1] is not None and not np.array_equal(nets[0].weight, nets[1].weight)
    assert one.model.predictor is not None and two.model.predictor is not None
    assert one.model.predictor.specs != two.model.predictor.specs


def test_another_future_leaves_a_base_from_nothing_as_it_is(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training draws baskets and behaviour at moments of its own; so does an adapter's, which is the same code."""
    monkeypatch.setattr("shoplm.training.scratch.EPOCHS", 1)
    monkeypatch.setattr("shoplm.training.scratch.FEWEST_STEPS", 4)
    made = []
    for name, each in (("one", shop), ("two", with_another_future(shop))):
        schema = pipeline.prompt_schema(each, "A shop.", 48, 16, adapted=False)
        catalog = pipeline.write_items(each.items, tmp_path / name / "items")
        run = ScratchRun(ScratchSize(1, 1, 1, 64), each, catalog, schema, tmp_path / name, seed=0)
        made.append(run.train(None, Watch()))
    assert torch.equal(made[0].input_rows, made[1].input_rows)
    assert made[0].base.fingerprint == made[1].base.fingerprint


def test_labels_of_every_use_end_before_the_next_begins(shop: Shop) -> None:
    table, timeline = states(shop), shop.timeline
    train = shop.training_examples(table, 30.0)
    tune = tuning_window(shop, table, torch.zeros(len(shop.items.row_item)), 0).examples
    assert len(train) > 0 and 0 < len(tune) <= TUNE_EXAMPLES
    assert train.label_time.max() < timeline.tuned_at <= tune.moment.min()
    assert tune.label_time.max() < timeline.test_at
    for use in (Use.ITEM_TEST_TIME, Use.ITEM_TEST_LAST):
        assert table.moment[table.where(Task.RECOMMEND, use)].min() >= timeline.test_at
    longest = timeline.horizons[-1] * DAY
    assert table.moment[table.where(Task.PREDICT, Use.HEAD_TRAIN)].max() + longest <= timeline.tuned_at
    assert table.moment[table.where(Task.PREDICT, Use.HEAD_TUNE)].max() + longest <= timeline.test_at
    assert table.moment[table.where(Task.PREDICT, Use.HEAD_TEST)].min() >= timeline.test_at
    assert max(timeline.weekly) + longest <= timeline.test_at
    assert {*timeline.train_at, timeline.tuned_at} < set(timeline.weekly)
    parts = {name: set(shop.campaign_rows(table, name).campaign.tolist()) for name in ("train", "test")}
    assert all(parts.values()) and not parts["train"] & parts["test"]


def _known_before_tuning(shop: Shop) -> Shop:
    past = dataclasses.replace(shop.log, events=shop.log.events.filter(pl.col("time") < shop.timeline.tuned_at))
    return dataclasses.replace(shop, log=past, histories=pipeline.Histories(past, shop.items, shop.timeline.cutoffs))


def test_habits_are_those_before_their_moment(shop: Shop) -> None:
    """What the score's weights are tuned with knows nothing of the window that they are tuned on."""
    until = shop.timeline.tuned_at
    known = _known_before_tuning(shop)
    one, two = (shop_habits(each, until, 0).tensors() for each in (shop, known))
    assert len(one["neighbours.items"]) > 0
    later = shop_habits(shop, shop.timeline.test_at, 0).tensors()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
    assert not torch.equal(one["loyalty"], later["loyalty"])
    assert np.array_equal(item_features(shop, until), item_features(known, until))
    assert not np.array_equal(item_features(shop, until), item_features(shop, shop.timeline.test_at))
    tables, later_tables = (vars(shop_tables(shop, moment, 0)) for moment in (until, shop.timeline.test_at))
    for name, table in vars(shop_tables(known, until, 0)).items():
        assert np.array_equal(tables[name], table), name
        assert not np.array_equal(later_tables[name], table), name


def test_the_net_of_first_purchases_is_fitted_on_baskets_before_the_tuning_window(shop: Shop) -> None:
    known = _known_before_tuning(shop)
    one, two = (fit_adopt(each, shop.bare_table(np.arange(len(shop.histories))), 0) for each in (shop, known))
    assert one is not None and two is not None
    for name, tensor in adopt_tensors(one).items():
        assert torch.equal(tensor, adopt_tensors(two)[name]), name
    served = bundled_adopt(shop, one, 2.0, 0)
    assert served is not None and np.array_equal(served.weight, one.weight)
    for name, array in vars(shop_tables(shop, shop.timeline.test_at, 0)).items():
        assert np.array_equal(getattr(served, name), array)
    assert bundled_adopt(shop, one, 0.0, 0) is None


def test_the_net_of_own_items_is_fitted_on_baskets_before_the_tuning_window(shop: Shop) -> None:
    known = _known_before_tuning(shop)
    one, two = (fit_rebuy(each, shop.bare_table(np.arange(len(shop.histories))), 0) for each in (shop, known))
    assert one is not None and two is not None
    weights = Weights(1.0, 0.0, 0.0, 30.0, rebuy=2.0, own=3.0)
    for name, tensor in rebuy_tensors(one).items():
        assert torch.equal(tensor, rebuy_tensors(two)[name]), name
    served = bundled_rebuy(shop, one, weights)
    assert served is not None and served.out_bias == pytest.approx(one.out_bias + 1.5)
    assert np.array_equal(served.items, item_features(shop, shop.timeline.test_at))
    assert bundled_rebuy(shop, one, dataclasses.replace(weights, rebuy=0.0)) is None


def test_a_visit_across_a_cut_is_seen_only_up_to_it(tiny_shop_log: ShopLog) -> None:
    cut = pipeline.prepare(tiny_shop_log).timeline.test_at
    events = pl.DataFrame(
        {
            "customer": pl.Series([0, 0], dtype=pl.Int32),
            "item": pl.Series([0, 1], dtype=pl.Int32),
            "kind": pl.Series([0, 0], dtype=pl.Int8),
            "time": [cut - 60.0, cut + 60.0],
            "quantity": pl.Series([1.0, 1.0], dtype=pl.Float32),
            "price": pl.Series([1.0, 1.0], dtype=pl.Float32),
            "basket": ["one visit", "one visit"],
        }
    )
    log = dataclasses.replace(
        tiny_shop_log, events=pl.concat([events, tiny_shop_log.events.filter(pl.col("customer") > 0)])
    )
    shop = pipeline.prepare(log)
    assert shop.timeline.test_at == cut
    assert len(shop.histories[0].before(cut)) == 1


@pytest.mark.parametrize("campaign", [False, True])
def test_a_visit_across_a_weekly_cut_or_a_campaigns_start_is_known_only_up_to_it(
    tiny_shop_log: ShopLog, campaign: bool
) -> None:
    timeline = pipeline.prepare(tiny_shop_log).timeline
    cut = next(moment for moment in timeline.weekly if moment not in timeline.cutoffs)
    cut += 3.2 * DAY if campaign else 0.0
    reached = pl.DataFrame(
        {
            "customer": pl.Series([0], dtype=pl.Int32),
            "campaign_id": ["c"],
            "campaign_type": ["A"],
            "start": [cut],
            "end": [cut + DAY],
            "redeemed": [True],
        }
    )
    found, leaky = [], []
    for later in (1.0, 50.0):
        events = pl.DataFrame(
            {
                "customer": pl.Series([0] * 3, dtype=pl.Int32),
                "item": pl.Series([0] * 3, dtype=pl.Int32),
                "kind": pl.Series([0] * 3, dtype=pl.Int8),
                "time": [cut - 20.0 * DAY, cut - 60.0, cut + 60.0],
                "quantity": pl.Series([1.0, 1.0, later], dtype=pl.Float32),
                "price": pl.Series([1.0, 1.0, later], dtype=pl.Float32),
                "basket": ["first", "across", "across"],
            }
        )
        events = pl.concat([events, tiny_shop_log.events.filter(pl.col("customer") > 0)])
        shop = pipeline.prepare(dataclasses.replace(tiny_shop_log, events=events, campaigns=reached))
        prices, customer = shop.items.row_prices, np.array([0])
        if campaign:
            found.append(shop.campaign_rows(shop.bare_table(customer), "train").features)
        else:
            rows = weekly_rows(customer, shop.histories, shop.timeline, prices, 0)
            found.append(rows.features[rows.moment == cut])
        leaky.append(dense_features(shop.histories[0].before(cut), prices))
        assert len(np.unique(shop.histories[0].basket)) == 2  # the visit counts once
    assert len(found[0]) == 1
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(leaky[0], leaky[1])


def test_a_customers_samples_never_ask_without_a_history(shop: Shop) -> None:
    for customer in range(len(shop.histories)):
        history = shop.histories[customer]
        for sample in samples_of(history, shop.timeline, shop.starts[customer]):
            assert len(history.before(sample.moment)) > 0


@settings(max_examples=200)
@given(st.floats(1.0, 2e9), st.floats(0.001, 4000.0))
def test_every_log_that_has_a_duration_can_be_cut(start: float, days: float) -> None:
    timeline = make_timeline(start, start + days * DAY)
    assert timeline.horizons == HORIZONS[: len(timeline.horizons)]
    assert start <= timeline.train_at[0] < timeline.tuned_at < timeline.test_at < timeline.end
    assert (days < 34.9) <= (not timeline.horizons)


def test_a_year_gives_the_documented_cuts() -> None:
    start, end = datetime(2017, 1, 1, 12, tzinfo=UTC), datetime(2018, 1, 1, 4, tzinfo=UTC)
    timeline = make_timeline(start.timestamp(), end.timestamp())
    days = [datetime.fromtimestamp(moment, UTC).strftime("%m-%d %H:%M") for moment in timeline.cutoffs]
    expected = ["07-05", "08-04", "09-03", "10-03", "11-02", "12-02"]
    assert days == [f"{day} 00:00" for day in expected]
    assert timeline.horizons == (7, 14, 30)


def test_one_moment_is_no_log() -> None:
    with pytest.raises(ConfigurationError, match="all events are at 1970-01-02"):
        make_timeline(DAY, DAY)


def test_hidden_states_are_kept_apart_by_what_they_depend_on(shop: Shop, tiny_base: Base, tmp_path: Path) -> None:
    catalog = pipeline.write_items(shop.items, tmp_path / "items")
    folders = set()
    for text, seed in (("a", 0), ("b", 0), ("a", 1)):
        schema = pipeline.prompt_schema(shop, text, 48, 16, adapted=False)
        made, _ = pipeline.hidden_states(shop, catalog, tiny_base, schema, tmp_path, seed, None)
        folders.add(made.folder)
    assert len(folders) == 3
