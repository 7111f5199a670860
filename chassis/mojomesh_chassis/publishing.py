"""Publishing events: idempotent, keyed by their contract, acknowledged by every in-sync replica."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError, KafkaError, OutOfOrderSequenceNumber
from prometheus_client import Counter

from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.settings import MeshSettings
from mojomesh_chassis.telemetry import trace_headers
from mojomesh_contracts.events import Event

_PUBLISHED = Counter("mojomesh_events_published_total", "Events acknowledged by Kafka", ["topic"])

Record = tuple[str, bytes | None, bytes | None, Sequence[tuple[str, bytes]]]
"""Topic, key, value, headers."""


class Publisher:
    """Writes events to their topics."""

    def __init__(self, kafka: str) -> None:
        self._kafka = kafka
        self._producer: AIOKafkaProducer | None = None
        self._opening = asyncio.Lock()

    async def publish(self, events: Sequence[Event], headers: Mapping[str, str] | None = None) -> None:
        """Publish `events`, in order within a key; returns when Kafka has acknowledged all of them.

        Raises:
            TransientError: Kafka did not acknowledge all; some may be there, so publish all again.
        """
        carried = [(name, value.encode()) for name, value in {**trace_headers(), **(headers or {})}.items()]
        await self.send([(event.topic.name, event.partition_key.encode(), event.model_dump_json().encode(), carried) for event in events])

    async def send(self, records: Sequence[Record]) -> None:
        """The same for records as they are, as dead letters are.

        Raises:
            TransientError: Kafka did not acknowledge all.
        """
        if not records:
            return
        try:
            producer = await self._open()
            # send() waits while its buffer is full, so memory is bounded.
            sent = [await producer.send(topic, value, key=key, headers=headers) for topic, key, value, headers in records]
            await asyncio.gather(*sent)
        except OutOfOrderSequenceNumber as error:
            # This producer's sequence is broken for good (aio-libs/aiokafka#1017); the next call opens another.
            await self.close()
            raise TransientError(f"Kafka refused the sequence of records: {error!r}") from error
        except KafkaError as error:
            raise TransientError(f"Kafka at {self._kafka} did not acknowledge: {error!r}") from error
        for topic in {record[0] for record in records}:
            _PUBLISHED.labels(topic).inc(sum(record[0] == topic for record in records))

    async def ping(self) -> None:
        """Ask Kafka for its topics."""
        await (await self._open()).client.fetch_all_metadata()

    async def close(self) -> None:
        """Send what is buffered and let go; a later call opens another producer."""
        producer, self._producer = self._producer, None
        if producer is not None:
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
                    max_request_size=4 * 1024 * 1024,
                    compression_type="lz4",
                )
                try:
                    await producer.start()
                except KafkaConnectionError:
                    await producer.stop()
                    raise
                self._producer = producer
            return self._producer


@asynccontextmanager
async def open_publisher(settings: MeshSettings) -> AsyncIterator[Publisher]:
    """A publisher that is closed, with everything sent, at the end."""
    publisher = Publisher(settings.kafka)
    try:
        yield publisher
    finally:
        await publisher.close()
