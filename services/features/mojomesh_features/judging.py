"""Judging what came in, window by window, beside the service; state is only what the tables hold.

A window is judged when a snapshot has passed its end: then the tallies of all shards up to there are complete and stay so. Window and
breaches are saved in one transaction, and the outbox tells.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
from sqlalchemy import MetaData, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.health import Health
from mojomesh_chassis.outbox import Relay, outbox_table, save_events
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.definitions import Quality
from mojomesh_contracts.events import QualityBreached
from mojomesh_features.quality import QualityWindow, breaches_of
from mojomesh_store import rows, tallies
from mojomesh_store.shards import FeatureStore
from mojomesh_store.tallies import Tally

OUTBOX = outbox_table(MetaData(schema="features"))
LOOK_S = 1.0
KEPT = timedelta(days=90)
CATCH_UP = timedelta(days=1)  # a longer time without a tally or a judge is not judged: perhaps nothing was expected then
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Judge:
    """Judges the windows of all feature sets that something is expected of; several may run."""

    def __init__(self, feature_store: FeatureStore, definitions: Definitions, relay: Relay) -> None:
        self._feature_store = feature_store
        self._database = feature_store.shards[0]
        self._definitions = definitions
        self._relay = relay

    async def judge(self) -> list[QualityBreached]:
        """Judge every window that is over; the breaches found.

        Raises:
            TransientError: A shard does not answer, or its writers hold their transactions open.
        """
        found: list[QualityBreached] = []
        expected = {name: feature_set.quality for name, feature_set in self._definitions.feature_sets.items() if feature_set.quality}
        for name, quality in expected.items():
            while (breaches := await self._judge_next(name, quality)) is not None:
                found += breaches
        if found:
            self._relay.wake()
        return found

    async def _judge_next(self, name: str, quality: Quality) -> list[QualityBreached] | None:
        """Judge a feature set's oldest window that is over; None if there is none, or another process is at it."""
        async with self._database.begin() as db:
            if not await _take_turn(db, name):
                return None
            now = await rows.snapshot_clock(db)
            last = await _last(db, name)
            if last is None or now - last.window_to > quality.window + CATCH_UP:
                begin = await self._begin(name, quality, now)
                if last is None or begin - last.window_to > CATCH_UP:
                    newest = last.tally.newest_event_time if last else None
                    await _save(db, QualityWindow(name, begin, begin, Tally(newest_event_time=newest)), [])
                    return []
            if (until := last.window_to + quality.window) > now:
                return None
            await self._feature_store.pass_snapshot(until)
            whole = Tally(newest_event_time=last.tally.newest_event_time)
            for shard in self._feature_store.shards:
                async with shard.begin() as on_shard:
                    whole.add(await tallies.counted(on_shard, name, last.window_to, until))
                    await tallies.forget(on_shard, name, last.window_to)
            window = QualityWindow(name, last.window_to, until, whole)
            breaches = breaches_of(window, quality)
            await _save(db, window, breaches)
            await save_events(db, OUTBOX, breaches)
        for breach in breaches:
            log.warning("quality_breached", feature_set=name, expectation=breach.expectation, reason=breach.reason)
        return breaches

    async def _begin(self, feature_set: str, quality: Quality, now: datetime) -> datetime:
        """Where the first window begins: a round time before the first tally."""
        oldest = now
        for shard in self._feature_store.shards:
            async with shard.begin() as db:
                oldest = min(oldest, await tallies.oldest(db, feature_set) or now)
        return oldest - timedelta(microseconds=1) - (oldest - timedelta(microseconds=1) - _EPOCH) % quality.window


async def windows_of(db: AsyncSession, feature_set: str, limit: int) -> list[dict[str, Any]]:
    """The last windows of a feature set with what was not as expected, oldest first."""
    found = await db.execute(
        text("""
            SELECT window_from, window_to, n_rows, n_held, newest_event_time, breaches FROM features.quality_windows
            WHERE feature_set = :set AND window_to > window_from ORDER BY window_to DESC LIMIT :limit
        """).columns(breaches=JSONB),
        {"set": feature_set, "limit": limit},
    )
    return [{str(name): value for name, value in row.items()} for row in found.mappings()][::-1]


async def _take_turn(db: AsyncSession, feature_set: str) -> bool:
    lock = text("SELECT pg_try_advisory_xact_lock(hashtextextended('mojomesh.quality/' || :set, 0))")
    return bool((await db.execute(lock, {"set": feature_set})).scalar_one())


async def _last(db: AsyncSession, feature_set: str) -> QualityWindow | None:
    found = await db.execute(
        text("""
            SELECT feature_set, window_from, window_to, n_rows, n_held, newest_event_time FROM features.quality_windows
            WHERE feature_set = :set ORDER BY window_to DESC LIMIT 1
        """),
        {"set": feature_set},
    )
    if (row := found.first()) is None:
        return None
    return QualityWindow(row.feature_set, row.window_from, row.window_to, Tally(row.n_rows, row.n_held, row.newest_event_time))


async def _save(db: AsyncSession, window: QualityWindow, breaches: list[QualityBreached]) -> None:
    await db.execute(
        text("""
            INSERT INTO features.quality_windows (feature_set, window_from, window_to, n_rows, n_held, newest_event_time, breaches)
            VALUES (:feature_set, :window_from, :window_to, :n_rows, :n_held, :newest, CAST(:breaches AS jsonb))
        """),
        {
            "feature_set": window.feature_set,
            "window_from": window.window_from,
            "window_to": window.window_to,
            "n_rows": window.tally.n_rows,
            "n_held": window.tally.n_held,
            "newest": window.tally.newest_event_time,
            "breaches": orjson.dumps([breach.model_dump(mode="json") for breach in breaches]).decode(),
        },
    )
    old = text("DELETE FROM features.quality_windows WHERE feature_set = :set AND window_to < :before")
    await db.execute(old, {"set": window.feature_set, "before": window.window_to - KEPT})


@asynccontextmanager
async def judging(judge: Judge, health: Health) -> AsyncIterator[None]:
    """Judge beside the service. Should a bug end it, the service is not ready any more and says why."""
    async with health.beside("quality", _keep_judging(judge), "judging of data quality"):
        yield


async def _keep_judging(judge: Judge) -> None:
    while True:
        try:
            await judge.judge()
        except TransientError as error:
            log.warning("quality_waits", reason=repr(error))
        await asyncio.sleep(LOOK_S)
