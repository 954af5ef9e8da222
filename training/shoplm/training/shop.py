"""A shop's log, made ready: the timeline, the numbered items, the customers' histories."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray
from shoplm.features import dense_features
from shoplm.training.campaigns import Campaigns
from shoplm.training.catalogue import ShopItems
from shoplm.training.examples import Examples, ranking_examples
from shoplm.training.histories import Histories
from shoplm.training.log import ShopLog
from shoplm.training.samples import HiddenTable, Task, Use, campaign_starts, samples_of
from shoplm.training.timeline import Timeline

OBSERVED_SHARE = 0.8  # a campaign that goes on beyond the log counts for the test from this share of its days on


@dataclass(frozen=True)
class Shop:
    """Everything about the shop that fitting and measuring read."""

    log: ShopLog
    timeline: Timeline
    items: ShopItems
    histories: Histories

    @cached_property
    def starts(self) -> list[list[float]]:
        """Per customer, the starts of the campaigns that reached it."""
        return campaign_starts(self.log.campaigns, len(self.log.customer_ids))

    @cached_property
    def campaign_types(self) -> list[str]:
        return sorted(self.log.campaigns["campaign_type"].unique().to_list())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what prompts depend on: events, item numbers and texts, profiles."""
        digest = hashlib.sha256()
        for name in ("customer", "item", "kind", "time", "quantity", "price"):
            digest.update(np.ascontiguousarray(self.log.events[name].to_numpy()).tobytes())
        for text in (self.log.events["basket"].to_list(), sorted(self.log.attributes.items())):
            digest.update(repr(text).encode())
        digest.update(self.items.index.tobytes() + self.items.has_row.tobytes())
        texts = self.items.table.select("item_id", "title", "category", "product_type")
        digest.update(texts.write_csv().encode())
        return digest.hexdigest()

    def popularity(self) -> NDArray[np.float32]:
        """Natural log of each row's share of the label events before the test, one added to every count: [rows]."""
        counts = self.items.row_counts.astype(np.float64)
        shares = (counts + 1.0) / (counts.sum() + max(len(counts), 1))
        result: NDArray[np.float32] = np.log(shares).astype(np.float32)
        return result

    def row_counts_before(self, until: float) -> NDArray[np.int64]:
        """Label events of each row before `until` (Unix seconds): [rows]."""
        kept = (pl.col("time") < until) & (pl.col("kind") == int(self.items.label_kind))
        items = self.log.events.filter(kept)["item"].to_numpy()
        return np.bincount(items, minlength=len(self.log.item_ids))[self.items.row_item].astype(np.int64)

    def bare_table(self, customers: NDArray[np.integer]) -> HiddenTable:
        """All samples of these customers, with hidden states of width 0: for baselines."""
        return HiddenTable.bare(
            [
                (int(customer), sample)
                for customer in customers
                for sample in samples_of(self.histories[int(customer)], self.timeline, self.starts[int(customer)])
            ]
        )

    def training_examples(self, table: HiddenTable, decay_days: float) -> Examples:
        """What was bought next before `tuned_at`, of the table's samples that train items."""
        return ranking_examples(
            table,
            table.where(Task.RECOMMEND, Use.ITEM_TRAIN),
            self.histories,
            self.items.label_kind,
            before=self.timeline.tuned_at,
            decay_days=decay_days,
        )

    def campaign_rows(self, table: HiddenTable, part: str) -> Campaigns:
        """Customers at campaign starts. `part`: `train`, campaigns that end by `test_at`; `test`, the others of which
        most was observed. `table` is a bare one: it names the customers and moments.
        """
        chosen = table.where(Task.PREDICT, Use.CAMPAIGN)
        keys = set(zip(table.customer[chosen].tolist(), table.moment[chosen].tolist(), strict=True))
        reached = self.log.campaigns.filter(self._part(part)).sort("customer", "start", "campaign_id")
        rows = [row for row in reached.iter_rows(named=True) if (row["customer"], row["start"]) in keys]
        return Campaigns(
            customer=np.array([row["customer"] for row in rows], np.int32),
            features=self._features(rows),
            kind=np.array([self.campaign_types.index(row["campaign_type"]) for row in rows], np.int64),
            redeemed=np.array([row["redeemed"] for row in rows], bool),
            campaign=np.array([row["campaign_id"] for row in rows], np.str_),
        )

    def _part(self, part: str) -> pl.Expr:
        start, end = pl.col("start"), pl.col("end")
        if part == "train":
            return end <= self.timeline.test_at
        observed = (self.timeline.end - start) >= OBSERVED_SHARE * (end - start)
        return (end > self.timeline.test_at) & observed

    def _features(self, rows: Sequence[dict[str, float]]) -> NDArray[np.float32]:
        width = len(dense_features(self.histories[0].before(0.0), self.items.row_prices))
        features = np.zeros((len(rows), width), np.float32)
        last = None
        for index, row in enumerate(rows):
            customer = int(row["customer"])
            if customer != last:
                history, last = self.histories[customer], customer
            known = self.histories.before(customer, history, row["start"])
            features[index] = dense_features(known, self.items.row_prices)
        return features
