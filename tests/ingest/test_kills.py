"""Killed -9 at any point, ingest loses nothing and doubles nothing; without its guards the same test finds that it does."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

N_EVENTS = 300


def arm(world: Any, point: str) -> None:
    (Path(world.env["MOJOMESH_FAULT"]) / point).touch()


async def run_through_a_kill(world: Any, start: Callable[..., Any], *arguments: str) -> list[Any]:
    """Send events to a process that is killed at the armed point and then started again; what was sent."""
    events = world.make_events(N_EVENTS)
    await world.records.publish(*events)
    start(*arguments).wait_for_kill()
    start(*arguments)
    await world.until_handled()
    return [event.event_id for event in events]


@pytest.mark.parametrize("point", ["ingest.after_handler", "ingest.after_publish"])
async def test_an_ingest_killed_and_restarted_has_stored_and_announced_every_event_once(
    point: str, world: Any, start: Callable[..., Any]
) -> None:
    arm(world, point)

    sent = await run_through_a_kill(world, start, "-m", "mojomesh_ingest")

    assert Counter(await world.stored()) == Counter(sent)
    assert len({written.event_id for written in await world.announced()}) == N_EVENTS
    assert await world.buried() == []


async def test_without_the_unique_key_the_same_kill_doubles_events(world: Any, start: Callable[..., Any]) -> None:
    await world.execute("ALTER TABLE store.feature_rows DROP CONSTRAINT feature_rows_pkey")
    arm(world, "ingest.after_handler")

    sent = await run_through_a_kill(world, start, "-m", "mojomesh_ingest")

    assert len(await world.stored()) > len(sent)


COMMITS_FIRST = """
import asyncio, sys
from aiokafka import AIOKafkaConsumer
from mojomesh_chassis.faults import arm_faults, fault
from mojomesh_chassis.settings import read_settings
from mojomesh_contracts.events import EventReceived
from mojomesh_ingest.settings import Settings
from mojomesh_store import rows
from mojomesh_store.shards import open_feature_store

async def consume(settings):
    consumer = AIOKafkaConsumer(EventReceived.topic.name, bootstrap_servers=settings.kafka, group_id="ingest.events.received.v1",
        group_instance_id="commits-first", auto_offset_reset="earliest", enable_auto_commit=False)
    await consumer.start()
    async with open_feature_store(settings.postgres_urls) as store:
        while True:
            for records in (await consumer.getmany(timeout_ms=100)).values():
                await consumer.commit()
                fault("ingest.after_commit")
                async with store.shards[0].begin() as db:
                    await rows.append(db, [EventReceived.model_validate_json(record.value) for record in records])

settings = read_settings(Settings)
arm_faults(settings.fault)
asyncio.run(consume(settings))
"""


async def test_a_consumer_that_commits_before_it_handles_loses_events_by_the_same_kill(world: Any, start: Callable[..., Any]) -> None:
    arm(world, "ingest.after_commit")

    sent = await run_through_a_kill(world, start, "-c", COMMITS_FIRST)

    assert len(await world.stored()) < len(sent)


async def test_an_ingest_asked_to_end_finishes_what_it_has_and_leaves_in_good_order(world: Any, start: Callable[..., Any]) -> None:
    process = start("-m", "mojomesh_ingest")
    await world.records.publish(*world.make_events(N_EVENTS))
    await world.until_handled()

    assert process.stop() == 0
    assert len(await world.stored()) == N_EVENTS


async def test_an_ingest_killed_over_and_over_under_a_stream_of_events_keeps_the_ledger(world: Any, start: Callable[..., Any]) -> None:
    ledger = []
    for point in ("ingest.after_handler", "ingest.after_publish", "ingest.after_handler"):
        arm(world, point)
        process = start("-m", "mojomesh_ingest")
        events = world.make_events(100)
        ledger += [event.event_id for event in events]
        await world.records.publish(*events)
        process.wait_for_kill()
    start("-m", "mojomesh_ingest")
    await world.until_handled()

    assert Counter(await world.stored()) == Counter(ledger)
    assert len({written.event_id for written in await world.announced()}) == len(ledger)
