"""Old rows leave PostgreSQL: no snapshot, no read at or after the announced time, and no replay notices."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any

import duckdb
import pytest
from adbc_driver_postgresql import dbapi
from redis.asyncio import Redis
from sqlalchemy import text

from mojomesh_chassis.database import Database, open_database
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.health import Health
from mojomesh_contracts.definitions import Model
from mojomesh_contracts.events import EventReceived
from mojomesh_features.known import KnownRows
from mojomesh_features.reading import FeatureReader
from mojomesh_features.retiring import Gone, Retired, maintain, retiring
from mojomesh_features.sealing import Sealer
from mojomesh_features.snapshots import Snapshots, label_of
from mojomesh_store import retirement
from mojomesh_store import rows as store_rows
from mojomesh_store.online import microseconds
from mojomesh_store.shards import FeatureStore
from mojomesh_store.vectors import plan_of
from tests.features.making import AppendAll, make_event

SETS = ("flights", "weather", "arrivals", "crews")
HOUR = timedelta(hours=1)
NO_GRACE = timedelta(0)
# Some months back, in rows for every few days; what is kept begins in the middle.
NOW = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
DAYS = [NOW - timedelta(days=3 * n) for n in range(60, 0, -1)]
KEEP = timedelta(days=75)


@pytest.fixture
async def owner(postgres: Any) -> AsyncIterator[Database]:
    async with open_database(postgres.owner_url) as database:
        yield database


@pytest.fixture
def retired(reader: FeatureReader) -> Retired:
    return reader._retired


def history() -> list[EventReceived]:
    """A flight every few days, with weather of one airport; one airport was last heard of long ago."""
    events = [make_event("weather", "OLD", DAYS[0], {"temp": 1}), make_event("weather", "OLD", DAYS[1], {"temp": 2})]
    for n, at in enumerate(DAYS):
        events.append(make_event("flights", f"F{n % 5}", at, {"distance": n, "origin": ("EWR", "OLD")[n % 2]}))
        events.append(make_event("weather", "EWR", at - HOUR, {"temp": n}))
        events.append(make_event("arrivals", f"F{n % 5}", at + HOUR, {"late": n % 3 == 0}))
    return events


async def count(owner: Database, table: str = "store.feature_rows") -> int:
    async with owner.begin() as db:
        return int((await db.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one())


async def partitions(owner: Database, feature_set: str) -> list[str]:
    async with owner.begin() as db:
        found = await db.scalars(text("SELECT relid::regclass::text FROM pg_partition_tree('store.feature_rows') WHERE isleaf"))
        return sorted(name for name in found if f"feature_rows_{feature_set}_" in name)


async def take(snapshots: Snapshots, model: Model, definitions: Definitions, at: datetime) -> Any:
    return await snapshots.take(plan_of(model, definitions), label_of(model.label, definitions), at)


@pytest.fixture(params=[True, False], ids=["in partitions of its own", "among all sets"])
async def stored(
    request: pytest.FixtureRequest, append_all: AppendAll, feature_store: FeatureStore, owner: Database
) -> list[EventReceived]:
    """The history, in PostgreSQL."""
    if request.param:
        await maintain(feature_store, SETS, timedelta(days=36500))
        async with owner.begin() as db:  # as if maintenance had run all those months
            for feature_set in SETS:
                (own,) = await db.scalars(
                    text("SELECT relname FROM pg_class WHERE relkind = 'p' AND relname LIKE :name"),
                    {"name": f"feature\\_rows\\_{feature_set}\\_%"},
                )
                first = DAYS[0].replace(day=1, hour=0)
                while first < NOW.replace(day=1, hour=0):
                    following = (first + timedelta(days=32)).replace(day=1)
                    await db.execute(
                        text(
                            f'CREATE TABLE store."{own}_{first:%Y%m}" PARTITION OF store."{own}" '
                            f"FOR VALUES FROM ('{first.isoformat()}') TO ('{following.isoformat()}')"
                        )
                    )
                    first = following
    events = history()
    await append_all(events)
    return events


async def retire(feature_store: FeatureStore, retired: Retired) -> int:
    await maintain(feature_store, SETS, KEEP, NO_GRACE)  # announces
    gone = await maintain(feature_store, SETS, KEEP, NO_GRACE)
    await retired.look(feature_store)
    return gone


async def test_partitions_are_made_ahead(feature_store: FeatureStore, owner: Database, append_all: AppendAll) -> None:
    await maintain(feature_store, SETS, KEEP)
    await maintain(feature_store, SETS, KEEP)
    await append_all([make_event("flights", "A", datetime.now(UTC), {})])

    found = await partitions(owner, "flights")
    this_month = next(name for name in found if name.endswith(f"{datetime.now(UTC):%Y%m}"))
    assert len(found) == 1 + 1 + retirement.MONTHS_AHEAD
    assert await count(owner, this_month) == 1


async def test_a_service_makes_partitions_and_announces_by_itself(
    feature_store: FeatureStore, owner: Database, definitions: Definitions
) -> None:
    async with retiring(feature_store, definitions, Retired(), KEEP, Health()):
        while not await count(owner, "store.retired WHERE feature_set = 'flights'"):
            await asyncio.sleep(0.02)

    assert len(await partitions(owner, "flights")) == 1 + 1 + retirement.MONTHS_AHEAD


async def test_what_leaves_is_known_however_maintenance_fares(
    feature_store: FeatureStore, owner: Database, definitions: Definitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mojomesh_features.retiring.LOOK_S", 0.05)
    retired = Retired()
    async with owner.begin() as reading:
        await reading.execute(text("LOCK TABLE store.feature_rows IN SHARE MODE"))  # no partition can be added
        async with retiring(feature_store, definitions, retired, KEEP, Health()), asyncio.timeout(20):
            async with owner.begin() as elsewhere:
                await retirement.announce(elsewhere, "flights", NOW)
            while not retired.reaches("flights", microseconds(NOW) - 1):
                await asyncio.sleep(0.02)


async def test_a_snapshot_misses_no_row_that_is_sealed_and_leaves_while_it_is_taken(
    stored: list[EventReceived],
    sealer: Sealer,
    snapshots: Snapshots,
    feature_store: FeatureStore,
    definitions: Definitions,
    model: Model,
    owner: Database,
) -> None:
    at = await feature_store.pass_snapshot()
    before = await take(snapshots, model, definitions, at)
    await maintain(feature_store, SETS, KEEP, NO_GRACE)
    loop, left = asyncio.get_running_loop(), Lock()

    async def leave() -> None:
        await sealer.seal(definitions)
        with suppress(TransientError):  # a partition in use stays
            await maintain(feature_store, SETS, KEEP, NO_GRACE)

    class Late(KnownRows):
        def _read_after(self, sealed: datetime | None, cursor: dbapi.Cursor, db: duckdb.DuckDBPyConnection) -> None:
            with left:  # feature sets are read side by side
                asyncio.run_coroutine_threadsafe(leave(), loop).result()
            super()._read_after(sealed, cursor, db)

    snapshots.rows = Late
    assert await take(snapshots, model, definitions, at) == before
    assert await count(owner, "store.segments") > 0


async def test_retired_rows_are_gone_and_no_snapshot_notices(
    stored: list[EventReceived],
    sealer: Sealer,
    snapshots: Snapshots,
    feature_store: FeatureStore,
    retired: Retired,
    definitions: Definitions,
    model: Model,
    owner: Database,
) -> None:
    at = await feature_store.pass_snapshot()
    before = await take(snapshots, model, definitions, at)
    await sealer.seal(definitions)

    gone = await retire(feature_store, retired)

    assert 60 < gone < len(stored)
    assert await count(owner) == len(stored) - gone
    assert await take(snapshots, model, definitions, at) == before


async def test_what_is_not_sealed_stays(
    stored: list[EventReceived], feature_store: FeatureStore, retired: Retired, owner: Database
) -> None:
    assert await retire(feature_store, retired) == 0
    assert await count(owner) == len(stored)


async def test_nothing_goes_before_all_have_heard(
    stored: list[EventReceived], sealer: Sealer, feature_store: FeatureStore, definitions: Definitions
) -> None:
    await sealer.seal(definitions)

    assert [await maintain(feature_store, SETS, KEEP) for _ in range(3)] == [0, 0, 0]


async def test_a_read_finds_what_it_found_before_or_is_refused(
    stored: list[EventReceived],
    sealer: Sealer,
    reader: FeatureReader,
    redis: Redis,
    feature_store: FeatureStore,
    retired: Retired,
    definitions: Definitions,
) -> None:
    entities = [("flights", f"F{n}") for n in range(5)] + [("weather", "EWR"), ("weather", "OLD"), ("weather", "nowhere")]
    asked = [(entity, microseconds(at)) for entity in entities for at in DAYS]
    told = await reader.at(asked)
    await sealer.seal(definitions)
    await retire(feature_store, retired)
    await redis.flushall()

    refused = 0
    for as_of in asked:
        try:
            assert (await reader.at([as_of]))[as_of] == told[as_of]
        except Gone:
            refused += 1
    assert 0 < refused < len(asked)
    assert told[("weather", "OLD"), microseconds(DAYS[-1])] is not None


async def test_what_was_known_then_is_refused_where_it_may_be_gone(
    stored: list[EventReceived],
    sealer: Sealer,
    reader: FeatureReader,
    feature_store: FeatureStore,
    retired: Retired,
    definitions: Definitions,
) -> None:
    at = await feature_store.pass_snapshot()
    await sealer.seal(definitions)
    await retire(feature_store, retired)

    found = await reader.known_at([(("weather", "EWR"), microseconds(NOW))], at)
    assert all(row is not None for row in found.values())
    with pytest.raises(Gone):
        await reader.known_at([(("weather", "OLD"), microseconds(NOW))], at)


async def test_a_replay_of_a_retired_event_is_no_correction(
    stored: list[EventReceived], sealer: Sealer, feature_store: FeatureStore, retired: Retired, definitions: Definitions, owner: Database
) -> None:
    await sealer.seal(definitions)
    gone = await retire(feature_store, retired)
    left = await count(owner)

    async with feature_store.shards[0].begin() as db:
        again = await store_rows.append(db, stored)

    assert (len(again), await count(owner)) == (left, left)
    async with owner.begin() as db:
        await db.execute(text("TRUNCATE store.retired_events"))
    async with feature_store.shards[0].begin() as db:
        await store_rows.append(db, stored)
    assert await count(owner) == left + gone  # the control: without their ids they are stored anew


async def test_a_partition_in_use_is_left_for_later(
    stored: list[EventReceived], sealer: Sealer, feature_store: FeatureStore, retired: Retired, definitions: Definitions, owner: Database
) -> None:
    await sealer.seal(definitions)
    await maintain(feature_store, SETS, KEEP, NO_GRACE)
    async with owner.begin() as reading:
        await reading.execute(text("LOCK TABLE store.feature_rows IN SHARE MODE"))
        with pytest.raises(TransientError):
            await maintain(feature_store, SETS, KEEP, NO_GRACE)

    assert await maintain(feature_store, SETS, KEEP, NO_GRACE) > 0
