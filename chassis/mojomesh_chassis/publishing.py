"""Publishing events: idempotent, keyed by their contract, acknowledged by every in-sync replica."""

import asyncio
from collections import Counter as Tally
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple
from uuid import UUID

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidProducerEpoch,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
    ProducerFenced,
    UnknownProducerId,
)
from aiokafka.partitioner import murmur2
from aiokafka.producer.message_accumulator import BatchBuilder
from prometheus_client import Counter

from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_chassis.settings import MeshSettings
from mojomesh_chassis.telemetry import trace_headers
from mojomesh_contracts.events import Event
from mojomesh_contracts.topics import Topic

_PUBLISHED = Counter("mojomesh_events_published_total", "Events acknowledged by Kafka", ["topic"])


class Record(NamedTuple):
    """What Kafka gets."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    partition: int | None = None  # the key decides


FEW = 50  # records of one call that are not worth batches of their own
MAX_REQUEST_BYTES = 8 * 2**20  # above every topic's max_bytes: Kafka decides what is too large, not this client
_BROKEN_FOR_GOOD = (OutOfOrderSequenceNumber, UnknownProducerId, InvalidProducerEpoch, ProducerFenced)


class EncodedEvent(NamedTuple):
    """An event that its producer has written as JSON itself, where Pydantic would cost more than all else it does."""

    topic: Topic
    event_id: UUID | str
    partition_key: str
    value: bytes
    partition: int | None = None


class Publisher:
    """Writes events to their topics."""

    def __init__(self, kafka: str) -> None:
        self._kafka = kafka
        self._producer: AIOKafkaProducer | None = None
        self._opening = asyncio.Lock()

    async def publish(self, events: Sequence[Event | EncodedEvent], headers: Mapping[str, str] | None = None) -> None:
        """Publish `events`, in order within a key; returns when Kafka has acknowledged all of them.

        Raises:
            TransientError: Kafka did not acknowledge all; some may be there, so publish all again.
            PermanentError: An event is larger than its topic allows.
        """
        carried = [(name, value.encode()) for name, value in {**trace_headers(), **(headers or {})}.items()]
        await self.send(
            [Record(event.topic.name, event.partition_key.encode(), _value(event), carried, event.partition) for event in events]
        )

    async def send(self, records: Sequence[Record]) -> None:
        """The same for records as they are, as dead letters are.

        Raises:
            TransientError: Kafka did not acknowledge all.
            PermanentError: A record is larger than its topic allows.
        """
        if not records:
            return
        producer = await self._open()
        # aiokafka takes a record without key and value, as a dead letter may be, in a batch only.
        by_batches = len(records) > FEW or any(record.key is None and record.value is None for record in records)
        try:
            await asyncio.gather(*(await _sending_many(producer, records) if by_batches else await _sending(producer, records)))
        except _BROKEN_FOR_GOOD as error:
            await self._give_up(producer)
            raise TransientError(f"Kafka refused the sequence of records: {error!r}") from error
        except MessageSizeTooLargeError as error:
            await self._give_up(producer)
            raise PermanentError(f"too large for its topic: {error}") from error
        except KafkaError as error:
            raise TransientError(f"Kafka at {self._kafka} did not acknowledge: {error!r}") from error
        for topic, n in Tally(record.topic for record in records).items():
            _PUBLISHED.labels(topic).inc(n)

    async def ping(self) -> None:
        """Ask Kafka for its topics."""
        await (await self._open()).client.fetch_all_metadata()

    async def close(self) -> None:
        """Send what is buffered and let go; a later call opens another producer."""
        if (producer := self._producer) is not None:
            await self._give_up(producer)

    async def _give_up(self, producer: AIOKafkaProducer) -> None:
        """Let go of a producer whose sequence has a hole, which aiokafka cannot mend (its issue 1017); the next call opens another."""
        # Several calls may find the same producer broken; only the first must end it, and none the one opened since.
        if producer == self._producer:
            self._producer = None
            await producer.stop()

    async def _open(self) -> AIOKafkaProducer:
        async with self._opening:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    bootstrap_servers=self._kafka,
                    acks="all",
                    enable_idempotence=True,
                    linger_ms=2,
                    max_batch_size=256 * 1024,
                    max_request_size=MAX_REQUEST_BYTES,
                    compression_type="zstd",  # a quarter of what lz4 costs in aiokafka, which asks for its slowest level, and smaller
                )
                try:
                    await producer.start()
                except KafkaConnectionError as error:
                    await producer.stop()
                    raise TransientError(f"nobody answers as Kafka at {self._kafka}") from error
                self._producer = producer
            return self._producer


async def _sending(producer: AIOKafkaProducer, records: Sequence[Record]) -> list[Awaitable[object]]:
    """Records one by one: they share Kafka's batches with those of other calls."""
    # send() waits while its buffer is full, so memory is bounded.
    return [
        await producer.send(topic, value, key=key, headers=headers, partition=partition)
        for topic, key, value, headers, partition in records
    ]


async def _sending_many(producer: AIOKafkaProducer, records: Sequence[Record]) -> list[Awaitable[object]]:
    """The same by whole batches, at a third of the CPU: there is a future a batch, not a record."""
    sent: list[Awaitable[object]] = []
    n_partitions: dict[str, int] = {}
    filling: dict[tuple[str, int], BatchBuilder] = {}
    for topic, key, value, headers, partition in records:
        if topic not in n_partitions:
            n_partitions[topic] = len(await producer.partitions_for(topic))
        place = topic, _partition_of(key, n_partitions[topic]) if partition is None else partition
        if (batch := filling.get(place)) is None:
            batch = filling[place] = producer.create_batch()
        if batch.append(timestamp=None, key=key, value=value, headers=headers) is None:  # it is full
            sent.append(await producer.send_batch(batch, topic, partition=place[1]))
            batch = filling[place] = producer.create_batch()
            batch.append(timestamp=None, key=key, value=value, headers=headers)
    return sent + [await producer.send_batch(batch, topic, partition=partition) for (topic, partition), batch in filling.items()]


def _partition_of(key: bytes | None, n_partitions: int) -> int:
    """Where a key belongs, as every Kafka client places it by default."""
    return 0 if key is None else (murmur2(key) & 0x7FFFFFFF) % n_partitions


def _value(event: Event | EncodedEvent) -> bytes:
    value = event.value if isinstance(event, EncodedEvent) else event.model_dump_json().encode()
    if len(value) > event.topic.max_bytes:
        raise PermanentError(f"event {event.event_id} is {len(value)} bytes; {event.topic.name} takes at most {event.topic.max_bytes}")
    return value


@asynccontextmanager
async def open_publisher(settings: MeshSettings) -> AsyncIterator[Publisher]:
    """A publisher that is closed, with everything sent, at the end."""
    publisher = Publisher(settings.kafka)
    try:
        yield publisher
    finally:
        await publisher.close()
