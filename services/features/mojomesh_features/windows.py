"""Windowed aggregates as of an event time, from the events that PostgreSQL has now."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from mojomesh_chassis.errors import TransientError
from mojomesh_contracts.events import FeatureValue
from mojomesh_features.aggregating import Facts, Values, aggregated
from mojomesh_features.retiring import Retired
from mojomesh_store.facts import Fact, Span, facts_of
from mojomesh_store.online import microseconds, moment
from mojomesh_store.shards import FeatureStore, Shard
from mojomesh_store.vectors import WindowAsked

PATIENCE_S = 1.0  # with one of several shards

_OfOneKey = tuple[str, tuple[str | None, ...], tuple[Shard, ...]]
"""A feature set, what its facts are found by, and where."""


class WindowReader:
    """Reads the events in windows, and aggregates them."""

    def __init__(self, feature_store: FeatureStore, retired: Retired) -> None:
        self._feature_store = feature_store
        self._retired = retired

    async def at(self, asked: Sequence[WindowAsked], away: list[TransientError]) -> dict[WindowAsked, FeatureValue]:
        """The aggregates, as known now. Those are left out that need a shard that is away, and the error is added to `away`.

        Raises:
            Gone: Events in a window have left PostgreSQL.
        """
        alike: dict[_OfOneKey, list[WindowAsked]] = defaultdict(list)
        for window in asked:
            aggregate, key, at_us = window
            self._retired.check(aggregate.feature_set, at_us - aggregate.window_us)
            # What is found by its entity lies on one shard, anything else on all.
            entity_id = next((part for name, part in zip(aggregate.theirs, key, strict=True) if name is None), None)
            shards = self._feature_store.shards if entity_id is None else (self._feature_store.shard_of(entity_id),)
            alike[aggregate.feature_set, aggregate.theirs, shards].append(window)
        answers: dict[WindowAsked, FeatureValue] = {}
        for (feature_set, by, shards), windows in alike.items():
            try:
                answers |= await self._read(feature_set, by, shards, windows)
            except TransientError as error:
                away.append(error)
        return answers

    async def _read(
        self, feature_set: str, by: Sequence[str | None], shards: Sequence[Shard], asked: Sequence[WindowAsked]
    ) -> dict[WindowAsked, FeatureValue]:
        longest: dict[tuple[tuple[str, ...], int], int] = {}
        for aggregate, key, at_us in asked:
            longest[key, at_us] = max(aggregate.window_us, longest.get((key, at_us), 0))
        kinds = {aggregate.feature: aggregate.kind for aggregate, _, _ in asked if aggregate.feature is not None}
        spans = [Span(key, moment(at_us - window_us), moment(at_us)) for (key, at_us), window_us in longest.items()]
        parts = await asyncio.gather(*(self.found(shard, feature_set, by, list(kinds), spans) for shard in shards))
        return await asyncio.to_thread(_aggregated, asked, list(longest), _facts([fact for part in parts for fact in part], kinds))

    async def found(
        self, shard: Shard, feature_set: str, by: Sequence[str | None], features: Sequence[str], spans: Sequence[Span]
    ) -> list[Fact]:
        """The events of a shard in each span, in no order."""
        async with shard.begin(PATIENCE_S) as db:
            return await facts_of(db, feature_set, by, features, spans)


def _facts(found: list[Fact], kinds: Mapping[str, str | None]) -> Facts:
    """As columns, in order; the number of its span is a fact's key. What two shards have, while entities move, counts once."""
    found = list({fact[:3]: fact for fact in sorted(found, key=lambda fact: fact[:5])}.values())
    columns: dict[str, Values] = {
        name: np.array([fact.values[place] for fact in found], dtype=object if kind == "category" else np.float64)
        for place, (name, kind) in enumerate(kinds.items())
    }
    times = np.array([microseconds(fact.event_time) for fact in found], dtype=np.int64)
    return Facts(np.array([fact.n for fact in found], dtype=np.int64), times, columns)


def _aggregated(asked: Sequence[WindowAsked], spans: list[tuple[tuple[str, ...], int]], facts: Facts) -> dict[WindowAsked, FeatureValue]:
    numbers = {span: n for n, span in enumerate(spans)}
    together: dict[object, list[WindowAsked]] = defaultdict(list)
    for window in asked:
        together[window[0]].append(window)
    answers: dict[WindowAsked, FeatureValue] = {}
    for windows in together.values():
        keys = np.array([numbers[key, at_us] for _, key, at_us in windows], dtype=np.int64)
        times = np.array([at_us for _, _, at_us in windows], dtype=np.int64)
        answers |= zip(windows, aggregated(windows[0][0], facts, keys, times), strict=True)
    return answers
