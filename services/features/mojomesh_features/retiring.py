"""Partition maintenance: partitions ahead of time, and old rows out of PostgreSQL, where an installation has set how long they stay."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_chassis.health import Health
from mojomesh_chassis.telemetry import log
from mojomesh_store import retirement
from mojomesh_store.errors import ShardAway
from mojomesh_store.online import EVER, Window, microseconds, moment
from mojomesh_store.retirement import Retirement
from mojomesh_store.shards import FeatureStore, Shard

LOOK_S = 60.0
PATIENCE_S = 5.0  # with one of several shards


class Gone(PermanentError):
    """Rows that have left PostgreSQL; only snapshots reach them."""

    status = 410


class Retired:
    """What this process knows of the rows that have left: at most a minute old, as `retirement.GRACE` needs."""

    def __init__(self) -> None:
        self._of: dict[str, Retirement] = {}

    async def look(self, feature_store: FeatureStore) -> None:
        """Learn what was announced, on every shard."""

        async def look(shard: Shard) -> None:
            async with shard.begin(PATIENCE_S) as db:
                for found in await retirement.retirements(db):
                    if found.feature_set not in self._of or found.before > self._of[found.feature_set].before:
                        self._of[found.feature_set] = found

        await feature_store.each(look)

    def cut(self, feature_set: str, window: Window) -> Window:
        """The window, less the times of which it does not know what has left: it is complete from the last row that had to stay."""
        before = self._before(feature_set)
        stayed = next((row.event_us for row in window.rows if row.event_us < before), before)
        return replace(window, complete_from=max(window.complete_from, stayed))

    def reaches(self, feature_set: str, at_us: int) -> bool:
        """Whether rows may be missing as of an event time."""
        return feature_set in self._of and at_us < self._before(feature_set)

    def check(self, feature_set: str, at_us: int) -> None:
        """Refuse to read as of an event time from which rows may be missing.

        Raises:
            Gone: They may.
        """
        if self.reaches(feature_set, at_us):
            before = self._before(feature_set)
            raise Gone(f"rows of '{feature_set}' before {moment(before).isoformat()} have left PostgreSQL; take a snapshot to see them")

    def check_known(self, feature_set: str, row_us: int | None) -> None:
        """Refuse an answer as known at an earlier time, by its row's event time (None: no row), in whose place a row that left may belong.

        Raises:
            Gone: It may: among rows that may leave only those stay that come last by what is known now.
        """
        self.check(feature_set, EVER if row_us is None else row_us)

    def _before(self, feature_set: str) -> int:
        found = self._of.get(feature_set)
        return EVER if found is None else microseconds(found.before)


async def maintain(feature_store: FeatureStore, feature_sets: Iterable[str], keep: timedelta, grace: timedelta = retirement.GRACE) -> int:
    """One round on every shard: add partitions, announce what is older than `keep`, by months, and take out what was announced; how many.

    Raises:
        TransientError: A shard does not answer, or a partition was in use for too long; a later round goes on from there.
    """
    month = (datetime.now(UTC) - keep).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    wanted = list(feature_sets)

    async def maintain_shard(shard: Shard) -> int:
        gone = 0
        for feature_set in wanted:
            async with shard.begin() as db:
                if await retirement.take_turn(db):
                    await retirement.add_partitions(db, feature_set)
                    gone += await retirement.retire(db, feature_set, grace)
                    await retirement.announce(db, feature_set, month)
        return gone

    return sum(await feature_store.each(maintain_shard))


@asynccontextmanager
async def retiring(
    feature_store: FeatureStore, definitions: Definitions, retired: Retired, keep: timedelta | None, health: Health
) -> AsyncIterator[None]:
    """Maintain partitions beside the service, and keep `retired` current. Should a bug end it, the service is not ready any more."""
    try:
        await retired.look(feature_store)
    except ShardAway as error:  # the others know the same: a time is announced on all shards in one round
        log.warning("shard_away", reason=str(error))
    async with AsyncExitStack() as stack:
        # Apart from each other: however maintenance fares, and whichever replica takes rows out, this process must hear of it in time.
        await stack.enter_async_context(health.beside("retired", _keep_looking(feature_store, retired), "looking at what leaves"))
        if keep is not None:
            work = _keep_maintaining(feature_store, definitions, keep)
            await stack.enter_async_context(health.beside("partitions", work, "partition maintenance"))
        yield


async def _keep_looking(feature_store: FeatureStore, retired: Retired) -> None:
    while True:
        try:
            await retired.look(feature_store)
            pause_s = LOOK_S
        except TransientError as error:
            log.warning("retired_unknown", reason=repr(error))
            pause_s = PATIENCE_S  # a shard that was away for long may be back any moment, and have less than it had
        await asyncio.sleep(pause_s)


async def _keep_maintaining(feature_store: FeatureStore, definitions: Definitions, keep: timedelta) -> None:
    while True:
        try:
            if gone := await maintain(feature_store, list(definitions.feature_sets), keep):
                log.info("rows_retired", n_rows=gone)
        except TransientError as error:
            log.warning("partitions_wait", reason=repr(error))
        await asyncio.sleep(LOOK_S)
