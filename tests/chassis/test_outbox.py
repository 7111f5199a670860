"""The outbox's relay on real PostgreSQL and Kafka; `registry.outbox` stands for every service's."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from sqlalchemy import MetaData, Table, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.database import Database, open_database
from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_chassis.health import Health
from mojomesh_chassis.outbox import Relay, outbox_table, relaying, save_events
from mojomesh_chassis.publishing import Publisher, Record
from mojomesh_contracts.events import ModelReady

OUTBOX: Table = outbox_table(MetaData(schema="registry"))


def ready(number: int) -> ModelReady:
    return ModelReady(event_id=uuid4(), model="delay", run_id=uuid4(), bundle_digest=str(number))


@pytest.fixture
async def database(postgres: Any) -> AsyncIterator[Database]:
    async with open_database(postgres.url) as database:
        yield database


@pytest.fixture
async def publisher(kafka: str) -> AsyncIterator[Publisher]:
    publisher = Publisher(kafka)
    yield publisher
    await publisher.close()


async def save(database: Database, *events: ModelReady) -> None:
    async with database.begin() as db:
        await save_events(db, OUTBOX, events)


async def unsent(database: Database) -> int:
    async with database.begin() as db:
        return await db.scalar(select(func.count()).where(OUTBOX.c.sent_at.is_(None))) or 0


async def heard(kafka: str, count: int) -> list[ConsumerRecord]:
    consumer = AIOKafkaConsumer(ModelReady.topic.name, bootstrap_servers=kafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        return [await anext(consumer) for _ in range(count)]
    finally:
        await consumer.stop()


async def digests(kafka: str, count: int) -> list[str]:
    return [ModelReady.model_validate_json(record.value).bundle_digest for record in await heard(kafka, count)]


class Failing(Publisher):
    """Kafka that does not acknowledge: nothing arrived, or (`arrives`) everything did and the answer was lost."""

    def __init__(self, kafka: str, failures: int, *, arrives: bool = False) -> None:
        super().__init__(kafka)
        self.failures, self.arrives = failures, arrives

    async def send(self, records: Sequence[Record]) -> None:
        if self.failures > 0:
            self.failures -= 1
            if self.arrives:
                await super().send(records)
            raise TransientError("not acknowledged")
        await super().send(records)


class Slow(Publisher):
    """Kafka that takes records only when told."""

    def __init__(self, kafka: str) -> None:
        super().__init__(kafka)
        self.asked, self.told = asyncio.Event(), asyncio.Event()

    async def send(self, records: Sequence[Record]) -> None:
        self.asked.set()
        await self.told.wait()
        await super().send(records)


class OutOfTurn(Relay):
    """A relay without the lock."""

    async def _take_turn(self, db: AsyncSession) -> bool:
        return True


async def test_events_are_sent_in_the_order_in_which_they_were_saved(database: Database, publisher: Publisher, kafka: str) -> None:
    for number in range(0, 30, 3):
        await save(database, *(ready(number + step) for step in range(3)))

    assert await Relay(database, OUTBOX, publisher).send_batch() == 30

    assert await digests(kafka, 30) == [str(number) for number in range(30)]
    assert await unsent(database) == 0


async def test_an_event_arrives_as_its_contract_says(database: Database, publisher: Publisher, kafka: str) -> None:
    event = ready(1)
    await save(database, event)
    await Relay(database, OUTBOX, publisher).send_batch()

    (record,) = await heard(kafka, 1)

    assert record.key == b"delay"
    assert ModelReady.model_validate_json(record.value) == event


async def test_what_was_rolled_back_is_not_sent(database: Database, publisher: Publisher) -> None:
    with pytest.raises(ZeroDivisionError):
        async with database.begin() as db:
            await save_events(db, OUTBOX, [ready(1)])
            raise ZeroDivisionError

    assert await Relay(database, OUTBOX, publisher).send_batch() == 0


async def test_an_event_too_large_for_its_topic_is_refused_before_it_could_hold_up_others(database: Database) -> None:
    huge = ready(1).model_copy(update={"bundle_digest": "x" * ModelReady.topic.max_bytes})
    with pytest.raises(PermanentError, match="too large"):
        await save(database, huge)
    assert await unsent(database) == 0


async def test_an_event_saved_again_is_sent_again(database: Database, publisher: Publisher, kafka: str) -> None:
    event = ready(1)
    relay = Relay(database, OUTBOX, publisher)
    for _ in range(2):
        await save(database, event)
        assert await relay.send_batch() == 1
    assert await digests(kafka, 2) == ["1", "1"]


@pytest.mark.parametrize("arrives", [False, True])
async def test_what_kafka_did_not_acknowledge_stays_and_is_sent_later(database: Database, kafka: str, arrives: bool) -> None:
    await save(database, ready(1), ready(2))
    failing = Failing(kafka, failures=1, arrives=arrives)
    relay = Relay(database, OUTBOX, failing)

    with pytest.raises(TransientError):
        await relay.send_batch()
    assert await unsent(database) == 2

    await relay.send_batch()
    assert await digests(kafka, 4 if arrives else 2) == ["1", "2"] * (2 if arrives else 1)
    await failing.close()


@pytest.mark.parametrize("locked", [True, False])
async def test_a_second_relay_waits_for_the_first_or_would_overtake_it(database: Database, kafka: str, locked: bool) -> None:
    """Two replicas at once; and the control, a relay that takes no turn: the later event of a key arrives before the earlier one."""
    slow, quick = Slow(kafka), Publisher(kafka)
    second = (Relay if locked else OutOfTurn)(database, OUTBOX, quick)
    await save(database, ready(1))
    first = asyncio.create_task(Relay(database, OUTBOX, slow).send_batch())
    await slow.asked.wait()
    await save(database, ready(2))

    assert await second.send_batch() == (0 if locked else 1)

    slow.told.set()
    assert await first == 1
    await second.send_batch()
    assert await digests(kafka, 2) == (["1", "2"] if locked else ["2", "1"])
    await slow.close()
    await quick.close()


async def test_a_running_relay_sends_what_comes_and_waits_out_a_kafka_that_is_away(database: Database, kafka: str) -> None:
    failing, health = Failing(kafka, failures=2), Health()
    async with relaying(database, OUTBOX, failing, health) as relay:
        await save(database, ready(1))
        relay.wake()
        assert await digests(kafka, 1) == ["1"]
        assert await health.check() == {}
    assert failing.failures == 0
    await failing.close()


async def test_sent_events_are_forgotten_after_a_week(database: Database, publisher: Publisher) -> None:
    old = ready(1)
    await save(database, old)
    async with database.begin() as db:
        await db.execute(OUTBOX.update().values(sent_at=func.clock_timestamp() - func.make_interval(0, 0, 0, 8)))
    await save(database, ready(2))

    await Relay(database, OUTBOX, publisher).send_batch()

    async with database.begin() as db:
        assert old.event_id not in (await db.scalars(select(OUTBOX.c.id))).all()
