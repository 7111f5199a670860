"""Erasing an entity from what features keeps of history: rows, sealed segments, snapshots. As the owner of the database.

Every step looks at what there is and not at what was done, so an erasure that was killed is finished by the next (docs/decisions/0017).
"""

import asyncio
import tempfile
from collections.abc import Collection
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path

import duckdb
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.faults import fault
from mojomesh_chassis.objects import Objects
from mojomesh_features.segments import Config, duckdb_config, n_rows_of, read_segment, rows_of_entity, write_without
from mojomesh_store import erasure, retirement, segments
from mojomesh_store.segments import Segment
from mojomesh_store.shards import FeatureStore


class Eraser:
    """Erases entities. `feature_store` is opened with the owner's URLs."""

    def __init__(self, feature_store: FeatureStore, objects: Objects, folder: Path, memory_limit: str) -> None:
        self._feature_store = feature_store
        self._objects = objects
        self._folder = folder
        self._memory_limit = memory_limit

    async def forget(self, feature_set: str, entity_id: str) -> tuple[int, int]:
        """Erase all that is known now of an entity from PostgreSQL and from segments; the number of rows, and of segments written anew.

        Raises:
            TransientError: A shard does not answer, or its writers hold their transactions open.
        """
        own = self._feature_store.shards[0]
        async with own.begin() as turn:
            await erasure.wait_turn(turn, feature_set)
            await self._feature_store.pass_snapshot()  # who writes of it now has written
            with tempfile.TemporaryDirectory(dir=self._folder, prefix="erasure-") as name:
                folder = Path(name)
                if (known_from := await self._known_from(feature_set, entity_id, folder)) is not None:
                    async with own.begin() as db:
                        await erasure.record_begin(db, feature_set, known_from)
                fault("store.erasure_recorded")
                erased = await self._erase(feature_set, entity_id, folder)
            fault("store.after_erasure")
            # Every snapshot that saw some of it is of an earlier time. What an erasure began that was killed has ended too.
            await erasure.record_end(turn, feature_set, await self._feature_store.pass_snapshot())
        return erased

    async def forget_snapshots(self, entity_id: str, joined_by: Collection[str]) -> int:
        """Remove the snapshots with the entity among their rows, and all of the models `joined_by`, which do not show it; how many.

        They can be taken again, without it.
        """
        gone = 0
        with tempfile.TemporaryDirectory(dir=self._folder, prefix="erasure-") as folder:
            for path in await self._objects.list("snapshots"):
                if path.split("/")[1] not in joined_by:
                    file = await self._objects.fetch(path, Path(folder))
                    if not await asyncio.to_thread(_holds, file, entity_id):
                        continue
                await self._objects.delete(path)
                gone += 1
        return gone

    async def _erase(self, feature_set: str, entity_id: str, folder: Path) -> tuple[int, int]:
        async with AsyncExitStack() as stack:
            shards = [await stack.enter_async_context(shard.begin()) for shard in self._feature_store.shards]
            for db in shards:
                await retirement.wait_turn(db)
                await segments.wait_turn(db, feature_set)
            n_rows = sum([await erasure.forget_rows(db, feature_set, entity_id) for db in shards])
            n_segments = await self._rewrite_all(shards, feature_set, entity_id, folder)
            fault("store.before_erasure")
        return n_rows, n_segments

    async def _known_from(self, feature_set: str, entity_id: str, folder: Path) -> datetime | None:
        times: list[datetime] = []
        for shard in self._feature_store.shards:
            async with shard.begin() as db:
                if (time := await erasure.known_from(db, feature_set, entity_id)) is not None:
                    times.append(time)
        for path in await self._objects.list(f"segments/{feature_set}"):
            file = await self._objects.fetch(path, folder)
            times += [row.created_at for row in await asyncio.to_thread(rows_of_entity, file, entity_id)]
        return min(times, default=None)

    async def _rewrite_all(self, shards: list[AsyncSession], feature_set: str, entity_id: str, folder: Path) -> int:
        """Write segments without the entity, in their places, a file that no manifest names as well; how many.

        Of such a file that held nobody else nothing is left: a sealer would find no rows in it to register.
        """
        manifest = {segment.path: (db, segment) for db in shards for segment in await segments.segments_of(db, feature_set)}
        written = 0
        for path in await self._objects.list(f"segments/{feature_set}"):
            file = await self._objects.fetch(path, folder)
            if found := await asyncio.to_thread(rows_of_entity, file, entity_id):
                for db in shards:
                    await erasure.forget_events(db, [(feature_set, row.event_time, row.event_id) for row in found])
                file = await asyncio.to_thread(write_without, file, entity_id, folder / "segment.parquet", self._config(folder))
                await self._objects.put(path, file)
                written += 1
                fault("store.segment_erased")
            if path in manifest:
                await _correct(*manifest[path], file)
            elif await asyncio.to_thread(n_rows_of, file) == 0:
                await self._objects.delete(path)
        return written

    def _config(self, folder: Path) -> Config:
        return duckdb_config(self._memory_limit, folder)


async def _correct(db: AsyncSession, segment: Segment, file: Path) -> None:
    """Let the manifest say what is in the file; it may have been written anew by an erasure that was killed afterwards."""
    n_rows = await asyncio.to_thread(n_rows_of, file)
    if n_rows == 0:
        await segments.correct(db, segment._replace(n_rows=0, n_tied=0, sum_of_seqs=0))
    elif n_rows != segment.n_rows:
        found = await asyncio.to_thread(read_segment, file, segment.feature_set, segment.follows, segment.path)
        await segments.correct(db, found)


def _holds(snapshot: Path, entity_id: str) -> bool:
    with duckdb.connect() as db:
        return db.execute(f"SELECT 1 FROM '{snapshot}' WHERE entity_id = ? LIMIT 1", [entity_id]).fetchone() is not None
