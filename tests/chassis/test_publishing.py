"""Publishing, creating topics and reading them as a bystander."""

import asyncio
import os
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from aiokafka.partitioner import DefaultPartitioner

from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_chassis.publishing import FEW, Publisher, Record
from mojomesh_chassis.reading import read_topics
from mojomesh_chassis.topics import declared_topics, ensure_topics
from mojomesh_contracts.events import Event, EventReceived, TrainingRequested
from mojomesh_contracts.topics import Topic

NOON = datetime(2013, 3, 1, 12, tzinfo=UTC)


class Sized(Event):
    topic: ClassVar[Topic] = Topic("sizes.tested.v1", partitions=12)
    keyed_by: ClassVar[str] = "name"

    name: str
    text: str = ""


def make_events(n: int, n_keys: int = 7, text: str = "") -> list[Event]:
    return [Sized(event_id=uuid4(), name=f"key-{number % n_keys}", text=f"{number} {text}") for number in range(n)]


@pytest.fixture
async def publisher(kafka: str) -> Any:
    await ensure_topics(kafka, [Sized.topic])
    publisher = Publisher(kafka)
    yield publisher
    await publisher.close()


@pytest.mark.parametrize("n", [1, FEW, FEW + 1, 5_000])
async def test_events_arrive_in_the_order_of_their_key_where_every_client_would_put_them(
    n: int, publisher: Publisher, records: Any
) -> None:
    events = make_events(n)

    await publisher.publish(events)

    found = await records.read(Sized.topic.name)
    assert len(found) == n
    for key in {record.key for record in found}:
        of_key = [Sized.model_validate_json(record.value) for record in found if record.key == key]
        assert of_key == [event for event in events if event.partition_key.encode() == key]
    assert all(record.partition == DefaultPartitioner()(record.key, list(range(12)), list(range(12))) for record in found)


async def test_events_of_more_than_one_kafka_batch_arrive_in_order(publisher: Publisher, records: Any) -> None:
    events = make_events(200, n_keys=1, text="x" * 10_000)

    await publisher.publish(events)

    assert [Sized.model_validate_json(record.value) for record in await records.read(Sized.topic.name)] == events


async def test_many_calls_at_once_share_one_publisher(publisher: Publisher, records: Any) -> None:
    parts = [make_events(n) for n in (1, 80, 3, 200, 1, 60)]

    await asyncio.gather(*(publisher.publish(part) for part in parts))

    found = {Sized.model_validate_json(record.value) for record in await records.read(Sized.topic.name)}
    assert found == {event for part in parts for event in part}


async def test_an_event_larger_than_its_topic_takes_is_refused_before_any_other_is_sent(publisher: Publisher, records: Any) -> None:
    events = [*make_events(3), Sized(event_id=uuid4(), name="large", text="x" * Sized.topic.max_bytes)]

    with pytest.raises(PermanentError, match=f"{Sized.topic.name} takes at most {Sized.topic.max_bytes}"):
        await publisher.publish(events)

    assert await records.read(Sized.topic.name) == []


async def test_kafka_refusing_a_record_for_its_size_is_permanent_and_does_not_stop_the_next(publisher: Publisher, records: Any) -> None:
    noise = os.urandom(Sized.topic.max_bytes + 2**20)

    with pytest.raises(PermanentError, match="too large for its topic"):
        await publisher.send([Record(Sized.topic.name, b"k", noise, [])])

    await publisher.send([Record(Sized.topic.name, b"k", b"small", [])])
    assert [record.value for record in await records.read(Sized.topic.name)] == [b"small"]


async def test_kafka_being_away_is_an_outage_and_says_where_it_was_looked_for() -> None:
    with pytest.raises(TransientError, match=r"nobody answers as Kafka at 127\.0\.0\.1:9"):
        await Publisher("127.0.0.1:9").publish(make_events(1))


async def test_a_closed_publisher_opens_again(publisher: Publisher, records: Any) -> None:
    await publisher.publish(make_events(1))
    await publisher.close()
    await publisher.publish(make_events(1))

    assert len(await records.read(Sized.topic.name)) == 2


async def test_topics_are_created_once_as_declared_and_grow(kafka: str, records: Any) -> None:
    grown = Topic(Sized.topic.name, partitions=15, retention=timedelta(hours=1))

    assert await ensure_topics(kafka, [Sized.topic]) == [Sized.topic.name]
    assert await ensure_topics(kafka, [Sized.topic]) == []
    assert await ensure_topics(kafka, [grown]) == []
    assert await ensure_topics(kafka) == []
    await records.publish(*make_events(100, n_keys=100))
    assert max(record.partition for record in await records.read(Sized.topic.name)) > 11


def test_every_topic_has_a_dead_letter_topic_that_keeps_longer() -> None:
    names = {topic.name: topic for topic in declared_topics()}

    assert names["events.received.v1.dlt"].retention > names["events.received.v1"].retention
    assert len(names) == len(declared_topics())


async def test_a_bystander_reads_all_there_is_and_no_more(publisher: Publisher, kafka: str) -> None:
    event = TrainingRequested(event_id=uuid4(), model="m", reason="r", requested_at=NOON)
    await publisher.publish([*make_events(30), event])

    read = [record async for record in read_topics(kafka, [Sized.topic.name, event.topic.name, EventReceived.topic.name])]

    assert len(read) == 31


async def test_a_bystander_is_told_what_is_missing(kafka: str) -> None:
    with pytest.raises(TransientError, match=r"no topic poems\.read\.v1; run `mojomesh migrate`"):
        [record async for record in read_topics(kafka, ["poems.read.v1"])]
    with pytest.raises(TransientError, match=r"nobody answers as Kafka at 127\.0\.0\.1:9"):
        [record async for record in read_topics("127.0.0.1:9", ["poems.read.v1"])]
