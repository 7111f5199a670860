"""The promises of the feature store's rows, on a real PostgreSQL, with the service role's rights."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from mojomesh_chassis.database import Database, open_database
from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_contracts.events import EventReceived, FeatureValue
from mojomesh_store import rows
from mojomesh_store.shards import FeatureStore, ShardRouter, open_feature_store
from mojomesh_store.tables import FeatureRow

NOON = datetime(2013, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def make_event(
    entity_id: str = "UA1545", at: datetime = NOON, event_id: UUID | None = None, feature_set: str = "flights", **values: FeatureValue
) -> EventReceived:
    return EventReceived(
        event_id=event_id or uuid4(), feature_set=feature_set, entity_id=entity_id, event_time=at, values=values or {"distance": 1400}
    )


@pytest.fixture
async def feature_store(postgres: Any) -> AsyncIterator[FeatureStore]:
    async with open_feature_store([postgres.url]) as store:
        yield store


@pytest.fixture
def shard(feature_store: FeatureStore) -> Database:
    return feature_store.shards[0]


@pytest.fixture
async def owner(postgres: Any) -> AsyncIterator[Database]:
    async with open_database(postgres.owner_url) as database:
        yield database


async def append(shard: Database, *events: EventReceived) -> list[FeatureRow]:
    async with shard.begin() as db:
        return await rows.append(db, events)


async def count_rows(shard: Database, until: datetime | None = None) -> int:
    async with shard.begin() as db:
        counted = await db.execute(
            text("SELECT count(*) FROM store.feature_rows WHERE created_at <= coalesce(:until, 'infinity'::timestamptz)"), {"until": until}
        )
        return int(counted.scalar_one())


async def latest(shard: Database, entity_id: str, at: datetime, snapshot_time: datetime | None = None) -> FeatureRow | None:
    async with shard.begin() as db:
        return await rows.latest(db, "flights", entity_id, at, snapshot_time or datetime.now(UTC) + HOUR)


async def test_an_event_comes_back_as_its_row(shard: Database) -> None:
    event = make_event(distance=1400, carrier="UA", late=True, gate=None, delay=-2.5)

    (row,) = await append(shard, event)

    assert (row.feature_set, row.entity_id, row.event_time, row.event_id) == ("flights", "UA1545", NOON, event.event_id)
    assert row.values == event.values
    assert row.reported_at == row.created_at
    assert await latest(shard, "UA1545", NOON) == row
    assert row.key.seq == row.seq


async def test_what_the_source_knew_earlier_keeps_its_time(shard: Database) -> None:
    event = make_event().model_copy(update={"reported_at": NOON + HOUR})

    (row,) = await append(shard, event)

    assert row.reported_at == NOON + HOUR < row.created_at


async def test_a_repeat_is_stored_once_and_answered_with_the_first_row(shard: Database) -> None:
    event, other = make_event(distance=1), make_event("DL1")
    (first,) = await append(shard, event)

    again = await append(shard, other, event.model_copy(update={"values": {"distance": 2}}), event)

    assert again[1:] == [first, first]
    assert again[0].event_id == other.event_id
    assert await count_rows(shard) == 2


async def test_an_integer_of_more_than_64_bits_comes_back_as_the_nearest_double(shard: Database) -> None:
    await append(shard, make_event(distance=10**30))

    row = await latest(shard, "UA1545", NOON)
    assert row is not None
    assert row.values == {"distance": 1e30}


async def test_without_the_unique_key_a_repeat_is_stored_twice(shard: Database, owner: Database) -> None:
    async with owner.begin() as db:
        await db.execute(text("ALTER TABLE store.feature_rows DROP CONSTRAINT feature_rows_pkey"))
    event = make_event()

    await append(shard, event)
    await append(shard, event)

    assert await count_rows(shard) == 2


async def test_the_row_of_a_time_is_the_newest_that_was_true_and_known_then(shard: Database) -> None:
    (early,) = await append(shard, make_event(at=NOON, distance=1))
    (late,) = await append(shard, make_event(at=NOON + HOUR, distance=2))
    (corrected,) = await append(shard, make_event(at=NOON, distance=3))

    assert await latest(shard, "UA1545", NOON - HOUR) is None
    assert await latest(shard, "UA1545", NOON + HOUR) == late
    assert await latest(shard, "UA1545", NOON + HOUR / 2) == corrected
    assert await latest(shard, "UA1545", NOON + HOUR / 2, snapshot_time=early.created_at) == early
    assert await latest(shard, "UA1545", NOON, snapshot_time=early.created_at - HOUR) is None
    assert await latest(shard, "nobody", NOON) is None


async def test_of_two_corrections_in_one_batch_the_later_wins(shard: Database) -> None:
    ids = sorted(uuid4() for _ in range(2))
    events = [make_event(event_id=ids[1], distance=1), make_event(event_id=ids[0], distance=2)]  # rows are inserted by id, not by arrival

    await append(shard, *events)

    found = await latest(shard, "UA1545", NOON)
    assert found is not None
    assert found.values == {"distance": 2}


async def test_many_are_answered_in_the_order_asked(shard: Database) -> None:
    await append(shard, make_event("a", distance=1), make_event("a", NOON + HOUR, distance=2), make_event("b", distance=3))
    asked = [("b", NOON), ("nobody", NOON), ("a", NOON), ("a", NOON + HOUR), ("b", NOON)]

    async with shard.begin() as db:
        found = await rows.latest_of_many(db, "flights", asked, datetime.now(UTC) + HOUR)

    assert [row and row.values["distance"] for row in found] == [3, None, 1, 2, 3]


async def test_rows_of_another_feature_set_are_others(shard: Database) -> None:
    event = make_event()
    await append(shard, event, make_event(event_id=event.event_id, feature_set="arrivals"))

    assert await count_rows(shard) == 2


@pytest.mark.parametrize(
    "statement", ["UPDATE store.feature_rows SET entity_id = 'x'", "DELETE FROM store.feature_rows", "TRUNCATE store.feature_rows"]
)
async def test_the_service_role_cannot_change_what_was_stored(postgres: Any, statement: str) -> None:
    async with open_database(postgres.url) as database, database.engine.connect() as connection:
        with pytest.raises(DBAPIError, match="permission denied"):
            await connection.execute(text(statement))


async def test_nobody_lowers_the_floor(shard: Database) -> None:
    async with shard.begin() as db:
        now = await rows.snapshot_clock(db)
    await rows.pass_snapshot(shard, now)
    async with shard.begin() as db:
        await db.execute(text("SELECT store.raise_snapshot_floor(:time)"), {"time": now - HOUR})

    (row,) = await append(shard, make_event())

    assert row.created_at > now


async def index_used_for_containment(owner: Database) -> set[str]:
    """The indexes by which PostgreSQL would look for rows with certain values."""
    async with owner.begin() as db:
        plan = await db.execute(
            text("""EXPLAIN SELECT entity_id FROM store.feature_rows WHERE "values" @> '{"gate": "B 7", "distance": 7}'""")
        )
        lines = plan.scalars().all()
    return {line.split(" on ")[1].split()[0] for line in lines if "Index Scan" in line}


async def test_a_question_of_containment_uses_the_gin_index(shard: Database, owner: Database) -> None:
    await append(shard, *(make_event(str(n), distance=n, gate=f"B {n}") for n in range(3000)))
    async with owner.begin() as db:
        await db.execute(text("ANALYZE store.feature_rows"))
        tree = await db.scalars(text("SELECT relid::regclass::text FROM pg_partition_tree('store.feature_rows_values')"))
        of_gin = {name.removeprefix("store.") for name in tree}

    used = await index_used_for_containment(owner)
    async with owner.begin() as db:
        await db.execute(text("DROP INDEX store.feature_rows_values"))

    assert used
    assert used <= of_gin
    assert await index_used_for_containment(owner) == set()


async def test_entries_that_writers_left_pending_are_put_into_the_index_once(shard: Database) -> None:
    await append(shard, *(make_event(str(n), distance=n) for n in range(100)))

    async with shard.begin() as db:
        assert await rows.empty_pending_lists(db) > 0
    async with shard.begin() as db:
        assert await rows.empty_pending_lists(db) == 0


# The snapshot's promise: the rows with created_at <= snapshot_time are the same for ever.


async def test_a_snapshot_waits_for_a_slow_writer(feature_store: FeatureStore, shard: Database) -> None:
    appended, may_commit = asyncio.Event(), asyncio.Event()

    async def write_slowly() -> None:
        async with shard.begin() as db:
            await rows.append(db, [make_event()])
            appended.set()
            await may_commit.wait()

    writer = asyncio.create_task(write_slowly())
    await appended.wait()
    passing = asyncio.create_task(feature_store.pass_snapshot())
    await asyncio.sleep(3 * rows.PASSAGE_TIMEOUT_MS / 1000)
    assert not passing.done()
    may_commit.set()
    await writer
    snapshot_time = await passing

    assert await count_rows(shard, until=snapshot_time) == 1


async def test_without_the_lock_a_slow_writer_slips_a_row_into_the_past(shard: Database) -> None:
    """The negative control: the same writer, a snapshot that does not pass through the lock."""
    async with shard.begin() as db:
        (row,) = await rows.append(db, [make_event()])
        async with shard.begin() as snapshot:
            snapshot_time = await rows.snapshot_clock(snapshot)
        seen_first = await count_rows(shard, until=snapshot_time)

    assert row.created_at <= snapshot_time
    assert (seen_first, await count_rows(shard, until=snapshot_time)) == (0, 1)


async def test_writers_go_on_while_a_snapshot_waits(feature_store: FeatureStore, shard: Database) -> None:
    appended, may_commit = asyncio.Event(), asyncio.Event()

    async def write_slowly() -> None:
        async with shard.begin() as db:
            await rows.append(db, [make_event()])
            appended.set()
            await may_commit.wait()

    writer = asyncio.create_task(write_slowly())
    await appended.wait()
    passing = asyncio.create_task(feature_store.pass_snapshot())
    for _ in range(5):
        await append(shard, make_event())
    assert not passing.done()
    may_commit.set()
    await asyncio.gather(writer, passing)

    assert await count_rows(shard) == 6


async def step_clock_back(owner: Database, by: timedelta) -> None:
    """What the database looks like after its clock was stepped back: the floor lies ahead of the clock."""
    async with owner.begin() as db:
        await db.execute(text("UPDATE store.snapshot_floor SET floor = clock_timestamp() + :by"), {"by": by})


async def test_after_a_clock_was_stepped_back_new_rows_are_still_later_than_the_snapshot(
    feature_store: FeatureStore, shard: Database, owner: Database
) -> None:
    await step_clock_back(owner, HOUR)
    snapshot_time = await feature_store.pass_snapshot()
    before = await count_rows(shard, until=snapshot_time)

    (row,) = await append(shard, make_event())

    assert row.created_at > snapshot_time > datetime.now(UTC)
    assert await count_rows(shard, until=snapshot_time) == before
    assert await feature_store.pass_snapshot() >= row.created_at  # the next snapshot sees it


async def test_without_a_floor_a_clock_stepped_back_puts_rows_into_the_past(
    feature_store: FeatureStore, shard: Database, owner: Database
) -> None:
    await step_clock_back(owner, HOUR)
    snapshot_time = await feature_store.pass_snapshot()
    async with owner.begin() as db:
        await db.execute(text("UPDATE store.snapshot_floor SET floor = '-infinity'"))

    (row,) = await append(shard, make_event())

    assert row.created_at <= snapshot_time


async def test_a_snapshot_of_the_future_is_refused(feature_store: FeatureStore) -> None:
    with pytest.raises(PermanentError, match="not possible yet"):
        await feature_store.pass_snapshot(datetime.now(UTC) + HOUR)


async def test_a_snapshot_of_the_past_stays_possible_and_passes_on_every_shard(new_postgres: Any) -> None:
    async with open_feature_store([new_postgres().url, new_postgres().url]) as store:
        earlier = await store.pass_snapshot()
        assert await store.pass_snapshot(earlier - HOUR) == earlier - HOUR
        for shard in store.shards:
            (row,) = await append(shard, make_event())
            assert row.created_at > earlier


# Two writers


async def test_writers_of_the_same_events_in_opposite_orders_do_not_deadlock(shard: Database) -> None:
    events = [make_event(str(n)) for n in range(400)]

    for _ in range(5):
        batches = (events, events[::-1], events[200:] + events[:200])
        stored = await asyncio.gather(*(append(shard, *batch) for batch in batches))
        assert sorted(stored[0]) == sorted(stored[1]) == sorted(stored[2])
        events = [make_event(str(n)) for n in range(400)]


async def test_writers_that_do_not_sort_deadlock(shard: Database) -> None:
    """The negative control: one row at a time, in the order given, as the insert would be without its ORDER BY."""
    events = sorted((make_event(str(n)) for n in range(2)), key=lambda event: event.event_id)
    first_is_in = [asyncio.Event(), asyncio.Event()]

    async def write(which: int) -> None:
        async with shard.begin() as db:
            for event in events if which == 0 else events[::-1]:
                await rows.append(db, [event])
                first_is_in[which].set()
                await first_is_in[1 - which].wait()

    outcomes = await asyncio.gather(write(0), write(1), return_exceptions=True)

    assert next(str(outcome) for outcome in outcomes if isinstance(outcome, TransientError)).startswith("PostgreSQL: another transaction")


# Shards


async def test_an_entity_is_always_on_one_shard(new_postgres: Any) -> None:
    events = [make_event(f"entity-{n % 60}", NOON + n * HOUR) for n in range(300)]
    async with open_feature_store([new_postgres().url for _ in range(3)]) as store:
        parts = store.split(events)
        for shard, part in parts:
            await append(shard, *part)

        assert len(parts) == 3
        assert sum(len(part) for _, part in parts) == 300
        for event in events[:60]:
            assert await latest(store.shard_of(event.entity_id), event.entity_id, NOON + 300 * HOUR) is not None


def test_a_further_shard_takes_only_its_share() -> None:
    two, three = (ShardRouter(n) for n in (2, 3))
    entities = [f"entity-{n}" for n in range(2000)]

    moved = sum(two.place(e) != three.place(e) for e in entities)

    assert 0.2 < moved / len(entities) < 0.5
