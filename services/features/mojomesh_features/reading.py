"""Reading rows as of an event time: from Redis where it is certain, else from PostgreSQL, and the same answer either way."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from prometheus_client import Counter
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.errors import TransientError
from mojomesh_features.coalescing import Coalescer
from mojomesh_features.retiring import Retired
from mojomesh_features.windows import PATIENCE_S, WindowReader
from mojomesh_store import rows
from mojomesh_store.errors import Moved
from mojomesh_store.online import ROWS_KEPT, AsOf, Entity, OnlineRow, OnlineStore, Window, moment
from mojomesh_store.shards import FeatureStore, Shard
from mojomesh_store.vectors import Plan, Vector, vectors

_LOADS = Counter("mojomesh_row_loads_total", "Transactions that read rows which Redis did not have, each of one shard and feature set")

_NOW_KNOWN = datetime.max.replace(tzinfo=UTC)

Thing = TypeVar("Thing", bound=Hashable)
Answer = TypeVar("Answer")
Found = OnlineRow | TransientError | None
"""The error of what lies on a shard that is away: what was asked together with it is answered nevertheless."""


class FeatureReader:
    """The rows of entities as of event times, as the mesh knows them now or knew them."""

    def __init__(self, feature_store: FeatureStore, online: OnlineStore, retired: Retired) -> None:
        self._feature_store = feature_store
        self._online = online
        self._retired = retired
        self.aggregates = WindowReader(feature_store, retired)
        self._windows: Coalescer[Entity, Window | TransientError] = Coalescer(self.windows)
        self._older: Coalescer[AsOf, Found] = Coalescer(self._stored_now)

    async def at(self, asked: Sequence[AsOf]) -> dict[AsOf, OnlineRow | None]:
        """The row of each entity that was true at the event time, as known now; None if there is none.

        Raises:
            Gone: Rows that were true then have left PostgreSQL.
            TransientError: A shard that holds some of them is away.
        """
        return _all_of(await self._at(asked))

    async def _at(self, asked: Sequence[AsOf]) -> dict[AsOf, Found]:
        for (feature_set, _), at_us in asked:
            self._retired.check(feature_set, at_us)
        windows = await self._windows.get(dict.fromkeys(entity for entity, _ in asked))
        found: dict[AsOf, Found] = {}
        for entity, at in asked:
            window = windows[entity]
            if isinstance(window, TransientError):
                found[entity, at] = window
            elif window.covers(at):
                found[entity, at] = window.at(at)
        return found | await self._older.get(dict.fromkeys(as_of for as_of in asked if as_of not in found))

    async def known_at(self, asked: Sequence[AsOf], snapshot_time: datetime) -> dict[AsOf, OnlineRow | None]:
        """The same as known at `snapshot_time`, and the same for ever.

        Raises:
            PermanentError: `snapshot_time` is later than now.
            Gone: Rows that were true, or known, then have left PostgreSQL.
            TransientError: A shard is away.
        """
        for (feature_set, _), at_us in asked:
            self._retired.check(feature_set, at_us)
        await self._feature_store.pass_snapshot(snapshot_time)
        found = _all_of(await self._stored(asked, snapshot_time))
        for ((feature_set, _), _), row in found.items():
            self._retired.check_known(feature_set, None if row is None else row.event_us)
        return found

    async def vectors(self, plan: Plan, asked: Sequence[tuple[str, int]]) -> list[Vector | TransientError | None]:
        """A model's vector of each entity_id at its event time (microseconds since 1970); None where the spine has no row.

        An error stands where a row that is needed lies on a shard that is away.
        """
        away: list[TransientError] = []

        async def rows_at(asked: Sequence[AsOf]) -> dict[AsOf, OnlineRow | None]:
            found = await self._at(asked)
            away.extend(row for row in found.values() if isinstance(row, TransientError))
            return {as_of: row for as_of, row in found.items() if not isinstance(row, TransientError)}

        found = await vectors(plan, asked, rows_at, lambda windows: self.aggregates.at(windows, away))
        return [found[place] if place in found else away[0] for place in range(len(asked))]

    async def windows(self, entities: Sequence[Entity]) -> Mapping[Entity, Window | TransientError]:
        """The newest rows of each entity, from Redis or loaded and kept there; not coalesced with what others ask."""
        kept = await self._online.windows(entities)
        known: dict[Entity, Window | TransientError] = {
            entity: window for entity, window in zip(entities, kept, strict=True) if window is not None
        }
        if missing := [entity for entity in entities if entity not in known]:
            lease = await self._online.lease(missing)
            began = time.perf_counter()
            loaded = await self._load(missing)
            whole = {entity: window for entity, window in loaded.items() if isinstance(window, Window)}
            await self._online.keep(lease, whole, 1000 * (time.perf_counter() - began))
            known |= loaded
        return known

    async def _load(self, entities: Sequence[Entity]) -> dict[Entity, Window | TransientError]:
        async def load(db: AsyncSession, feature_set: str, part: list[Entity]) -> list[Window]:
            newest = await rows.newest_of_many(db, feature_set, [entity_id for _, entity_id in part], ROWS_KEPT)
            return [self._retired.cut(feature_set, Window.of([OnlineRow.of(row) for row in found], ROWS_KEPT)) for found in newest]

        return await self._of_shards(entities, lambda entity: entity, load)

    async def _stored_now(self, asked: Sequence[AsOf]) -> dict[AsOf, Found]:
        return await self._stored(asked, _NOW_KNOWN)

    async def _stored(self, asked: Sequence[AsOf], snapshot_time: datetime) -> dict[AsOf, Found]:
        async def load(db: AsyncSession, feature_set: str, part: list[AsOf]) -> list[OnlineRow | None]:
            pairs = [(entity_id, moment(at)) for (_, entity_id), at in part]
            found = await rows.latest_of_many(db, feature_set, pairs, snapshot_time)
            return [None if row is None else OnlineRow.of(row) for row in found]

        return await self._of_shards(asked, lambda as_of: as_of[0], load)

    async def _of_shards(
        self,
        things: Iterable[Thing],
        entity_of: Callable[[Thing], Entity],
        load: Callable[[AsyncSession, str, list[Thing]], Awaitable[list[Answer]]],
    ) -> dict[Thing, Answer | TransientError]:
        """The answers of `load`, called for each shard and feature set that hold rows of some; the error of a shard that is away."""

        async def load_part(shard: Shard, feature_set: str, part: list[Thing]) -> dict[Thing, Answer | TransientError]:
            _LOADS.inc()
            try:
                async with shard.begin(PATIENCE_S) as db:
                    answers = await load(db, feature_set, part)
                    await self._feature_store.check_reading(db, shard, n_placed)
                return dict(zip(part, answers, strict=True))
            except TransientError as error:
                return dict.fromkeys(part, error)

        n_placed = self._feature_store.n_placed
        parts: dict[tuple[Shard, str], list[Thing]] = {}
        for thing in things:
            feature_set, entity_id = entity_of(thing)
            parts.setdefault((self._feature_store.shard_of(entity_id), feature_set), []).append(thing)
        loaded = await asyncio.gather(*(load_part(shard, feature_set, part) for (shard, feature_set), part in parts.items()))
        found = {thing: answer for part in loaded for thing, answer in part.items()}
        if moved := [thing for thing, answer in found.items() if isinstance(answer, Moved)]:
            again: dict[Thing, Answer | TransientError] = await self._of_shards(moved, entity_of, load)
            found |= again
        return found


def _all_of(found: Mapping[AsOf, Found]) -> dict[AsOf, OnlineRow | None]:
    """The same without errors.

    Raises:
        TransientError: A shard that holds some is away.
    """
    whole: dict[AsOf, OnlineRow | None] = {}
    for as_of, row in found.items():
        if isinstance(row, TransientError):
            raise row
        whole[as_of] = row
    return whole
