"""While PostgreSQL does not move, what waits stays in Kafka: memory is bounded, other topics go on, and nothing is lost or doubled."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import psutil
from sqlalchemy import text

from mojomesh_chassis.database import open_database
from mojomesh_chassis.publishing import EncodedEvent, open_publisher
from mojomesh_contracts.events import EventReceived
from mojomesh_local import ports

N_WAITING = 200_000
MOST_MB = 100  # two members hold a batch each, and some megabytes that Kafka has sent


async def publish_many(world: Any) -> set[UUID]:
    """Many events that wait, and their ids."""
    at = datetime(2013, 3, 1, 12, tzinfo=UTC).isoformat()
    ids = [uuid4() for _ in range(N_WAITING)]
    async with open_publisher(world.settings) as publisher:
        for first in range(0, N_WAITING, 10_000):
            events = []
            for number in range(first, first + 10_000):
                body = f'{{"event_id":"{ids[number]}","feature_set":"flights","entity_id":"entity-{number % 997}","event_time":"{at}",'
                body += f'"values":{{"carrier":"U{number}","distance":{number % 9_000},"tail":{number / 4},"late":true}}}}'
                events.append(EncodedEvent(EventReceived.topic, ids[number], f"entity-{number % 997}", body.encode()))
            await publisher.publish(events)
    return set(ids)


@asynccontextmanager
async def table_locked(world: Any) -> AsyncIterator[None]:
    async with open_database(world.postgres.owner_url) as database, database.begin() as db:
        await db.execute(text("LOCK TABLE store.feature_rows IN ACCESS EXCLUSIVE MODE"))
        yield


async def growth_mb(process: psutil.Process, before: int, seconds: float = 4.0) -> float:
    """The most by which a process is larger than `before` in the time to come."""
    most = 0
    for _ in range(int(seconds * 10)):
        await asyncio.sleep(0.1)
        most = max(most, process.memory_info().rss - before)
    return most / 2**20


async def test_a_table_that_is_locked_fills_kafka_not_memory(world: Any, start: Callable[..., Any]) -> None:
    port = ports.choose()
    process = psutil.Process(start("-m", "mojomesh_ingest", INGEST_PORT=str(port)).pid)
    first = world.make_events(5_000)
    await world.records.publish(*first)
    await world.until_handled()
    before = process.memory_info().rss

    async with table_locked(world):
        waiting = await publish_many(world)
        grown = await growth_mb(process, before)
        await world.define("arrivals")
        event = world.make_event().model_copy(update={"feature_set": "arrivals"})
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            answer = await client.post("/v1/events", content=event.model_dump_json())
    await world.until_handled()

    assert answer.status_code == 202
    assert grown < MOST_MB
    sent = waiting | {event.event_id for event in [*first, event]}
    stored = await world.stored()
    assert len(stored) == len(sent)
    assert set(stored) == sent
    assert len({announced.event_id for announced in await world.announced()}) == len(sent)
    assert await world.buried() == []


PILES_UP = """
import asyncio
from aiokafka import AIOKafkaConsumer
from mojomesh_chassis.settings import read_settings
from mojomesh_contracts.events import EventReceived
from mojomesh_ingest.reading import read_event
from mojomesh_ingest.settings import Settings
from mojomesh_store import rows
from mojomesh_store.shards import open_feature_store

async def store(shard, records):
    events = [read_event(record.value) for record in records]
    async with shard.begin() as db:
        await rows.append(db, events)

async def consume(settings):
    consumer = AIOKafkaConsumer(EventReceived.topic.name, bootstrap_servers=settings.kafka, auto_offset_reset="earliest")
    await consumer.start()
    async with open_feature_store(settings.postgres_urls) as feature_store, asyncio.TaskGroup() as group:
        while True:
            for records in (await consumer.getmany(timeout_ms=100, max_records=5_000)).values():
                group.create_task(store(feature_store.shards[0], records))

asyncio.run(consume(read_settings(Settings)))
"""


async def test_without_waiting_for_what_is_under_way_the_same_lock_fills_memory(world: Any, start: Callable[..., Any]) -> None:
    async with table_locked(world):
        process = psutil.Process(start("-c", PILES_UP).pid)
        await world.records.publish(world.make_event())
        await asyncio.sleep(3)
        before = process.memory_info().rss
        await publish_many(world)

        assert await growth_mb(process, before) > 2 * MOST_MB
