"""Sealing: what has become known is copied from PostgreSQL into immutable segments, by itself and when told to.

A segment is written under a key that says where it begins, never over another, and counts from the moment when the manifest names it. So
a sealer may be killed at any point and several may run: what was written and not registered is found in its place, compared with
PostgreSQL, and registered by whoever comes next.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import duckdb
from adbc_driver_manager import dbapi
from obstore.exceptions import BaseError

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import Conflict, MeshError
from mojomesh_chassis.faults import fault
from mojomesh_chassis.health import Health
from mojomesh_chassis.objects import Objects
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.definitions import FeatureSet
from mojomesh_features.segments import Extent, columns_of, duckdb_config, read_segment, write_segment
from mojomesh_store import rows, segments
from mojomesh_store.online import microseconds
from mojomesh_store.segments import Segment
from mojomesh_store.shards import FeatureStore, Shard

MOST_ROWS = 4_000_000  # a segment, and what came in the same second as its last
LOOK_S = 60.0
OUTAGES = (duckdb.Error, dbapi.Error, BaseError, OSError)  # of what a segment goes through; looked at again a minute later


@dataclass(frozen=True)
class Due:
    """When the tail of a feature set is to be sealed: at so many rows, or when one has become so old. By default whenever there is one."""

    rows: int = 1
    age: timedelta = timedelta.max


class Sealer:
    """Seals the rows of all shards. `shard_urls` are those of the feature store, in the same order."""

    def __init__(self, feature_store: FeatureStore, shard_urls: Sequence[str], objects: Objects, folder: Path, memory_limit: str) -> None:
        self._feature_store = feature_store
        self._shard_urls = shard_urls
        self._objects = objects
        self._folder = folder
        self._memory_limit = memory_limit

    async def seal(self, definitions: Definitions, due: Due = Due(), most_rows: int = MOST_ROWS) -> list[Segment]:
        """Seal what is due, into segments of about `most_rows` at most; the new segments.

        Raises:
            TransientError: A shard does not answer, or its writers hold their transactions open.
            Conflict: Where a segment belongs lies a file with other rows; all else that was due is sealed.
        """
        sealed: list[Segment] = []
        conflicts: list[Conflict] = []

        async def seal_shard(shard: Shard) -> None:
            async with shard.begin() as db:
                watermark = await rows.snapshot_clock(db)
            await rows.pass_snapshot(shard, watermark)
            # Only now: whatever was stored was checked against a definition that had been applied.
            await definitions.caught_up()
            for feature_set in list(definitions.feature_sets.values()):
                try:
                    while segment := await self._seal_next(shard, feature_set, watermark, due, most_rows):
                        log.info("segment_sealed", path=segment.path, n_rows=segment.n_rows)
                        sealed.append(segment)
                except Conflict as conflict:
                    log.error("segment_refused", feature_set=feature_set.name, reason=str(conflict))
                    conflicts.append(conflict)

        await self._feature_store.each(seal_shard)
        if conflicts:
            raise conflicts[0]
        return sealed

    async def _seal_next(self, shard: Shard, feature_set: FeatureSet, watermark: datetime, due: Due, most_rows: int) -> Segment | None:
        """Seal the oldest of the tail; None if nothing is due, or another process is at it."""
        name = feature_set.name
        async with shard.begin() as db:
            if not await segments.take_turn(db, name):
                return None
            follows = await segments.sealed_until(db, name)
            n_rows, oldest = await segments.unsealed(db, name, follows, watermark, due.rows)
            if oldest is None or (n_rows < due.rows and watermark - oldest < due.age):
                return None
            until = await segments.cut(db, name, follows, watermark, most_rows)
            path = f"segments/{name}/{shard.number}-{microseconds(follows) if follows else 0:016d}.parquet"
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix="seal-") as folder:
                sent = None
                if not await self._objects.exists(path):
                    sent = await self._write(self._shard_urls[shard.number], Extent(name, follows, until), feature_set, path, Path(folder))
                file = await self._objects.fetch(path, Path(folder))
                segment = await asyncio.to_thread(read_segment, file, name, follows, path)
            stored = sent or await segments.checksum(db, name, follows, segment.created_until)
            if stored != (segment.n_rows, segment.sum_of_seqs):
                raise Conflict(f"'{path}' holds other rows than PostgreSQL: it belongs to another feature store; move it away")
            fault("features.before_register")
            await segments.register(db, segment)
        fault("features.after_register")
        return segment

    async def _write(self, url: str, extent: Extent, feature_set: FeatureSet, path: str, folder: Path) -> tuple[int, int] | None:
        """Write a segment; its checksum by PostgreSQL, or None if another sealer was first: what that has written is as good."""
        file = folder / "segment.parquet"
        config = duckdb_config(self._memory_limit, folder)
        sent = await asyncio.to_thread(write_segment, url, extent, columns_of(feature_set.features), file, config)
        fault("features.before_upload")
        return sent if await self._objects.create(path, file) else None


@asynccontextmanager
async def sealing(sealer: Sealer, definitions: Definitions, due: Due, health: Health) -> AsyncIterator[None]:
    """Look once a minute what is to be sealed, beside the service. Should a bug end it, the service is not ready any more and says why."""
    async with health.beside("sealing", _keep_sealing(sealer, definitions, due), "sealing"):
        yield


async def _keep_sealing(sealer: Sealer, definitions: Definitions, due: Due) -> None:
    while True:
        try:
            await sealer.seal(definitions, due)
        except (MeshError, *OUTAGES) as error:
            log.warning("sealing_waits", reason=repr(error))
        await asyncio.sleep(LOOK_S)
