"""Windowed aggregates: the one computation behind online reads and snapshots.

Equal by construction: the same function gets the same numbers in the same order, whoever asks. A sum is taken over the window's facts
alone, in the order of event time and entity_id, so neither other facts nor the size of a block can change its last bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mojomesh_contracts.events import FeatureValue
from mojomesh_store.vectors import Windowed

Integers = NDArray[np.int64]
Values = NDArray[Any]

MOST_PAIRS = 4_000_000  # of rows and facts side by side, where each row knows its own versions of the facts


@dataclass(frozen=True)
class Facts:
    """Events in the order of key, event time and entity_id.

    `known_us` says from when until when each version of an event counts, where rows may know different ones: [from, until).
    """

    keys: Integers
    event_us: Integers
    features: Mapping[str, Values]  # float64 with NaN, or texts with None, for missing
    known_us: tuple[Integers, Integers] | None = None

    @cached_property
    def places(self) -> tuple[Integers, Integers]:
        """The event times there are, ascending, and where each fact has its place by key and time: one number, ascending."""
        moments = np.unique(self.event_us)
        return moments, self.keys * (len(moments) + 1) + np.searchsorted(moments, self.event_us)


def aggregated(window: Windowed, facts: Facts, keys: Integers, at_us: Integers) -> list[FeatureValue]:
    """The aggregate for each pair of key and asked time; a key below 0 is missing, and so is its aggregate."""
    firsts, lasts = _slices(window.window_us, facts, keys, at_us)
    if facts.known_us is None:
        return _missing_keys(keys, _values_of(window, facts, firsts, lasts))
    found: list[FeatureValue] = []
    for begin, end in _blocks(lasts - firsts):
        places, counts = _visible(facts.known_us, firsts[begin:end], lasts[begin:end], at_us[begin:end])
        seen = Facts(facts.keys, facts.event_us, {name: values[places] for name, values in facts.features.items()})
        ends = np.cumsum(counts)
        found += _values_of(window, seen, ends - counts, ends)
    return _missing_keys(keys, found)


def _missing_keys(keys: Integers, found: list[FeatureValue]) -> list[FeatureValue]:
    return [value if key >= 0 else None for key, value in zip(keys.tolist(), found, strict=True)]


def _slices(window_us: int, facts: Facts, keys: Integers, at_us: Integers) -> tuple[Integers, Integers]:
    """Where each window begins and ends among the facts."""
    moments, places = facts.places
    n = len(moments) + 1
    firsts, lasts = (np.searchsorted(places, keys * n + np.searchsorted(moments, time)) for time in (at_us - window_us, at_us))
    return firsts, lasts


def _blocks(sizes: Integers) -> list[tuple[int, int]]:
    """The rows in pieces of about MOST_PAIRS facts."""
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // MOST_PAIRS)) + 1
    bounds = [0, *cuts.tolist(), len(sizes)]
    return list(pairwise(bounds))


def _visible(known_us: tuple[Integers, Integers], firsts: Integers, lasts: Integers, at_us: Integers) -> tuple[Integers, Integers]:
    """The facts that each row knows, one row after the other, and how many it knows."""
    sizes = lasts - firsts
    rows = np.repeat(np.arange(len(sizes)), sizes)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(firsts, sizes)
    seen = (known_us[0][places] <= at_us[rows]) & (at_us[rows] < known_us[1][places])
    return places[seen], np.bincount(rows[seen], minlength=len(sizes))


def _values_of(window: Windowed, facts: Facts, firsts: Integers, lasts: Integers) -> list[FeatureValue]:
    if window.feature is None:
        return [float(count) for count in lasts - firsts]
    values = facts.features[window.feature]
    there = ~np.isnan(values) if values.dtype == np.float64 else values != np.array(None)
    counted = np.concatenate([[0], np.cumsum(there)])
    values, firsts, lasts = values[there], counted[firsts], counted[lasts]
    counts = lasts - firsts
    match window.function:
        case "count":
            found = counts.astype(np.float64)
        case "distinct":
            found = _distinct(values, firsts, lasts)
        case "sum":
            found = np.where(counts > 0, _reduced(np.add, values, firsts, lasts), 0.0)
        case "mean":
            found = _reduced(np.add, values, firsts, lasts) / np.maximum(counts, 1)
        case "min" | "max":
            found = _reduced(np.minimum if window.function == "min" else np.maximum, values, firsts, lasts)
        case "last":
            return _last(window, values, firsts, lasts)
    return [value if value - value == 0 else None for value in found.tolist()]  # of a sum that is not finite there is no value


def _reduced(function: np.ufunc, values: Values, firsts: Integers, lasts: Integers) -> NDArray[np.float64]:
    """`function` over each slice; NaN for an empty one."""
    found = np.full(len(firsts), np.nan)
    order = np.argsort(firsts, kind="stable")
    order = order[lasts[order] > firsts[order]]
    if len(order):
        # reduceat also reduces what lies between two slices: in this order that is little.
        bounds = np.stack([firsts[order], lasts[order]], axis=1).ravel()
        with np.errstate(over="ignore", invalid="ignore"):
            found[order] = function.reduceat(np.append(values, 0.0), bounds)[::2]
    return found


def _distinct(values: Values, firsts: Integers, lasts: Integers) -> NDArray[np.float64]:
    """How many different values each slice has: those that it has not had before."""
    before: Integers = np.empty(len(values), dtype=np.int64)
    last: dict[object, int] = {}
    for place, value in enumerate(values.tolist()):
        before[place] = last.get(value, -1)
        last[value] = place
    bounds = zip(firsts.tolist(), lasts.tolist(), strict=True)
    return np.array([np.count_nonzero(before[first:end] < first) for first, end in bounds], dtype=np.float64)


def _last(window: Windowed, values: Values, firsts: Integers, lasts: Integers) -> list[FeatureValue]:
    of_kind = bool if window.kind == "boolean" else lambda value: value
    listed = values.tolist()
    bounds = zip(firsts.tolist(), lasts.tolist(), strict=True)
    return [of_kind(listed[end - 1]) if end > first else None for first, end in bounds]
