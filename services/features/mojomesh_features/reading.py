"""Reading rows as of an event time: from Redis where it is certain, else from PostgreSQL, and the same answer either way."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from mojomesh_chassis.database import Database
from mojomesh_features.coalescing import Coalescer
from mojomesh_features.retiring import Retired
from mojomesh_features.windows import WindowReader
from mojomesh_store import rows
from mojomesh_store.online import ROWS_KEPT, Entity, OnlineRow, OnlineStore, Window, moment
from mojomesh_store.shards import FeatureStore
from mojomesh_store.vectors import AsOf, Plan, Vector, vectors

_NOW_KNOWN = datetime.max.replace(tzinfo=UTC)

Thing = TypeVar("Thing")


class FeatureReader:
    """The rows of entities as of event times, as the mesh knows them now or knew them."""

    def __init__(self, feature_store: FeatureStore, online: OnlineStore, retired: Retired) -> None:
        self._feature_store = feature_store
        self._online = online
        self._retired = retired
        self.aggregates = WindowReader(feature_store, retired)
        self._windows: Coalescer[Entity, Window] = Coalescer(self.windows)
        self._older: Coalescer[AsOf, OnlineRow | None] = Coalescer(self._stored_now)

    async def at(self, asked: Sequence[AsOf]) -> dict[AsOf, OnlineRow | None]:
        """The row of each entity that was true at the event time, as known now; None if there is none.

        Raises:
            Gone: Rows that were true then have left PostgreSQL.
        """
        for (feature_set, _), at_us in asked:
            self._retired.check(feature_set, at_us)
        windows = await self._windows.get(dict.fromkeys(entity for entity, _ in asked))
        older = await self._older.get(dict.fromkeys(as_of for as_of in asked if not windows[as_of[0]].covers(as_of[1])))
        return {as_of: older[as_of] if as_of in older else windows[as_of[0]].at(as_of[1]) for as_of in asked}

    async def known_at(self, asked: Sequence[AsOf], snapshot_time: datetime) -> dict[AsOf, OnlineRow | None]:
        """The same as known at `snapshot_time`, and the same for ever.

        Raises:
            PermanentError: `snapshot_time` is later than now.
            Gone: Rows that were true, or known, then have left PostgreSQL.
        """
        for (feature_set, _), at_us in asked:
            self._retired.check(feature_set, at_us)
        await self._feature_store.pass_snapshot(snapshot_time)
        found = await self._stored(asked, snapshot_time)
        for ((feature_set, _), _), row in found.items():
            self._retired.check_known(feature_set, None if row is None else row.event_us)
        return found

    async def vectors(self, plan: Plan, asked: Sequence[tuple[str, int]]) -> list[Vector | None]:
        """A model's vector of each entity_id at its event time (microseconds since 1970); None where the spine has no row."""
        found = await vectors(plan, asked, self.at, self.aggregates.at)
        return [found[place] for place in range(len(asked))]

    async def windows(self, entities: Sequence[Entity]) -> Mapping[Entity, Window]:
        """The newest rows of each entity, from Redis or loaded and kept there; not coalesced with what others ask."""
        generation, kept = await self._online.windows(entities)
        known = {entity: window for entity, window in zip(entities, kept, strict=True) if window is not None}
        if missing := [entity for entity in entities if entity not in known]:
            began = time.perf_counter()
            loaded = await self._load(missing)
            await self._online.keep(generation, loaded, 1000 * (time.perf_counter() - began))
            known |= loaded
        return known

    async def _load(self, entities: Sequence[Entity]) -> dict[Entity, Window]:
        loaded: dict[Entity, Window] = {}
        for (shard, feature_set), part in self._by_place(entities, entity_of=lambda entity: entity).items():
            async with shard.begin() as db:
                newest = await rows.newest_of_many(db, feature_set, [entity_id for _, entity_id in part], ROWS_KEPT)
            for entity, found in zip(part, newest, strict=True):
                loaded[entity] = self._retired.cut(feature_set, Window.of([OnlineRow.of(row) for row in found], ROWS_KEPT))
        return loaded

    async def _stored_now(self, asked: Sequence[AsOf]) -> dict[AsOf, OnlineRow | None]:
        return await self._stored(asked, _NOW_KNOWN)

    async def _stored(self, asked: Sequence[AsOf], snapshot_time: datetime) -> dict[AsOf, OnlineRow | None]:
        answers: dict[AsOf, OnlineRow | None] = {}
        for (shard, feature_set), part in self._by_place(asked, entity_of=lambda as_of: as_of[0]).items():
            pairs = [(entity_id, moment(at)) for (_, entity_id), at in part]
            async with shard.begin() as db:
                found = await rows.latest_of_many(db, feature_set, pairs, snapshot_time)
            answers |= {as_of: None if row is None else OnlineRow.of(row) for as_of, row in zip(part, found, strict=True)}
        return answers

    def _by_place(self, things: Iterable[Thing], entity_of: Callable[[Thing], Entity]) -> dict[tuple[Database, str], list[Thing]]:
        """Things by the shard and feature set that hold their rows: a statement each."""
        parts: dict[tuple[Database, str], list[Thing]] = {}
        for thing in things:
            feature_set, entity_id = entity_of(thing)
            parts.setdefault((self._feature_store.shard_of(entity_id), feature_set), []).append(thing)
        return parts
