"""What becomes of events on Kafka: stored once, announced always, or dead-lettered with a reason a person understands."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text

from mojomesh_chassis.database import open_database
from mojomesh_contracts.events import EventReceived
from mojomesh_store import rows
from mojomesh_store.shards import open_feature_store

RECEIVED = EventReceived.topic.name
NOON = datetime(2013, 3, 1, 12, tzinfo=UTC)


async def test_an_event_sent_twice_is_stored_once_and_announced_alike(world: Any, ingest: httpx.AsyncClient) -> None:
    event = world.make_event()

    await world.records.publish(event, event)
    await world.until_handled()
    await world.records.publish(event)
    await world.until_handled()

    assert await world.stored() == [event.event_id]
    announced = await world.announced()
    assert len(announced) == 3
    assert announced[0] == announced[1] == announced[2]
    assert announced[0].values == event.values


async def test_what_is_announced_is_what_is_stored_not_what_a_later_repeat_says(world: Any, ingest: httpx.AsyncClient) -> None:
    event = world.make_event(distance=1)
    await world.records.publish(event)
    await world.until_handled()

    await world.records.publish(event.model_copy(update={"values": {"distance": 2}}))
    await world.until_handled()

    assert [written.values for written in await world.announced()] == [{"distance": 1}] * 2


async def test_one_id_at_two_times_is_two_facts_and_two_announcements(world: Any, ingest: httpx.AsyncClient) -> None:
    event = world.make_event()
    other = event.model_copy(update={"event_time": event.event_time + timedelta(hours=1)})

    await world.records.publish(event, other)
    await world.until_handled()

    assert len(await world.stored()) == 2
    assert len({written.event_id for written in await world.announced()}) == 2


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"distance": "far"}, "'distance' must be a number, is 'far'"),
    ({"distance": -1}, "'distance' is -1, less than the minimum 0"),
    ({"distance": 20_000.5}, "'distance' is 20000.5, more than the maximum 10000"),
    ({"tail": 10**400}, "'tail' is an integer too large to be a number"),
    ({"carrier": 7}, "'carrier' must be a text (category), is 7"),
    ({"carrier": "U\x00A"}, "'carrier' contains a NUL character"),
    ({"late": 1}, "'late' must be true or false, is 1"),
    ({"wings": 2}, "'wings' is not a feature of 'flights', which has carrier, distance, late, tail"),
]
SOON = datetime.now(UTC) + timedelta(days=1)
BAD_EVENTS: list[tuple[dict[str, Any], str]] = [
    *(({"values": values}, reason) for values, reason in BAD_VALUES),
    ({"feature_set": "trains"}, "no feature set is named 'trains'; apply its definition first"),
    ({"event_time": SOON}, "event_time"),
    ({"event_time": datetime(1899, 12, 31, tzinfo=UTC)}, "is not between 1900 and now + 5 minutes"),
    ({"reported_at": SOON}, "reported_at"),
    ({"entity_id": "U\x00A"}, "entity_id contains a NUL character"),
    ({"vectors": {"route": [1.0]}}, "'route' must have 2 dimensions, has 1"),
    ({"vectors": {"path": [1.0]}}, "'path' is not a vector of 'flights'"),
]


async def test_bad_events_are_dead_lettered_with_the_reason_and_the_good_ones_of_their_batch_stored(
    world: Any, ingest: httpx.AsyncClient
) -> None:
    good = world.make_events(10)
    bad = [world.make_event().model_copy(update=change) for change, _ in BAD_EVENTS]

    await world.records.publish(*good[:5], *bad, *good[5:])
    await world.until_handled()

    assert set(await world.stored()) == {event.event_id for event in good}
    buried = {EventReceived.model_validate_json(value).event_id: reason for value, reason in await world.buried()}
    assert len(buried) == len(bad)
    for event, (_, reason) in zip(bad, BAD_EVENTS, strict=True):
        assert reason in buried[event.event_id]


async def test_a_vector_is_kept_beside_its_row(world: Any, ingest: httpx.AsyncClient, postgres: Any) -> None:
    events = [world.make_event(at=NOON + timedelta(hours=n)).model_copy(update={"vectors": {"route": [n, 0.5]}}) for n in range(3)]

    await world.records.publish(*events, *events[:2])
    await world.until_handled()

    async with open_database(postgres.url) as shard, shard.begin() as db:
        kept = await db.execute(text("SELECT event_id, embedding::text FROM store.embeddings ORDER BY seq"))
    assert [tuple(row) for row in kept] == [(event.event_id, f"[{n},0.5]") for n, event in enumerate(events)]


async def test_every_fault_of_an_event_is_named(world: Any, ingest: httpx.AsyncClient) -> None:
    await world.records.publish(world.make_event(distance=-1, wings=2))
    await world.until_handled()

    ((_, reason),) = await world.buried()
    assert "minimum" in reason
    assert "wings" in reason


async def test_garbage_is_dead_lettered_as_it_came(world: Any, ingest: httpx.AsyncClient) -> None:
    good = world.make_event("k")

    await world.records.send(RECEIVED, b"\xff", None, good.model_dump_json().encode(), key=b"k", headers=[("a", None), ("b", b"\xff")])
    await world.until_handled()

    assert await world.stored() == [good.event_id]
    assert [value for value, _ in await world.buried()] == [b"\xff", None]


async def test_an_event_of_a_set_declared_just_before_it_is_stored(world: Any, ingest: httpx.AsyncClient) -> None:
    event = world.make_event().model_copy(update={"feature_set": "arrivals"})

    await world.define("arrivals")
    await world.records.publish(event)
    await world.until_handled()

    assert await world.stored() == [event.event_id]


async def test_while_the_database_is_away_the_partition_waits_and_nothing_is_lost_or_buried(world: Any) -> None:
    events = world.make_events(50)
    async with world.gate() as (gate, url), world.serving(url) as ingest:
        await world.records.publish(*events[:25])
        await world.until_handled()

        await gate.shut()
        await world.records.publish(*events[25:])
        await asyncio.sleep(1)
        assert (await ingest.get("/health/ready")).status_code == 503
        assert len(await world.stored()) == 25
        await gate.open()
        await world.until_handled()

        assert set(await world.stored()) == {event.event_id for event in events}
        assert await world.buried() == []


@pytest.mark.parametrize("statement", ["REVOKE INSERT ON store.feature_rows FROM mojomesh_service", "DROP TABLE store.feature_rows"])
async def test_events_wait_for_tables_that_are_not_there_yet(statement: str, world: Any, ingest: httpx.AsyncClient) -> None:
    await world.execute(statement)

    await world.records.publish(world.make_event())
    await asyncio.sleep(1)

    assert await world.buried() == []


async def test_several_thousand_events_with_bad_ones_among_them_go_through(world: Any, ingest: httpx.AsyncClient) -> None:
    events = world.make_events(6_000)
    bad = [event.model_copy(update={"event_id": uuid4(), "values": {"wings": 2}}) for event in events[::100]]

    await world.records.publish(*events, *bad)
    await world.until_handled()

    assert set(await world.stored()) == {event.event_id for event in events}
    assert {written.entity_id for written in await world.announced()} == {event.entity_id for event in events}
    assert len(await world.buried()) == len(bad)


async def test_entities_are_spread_over_shards(world: Any, new_postgres: Any) -> None:
    urls = [new_postgres().url for _ in range(2)]
    events = world.make_events(100)

    async with world.serving(",".join(urls)):
        await world.records.publish(*events)
        await world.until_handled()

    async with open_feature_store(urls) as store:
        counts = [await world.count(shard) for shard in store.shards]
    assert sum(counts) == 100
    assert all(counts)


async def test_pending_entries_do_not_wait_for_a_writer(world: Any, postgres: Any) -> None:
    async with open_feature_store([postgres.url]) as store, store.shards[0].begin() as db:
        await rows.append(db, world.make_events(100))

    async with world.serving(postgres.url):
        await asyncio.sleep(0.5)

    async with open_feature_store([postgres.url]) as store, store.shards[0].begin() as db:
        assert await rows.empty_pending_lists(db) == 0
