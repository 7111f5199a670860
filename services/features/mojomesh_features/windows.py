"""Windowed aggregates as of an event time, from the events that PostgreSQL has now."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from mojomesh_chassis.errors import TransientError
from mojomesh_contracts.events import FeatureValue
from mojomesh_features.aggregating import Facts, Values, aggregated
from mojomesh_features.retiring import Retired
from mojomesh_store.errors import Moved
from mojomesh_store.facts import Fact, Span, facts_of
from mojomesh_store.online import microseconds, moment
from mojomesh_store.shards import FeatureStore, Shard
from mojomesh_store.vectors import WindowAsked, Windowed

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
        n_placed = self._feature_store.n_placed
        alike: dict[_OfOneKey, list[WindowAsked]] = defaultdict(list)
        for window in asked:
            aggregate, key, at_us = window
            self._retired.check(aggregate.feature_set, at_us - aggregate.window_us)
            # What is found by its entity lies on one shard, anything else on all.
            entity_id = next((part for name, part in zip(aggregate.theirs, key, strict=True) if name is None), None)
            everywhere = self._feature_store.shards[:n_placed]
            shards = everywhere if entity_id is None else (self._feature_store.shard_of(entity_id),)
            alike[aggregate.feature_set, aggregate.theirs, shards].append(window)
        answers: dict[WindowAsked, FeatureValue] = {}
        again: list[WindowAsked] = []
        for (feature_set, by, shards), windows in alike.items():
            try:
                answers |= await self._read(feature_set, by, shards, n_placed, windows)
            except Moved:
                again += windows
            except TransientError as error:
                away.append(error)
        return answers | await self.at(again, away) if again else answers

    async def _read(
        self, feature_set: str, by: Sequence[str | None], shards: Sequence[Shard], n_placed: int, asked: Sequence[WindowAsked]
    ) -> dict[WindowAsked, FeatureValue]:
        kinds = {aggregate.feature: aggregate.kind for aggregate, _, _ in asked if aggregate.feature is not None}
        spans, numbers = _spans(asked)
        parts = await asyncio.gather(*(self.found(shard, n_placed, feature_set, by, list(kinds), spans) for shard in shards))
        if self._feature_store.n_placed != n_placed:
            raise Moved("entities are placed otherwise than when the shards were chosen")
        # While entities move their events are on two shards: those count that are where the entity is.
        place = self._feature_store.shard_of
        found = [fact for shard, part in zip(shards, parts, strict=True) for fact in part if place(fact.entity_id) is shard]
        return await asyncio.to_thread(_aggregated, asked, numbers, _facts(found, kinds))

    async def found(
        self, shard: Shard, n_placed: int, feature_set: str, by: Sequence[str | None], features: Sequence[str], spans: Sequence[Span]
    ) -> list[Fact]:
        """The events of a shard in each span, in no order."""
        async with shard.begin(PATIENCE_S) as db:
            facts = await facts_of(db, feature_set, by, features, spans)
            await self._feature_store.check_reading(db, shard, n_placed)
            return facts


def _spans(asked: Sequence[WindowAsked]) -> tuple[list[Span], dict[WindowAsked, int]]:
    """What to read for windows, each event once: windows of one key that overlap are one span; and which span a window is in."""
    spans: list[Span] = []
    numbers: dict[WindowAsked, int] = {}
    for window in sorted(asked, key=lambda window: (window[1], window[2] - window[0].window_us)):
        aggregate, key, at_us = window
        since, until = moment(at_us - aggregate.window_us), moment(at_us)
        if spans and spans[-1].key == key and since <= spans[-1].until:
            spans[-1] = Span(key, spans[-1].since, max(until, spans[-1].until))
        else:
            spans.append(Span(key, since, until))
        numbers[window] = len(spans) - 1
    return spans, numbers


def _facts(found: list[Fact], kinds: Mapping[str, str | None]) -> Facts:
    """As columns, in order; the number of its span is a fact's key."""
    found.sort(key=lambda fact: fact[:3])
    columns: dict[str, Values] = {
        name: np.array([fact.values[place] for fact in found], dtype=object if kind == "category" else np.float64)
        for place, (name, kind) in enumerate(kinds.items())
    }
    times = np.array([microseconds(fact.event_time) for fact in found], dtype=np.int64)
    return Facts(np.array([fact.n for fact in found], dtype=np.int64), times, columns)


def _aggregated(asked: Sequence[WindowAsked], numbers: Mapping[WindowAsked, int], facts: Facts) -> dict[WindowAsked, FeatureValue]:
    together: dict[Windowed, list[WindowAsked]] = defaultdict(list)
    for window in asked:
        together[window[0]].append(window)
    answers: dict[WindowAsked, FeatureValue] = {}
    for aggregate, windows in together.items():
        keys = np.array([numbers[window] for window in windows], dtype=np.int64)
        times = np.array([at_us for _, _, at_us in windows], dtype=np.int64)
        answers |= zip(windows, aggregated(aggregate, facts, keys, times), strict=True)
    return answers
