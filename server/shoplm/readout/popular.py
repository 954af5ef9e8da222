"""Selecting for a customer without a history: there is nothing for the model to read, so popularity decides alone."""

from __future__ import annotations

import numpy as np
from shoplm.readout.ranking import best, output_of
from shoplm.readout.table import SelectTable
from shoplm.request import Select, SelectOutput


def popular(table: SelectTable, select: Select) -> SelectOutput:
    """The most popular items that pass the filter; of given candidates, those alone.

    Where popularity has no weight beside the model it is all that counts here: the term is log popularity itself. The
    other terms are 0. Ties: lower item row first.
    """
    terms = table.popularity_terms if table.popularity_weight else table.popularity
    allowed = table.filters.allowed(select.item_filter, select.exclude_items).mask
    rows = np.flatnonzero(allowed)
    if select.candidates is not None:
        given = np.unique(np.asarray(select.candidates, np.int64))
        rows = given[allowed[given]]
    items = rows[best(terms[rows], select.count)]
    nothing = np.zeros(len(items), np.float32)
    return output_of(items, nothing, nothing, terms[items], nothing)
