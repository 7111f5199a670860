"""Consuming events at least once: decode, validate, handle, publish what follows, then commit.

FastStream subscribes and runs the loops; what its acknowledgement policies cannot give is here (PITFALLS are in
docs/decisions/0002-consuming.md): explicit offsets, bounded retries with back-off, isolation of a bad record in a batch, dead letters.
"""

import asyncio
import inspect
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import redis.exceptions as redis
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import ConsumerStoppedError, IllegalStateError, KafkaError
from faststream import AckPolicy
from faststream.kafka import KafkaBroker
from faststream.kafka.message import KafkaAckableMessage
from opentelemetry import trace
from prometheus_client import Counter, Gauge, Histogram
from pydantic import ValidationError

from mojomesh_chassis.dead_letters import dead_letter
from mojomesh_chassis.errors import PermanentError, Rejected, TransientError, faults_of
from mojomesh_chassis.faults import fault
from mojomesh_chassis.health import Health
from mojomesh_chassis.publishing import EncodedEvent, Publisher
from mojomesh_chassis.settings import MeshSettings
from mojomesh_chassis.telemetry import carried_trace, links, log, tracer
from mojomesh_chassis.topics import require_topics
from mojomesh_contracts.events import Event

_CONSUMED = Counter("mojomesh_events_consumed_total", "Events by what became of them", ["topic", "outcome"])
_SECONDS = Histogram("mojomesh_handling_seconds", "Time to handle a batch and publish what follows", ["topic"])
_LAG = Gauge("mojomesh_lag_records", "Records in assigned partitions that are not handled yet", ["topic", "partition"])

TRIES = 3  # of a batch that fails by a bug, before its bad record is looked for
MAX_WAIT_S = 5.0
AT_ONCE_S = 0.002  # records that come so soon after others had been waiting
FETCH_MS = 10  # at most, for a fetch of what is there
OUTAGES = (ConnectionError, TimeoutError, httpx.TransportError, redis.ConnectionError, redis.TimeoutError)
"""What libraries raise when a server does not answer: the event is not to blame, so its partition waits."""

AnyEvent = TypeVar("AnyEvent", bound=Event)
Handler = Callable[..., Awaitable[Sequence[Event | EncodedEvent] | None]]
Delivery = tuple[ConsumerRecord, Any]
Read = Callable[[bytes], Any]
Refusal = tuple[ConsumerRecord, Exception]


@dataclass(frozen=True)
class Subscription:
    """One handler of one topic, as a router declares it."""

    service: str
    event: type[Event]
    handler: Handler
    batch: int
    broadcast: bool
    read: Read
    members: int = 1
    apart: bool = False
    pace_s: float = 0.0

    @property
    def group(self) -> str | None:
        """Consumer group: one per service and topic, so that a rebalance of one topic does not stop the others."""
        return None if self.broadcast else f"{self.service}.{self.event.topic.name}"


class MeshRouter:
    """The handlers of one service, by topic."""

    def __init__(self, service: str) -> None:
        self.service = service
        self.subscriptions: list[Subscription] = []

    def work(
        self,
        event: type[AnyEvent],
        *,
        batch: int = 1,
        read: Read | None = None,
        members: int = 1,
        apart: bool = False,
        pace_s: float = 0.0,
    ) -> Callable[[Handler], Handler]:
        """Subscribe as one of the service's replicas: each record is handled by one of them, at least once.

        The handler gets a list of at most `batch` events, in order within a key, and returns the events that follow.

        Args:
            read: Makes what the handler gets of a record's bytes, or raises Pydantic's `ValidationError`; by default the event.
            members: Of the group, in this process; each has partitions of its own, and one handles a batch while others wait for Kafka.
            apart: A list is of one partition, and partitions do not wait for each other: while one is handled, or has to wait, it is
                paused and the others go on.
            pace_s: From the beginning of a batch that is not full to that of the next, at least: a batch costs something, however small.
        """
        read_event = read or event.model_validate_json
        return self._subscribe(lambda handler: Subscription(self.service, event, handler, batch, False, read_event, members, apart, pace_s))

    def broadcast(self, event: type[AnyEvent], *, batch: int = 100) -> Callable[[Handler], Handler]:
        """Subscribe as every replica: each reads the topic from its beginning, and work starts when it has caught up."""
        return self._subscribe(lambda handler: Subscription(self.service, event, handler, batch, True, event.model_validate_json))

    def _subscribe(self, subscription_of: Callable[[Handler], Subscription]) -> Callable[[Handler], Handler]:
        def subscribe(handler: Handler) -> Handler:
            self.subscriptions.append(subscription_of(handler))
            return handler

        return subscribe


@dataclass
class Consumer:
    """One subscription at work."""

    subscription: Subscription
    publisher: Publisher
    resources: dict[str, Any]
    asker: AIOKafkaConsumer
    member: int = 0
    kafka: AIOKafkaConsumer | None = None
    _outages: int = 0  # in a row
    _bugs: int = 0  # in a row, whatever outages were between
    _ended: float = 0.0  # when the last records were done with, by time.monotonic
    _handled: dict[TopicPartition, int] = field(default_factory=dict)
    _apart: "dict[TopicPartition, Consumer]" = field(default_factory=dict)
    _under_way: set["asyncio.Task[None]"] = field(default_factory=set)

    async def consume(self, records: Sequence[ConsumerRecord]) -> None:
        """Handle records, publish what follows, commit; or leave the offsets where they are and read again later."""
        began = time.monotonic()
        name = self.subscription.event.topic.name
        contexts = _causes(records)
        within = trace.set_span_in_context(trace.NonRecordingSpan(contexts[0])) if len(contexts) == 1 else None
        with (
            _SECONDS.labels(name).time(),
            tracer.start_as_current_span(
                f"{self.subscription.service} {name}", context=within, links=links(contexts), kind=trace.SpanKind.CONSUMER
            ),
        ):
            try:
                decoded, bad = self._decoded(records)
                bad += await self._deliver(decoded)
                await self._bury(bad)  # last, so that an outage before it does not bury the same records at every try
            except TransientError as error:
                self._outages += 1
                await self._read_again(records, error, error.retry_after_s * 2 ** min(self._outages - 1, 10))
            except Exception as error:  # noqa: BLE001  going on would commit past records that nobody handled
                self._bugs += 1
                await self._read_again(records, error, 0.1 * 2**self._bugs)
            else:
                self._outages = self._bugs = 0
                self._fault("after_publish")
                await self._commit(records)
        if len(records) < self.subscription.batch:
            await asyncio.sleep(max(0.0, began + self.subscription.pace_s - time.monotonic()))
        self._ended = time.monotonic()

    async def with_newer(self, records: Sequence[ConsumerRecord]) -> Sequence[ConsumerRecord]:
        """Records that waited while others were handled, and what has come since.

        aiokafka fetches no more while it has any that nobody took: these may be a few that came right after the last batch was taken.
        """
        room = self.subscription.batch - len(records)
        if time.monotonic() - self._ended > AT_ONCE_S or room <= 0:
            return records
        try:
            newer = await (await self._assigned()).getmany(timeout_ms=FETCH_MS, max_records=room)
        except (KafkaError, ConsumerStoppedError):
            return records  # whoever asks next is told again; these are not to be lost
        return [*records, *(record for part in newer.values() for record in part)]

    def consume_apart(self, records: Sequence[ConsumerRecord]) -> None:
        """Begin to handle the records of each partition for itself; it is paused until they are, so one batch of it is in memory."""
        for partition in {TopicPartition(record.topic, record.partition): None for record in records}:
            self._set_paused(partition, True)
            part = [record for record in records if record.partition == partition.partition]
            task = asyncio.create_task(self._consume_part(partition, part))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def let_go(self) -> None:
        """Give up what is under way apart; its offsets are not committed, so it is read again."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _consume_part(self, partition: TopicPartition, records: Sequence[ConsumerRecord]) -> None:
        of_one = self._apart.setdefault(partition, Consumer(self.subscription, self.publisher, self.resources, self.asker))
        of_one.kafka = self.kafka
        await of_one.consume(records)
        self._set_paused(partition, False)

    def _set_paused(self, partition: TopicPartition, paused: bool) -> None:
        assert self.kafka is not None
        if partition in self.kafka.assignment():  # else its new owner reads it
            (self.kafka.pause if paused else self.kafka.resume)(partition)

    async def left(self) -> dict[int, tuple[int, int]]:
        """By partition, how many records the group has handled, whichever members did, and how many there are; both from offset 0.

        Raises:
            TransientError: Kafka does not say.
        """
        topic = self.subscription.event.topic
        partitions = [TopicPartition(topic.name, number) for number in range(topic.partitions)]
        while (kafka := self.kafka) is None:
            await asyncio.sleep(0.01)
        try:
            ends = await self.asker.end_offsets(partitions)
            handled = await asyncio.gather(*(kafka.committed(partition) for partition, end in ends.items() if end))
        except KafkaError as error:
            raise TransientError(f"Kafka does not say how much of {topic.name} is handled: {error!r}") from error
        begun = [partition for partition, end in ends.items() if end]
        return {partition.partition: (done or 0, ends[partition]) for partition, done in zip(begun, handled, strict=True)}

    async def caught_up(self) -> None:
        """Wait until everything that is in the topic now has been handled.

        Raises:
            TransientError: Kafka does not say what is in the topic.
        """
        partitions = (await self._assigned()).assignment()
        try:
            ends = await self.asker.end_offsets(partitions)
            unread = [partition for partition in partitions if partition not in self._handled]
            begins = await self.asker.beginning_offsets(unread) if unread else {}
        except KafkaError as error:
            raise TransientError(f"Kafka does not say how far {self.subscription.event.topic.name} goes: {error!r}") from error
        while any(self._handled.get(partition, begins.get(partition, 0)) < end for partition, end in ends.items()):
            await asyncio.sleep(0.01)

    async def _assigned(self) -> AIOKafkaConsumer:
        while self.kafka is None or not self.kafka.assignment():
            await asyncio.sleep(0.01)
        return self.kafka

    def _decoded(self, records: Sequence[ConsumerRecord]) -> tuple[list[Delivery], list[Refusal]]:
        decoded: list[Delivery] = []
        bad: list[Refusal] = []
        event = self.subscription.event
        for record in records:
            value = record.value or b""
            if len(value) > event.topic.max_bytes:  # it came compressed
                bad.append((record, PermanentError(f"{len(value)} bytes; {event.topic.name} takes at most {event.topic.max_bytes}")))
                continue
            try:
                decoded.append((record, self.subscription.read(value)))
            except ValidationError as error:
                bad.append((record, PermanentError(f"no valid {event.__name__}: {faults_of(error)}")))
        return decoded, bad

    async def _deliver(self, batch: list[Delivery]) -> list[Refusal]:
        """Handle a batch; what cannot be handled for good is named by the handler, or stands alone when the batch has been halved."""
        if not batch:
            return []
        try:
            await self._handle([event for _, event in batch])
        except TransientError:
            raise
        except Rejected as error:
            bad: list[Refusal] = [(batch[index][0], PermanentError(reason)) for index, reason in error.reasons.items()]
            return bad + await self._deliver([delivery for index, delivery in enumerate(batch) if index not in error.reasons])
        except OUTAGES as error:
            raise TransientError(f"{type(error).__name__}: {error}", retry_after_s=0.2) from error
        except Exception as error:  # a bug in a handler must not stop a partition
            if not isinstance(error, PermanentError) and self._bugs < TRIES - 1:
                raise
            if len(batch) == 1:
                return [(batch[0][0], error)]
            middle = len(batch) // 2
            return await self._deliver(batch[:middle]) + await self._deliver(batch[middle:])
        _CONSUMED.labels(self.subscription.event.topic.name, "handled").inc(len(batch))
        return []

    async def _handle(self, events: list[Any]) -> None:
        following = await self.subscription.handler(events, **self.resources)
        self._fault("after_handler")
        await self.publisher.publish(following or [])

    def _fault(self, point: str) -> None:
        if not self.subscription.broadcast:  # a replica that starts hears them all: tests would kill it there and prove nothing
            fault(f"{self.subscription.service}.{point}")

    async def _bury(self, bad: list[Refusal]) -> None:
        """Dead-letter records with their bytes and headers as they came and the reason; broadcasts are only logged, by every replica."""
        topic = self.subscription.event.topic
        for record, error in bad:
            log.error(
                "record_dead_lettered",
                topic=record.topic,
                partition=record.partition,
                offset=record.offset,
                reason=_reason(error),
                traceback=None if isinstance(error, PermanentError) else "".join(traceback.format_exception(error)),
            )
        if not self.subscription.broadcast:
            await self.publisher.send([dead_letter(record, self.subscription.service, _reason(error)) for record, error in bad])
        _CONSUMED.labels(topic.name, "dead_lettered").inc(len(bad))

    async def _read_again(self, records: Sequence[ConsumerRecord], error: BaseException, wait_s: float) -> None:
        """Wait and rewind: the partitions wait and nothing is lost."""
        wait_s = min(MAX_WAIT_S, wait_s)
        log.warning("batch_read_again", topic=records[0].topic, n=len(records), wait_s=wait_s, reason=repr(error))
        _CONSUMED.labels(records[0].topic, "read_again").inc(len(records))
        await asyncio.sleep(wait_s)
        firsts: dict[TopicPartition, int] = {}
        for record in records:
            firsts.setdefault(TopicPartition(record.topic, record.partition), record.offset)
        for partition, offset in firsts.items():
            try:
                (await self._assigned()).seek(partition, offset)
            except IllegalStateError:
                log.info("partition_gone", topic=partition.topic, partition=partition.partition)  # its new owner reads it again

    async def _commit(self, records: Sequence[ConsumerRecord]) -> None:
        offsets = {record.partition: record.offset + 1 for record in records}
        nexts = {TopicPartition(records[0].topic, partition): offset for partition, offset in offsets.items()}
        kafka = await self._assigned()
        if not self.subscription.broadcast:
            try:
                await kafka.commit(nexts)
            except KafkaError as error:
                # The partition went to another member, or Kafka is away: the records come again, and their effects are safe to repeat.
                log.warning("commit_failed", topic=records[0].topic, reason=repr(error))
        self._handled |= nexts
        for partition, offset in nexts.items():
            end = kafka.highwater(partition) if partition in kafka.assignment() else None
            _LAG.labels(partition.topic, partition.partition).set(max(0, (end or offset) - offset))


@asynccontextmanager
async def consuming(
    router: MeshRouter, settings: MeshSettings, publisher: Publisher, health: Health, slot: str = "0", **resources: Any
) -> AsyncIterator[None]:
    """Run a router's handlers. Broadcast topics are caught up with first; at the end running handlers finish.

    Args:
        slot: Tells apart the processes of one replica; a restarted one gets its partitions back at once.
        resources: What handlers get, by parameter name.

    Raises:
        TransientError: Nobody answers as Kafka, or it lacks a topic.
    """
    broker = KafkaBroker(settings.kafka, apply_types=False, logger=None, graceful_timeout=30, parser=None, allow_auto_create_topics=False)
    # Kafka answers a connection's requests one by one: asked over that of a consumer, it would answer when its fetch ends, 0.5 s later.
    asker = AIOKafkaConsumer(bootstrap_servers=settings.kafka, isolation_level="read_committed")
    consumers: list[Consumer] = []
    try:
        consumers += [
            _consumer(subscription, publisher, resources, asker, member)
            for subscription in router.subscriptions
            for member in range(subscription.members)
        ]
        await require_topics(settings.kafka, [subscription.event.topic.name for subscription in router.subscriptions])
        await asker.start()
        await broker.connect()
        await broker.start()
        broadcasts = [consumer for consumer in consumers if consumer.subscription.broadcast]
        for consumer in broadcasts:
            await _start(broker, consumer, settings, slot)
        for consumer in consumers:
            for resource in resources.values():
                if isinstance(resource, Follower) and resource.event is consumer.subscription.event:
                    resource.follow(consumer)
        for consumer in broadcasts:
            await consumer.caught_up()
        await asyncio.gather(*(_start(broker, consumer, settings, slot) for consumer in consumers if not consumer.subscription.broadcast))
        health.add("kafka", publisher.ping)
        yield
    finally:
        for consumer in consumers:
            await consumer.let_go()
        await broker.stop()
        await asker.stop()


class Follower:
    """A resource that needs to know how far the service is with a topic that it consumes."""

    event: type[Event]
    _followed: Consumer | None = None

    def follow(self, consumer: Consumer) -> None:
        """Called by `consuming` with the consumer of the topic."""
        self._followed = consumer


class CatchesUp(Follower):
    """A resource filled by a broadcast topic; `await caught_up()` makes it know all that is in the topic at the call."""

    async def caught_up(self) -> None:
        """Wait until everything that is in the topic now is known here."""
        if self._followed is not None:
            await self._followed.caught_up()


def _consumer(
    subscription: Subscription, publisher: Publisher, resources: dict[str, Any], asker: AIOKafkaConsumer, member: int
) -> Consumer:
    named = list(inspect.signature(subscription.handler).parameters)[1:]
    if missing := [name for name in named if name not in resources]:
        raise TypeError(f"{subscription.handler.__name__} asks for {', '.join(missing)}, which `consuming` was not given")
    return Consumer(subscription, publisher, {name: resources[name] for name in named}, asker, member)


async def _start(broker: KafkaBroker, consumer: Consumer, settings: MeshSettings, slot: str) -> None:
    subscription = consumer.subscription
    member = f"{slot}.{consumer.member}" if consumer.member else slot
    subscriber = broker.subscriber(
        subscription.event.topic.name,
        batch=True,
        max_records=subscription.batch,
        batch_timeout_ms=25,
        group_id=subscription.group,
        group_instance_id=None if subscription.broadcast else f"{subscription.group}-{settings.replica}-{member}",
        ack_policy=AckPolicy.MANUAL,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_poll_records=subscription.batch,
        session_timeout_ms=45_000,
        heartbeat_interval_ms=1_000,
        max_poll_interval_ms=15 * 60 * 1000,
        parser=_as_it_is,
        decoder=_undecoded,
    )

    async def consume(records: Sequence[ConsumerRecord]) -> None:
        consumer.kafka = subscriber.consumer
        if subscription.apart:
            consumer.consume_apart(records)
        else:
            await consumer.consume(await consumer.with_newer(records))

    subscriber(consume)
    await subscriber.start()
    consumer.kafka = subscriber.consumer


async def _as_it_is(records: tuple[ConsumerRecord, ...]) -> KafkaAckableMessage:
    """A parser that cannot fail: FastStream's own skips a record whose header is no text, silently."""
    return KafkaAckableMessage(body=b"", raw_message=records, consumer=_NEVER_USED)


async def _undecoded(message: KafkaAckableMessage) -> Sequence[ConsumerRecord]:
    return message.raw_message


_NEVER_USED: Any = None  # offsets are committed by `Consumer`, not through the message


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, PermanentError) else f"{type(error).__name__}: {error}"


def _causes(records: Sequence[ConsumerRecord]) -> list[trace.SpanContext]:
    """The spans that caused the records, each once."""
    # Reading a trace from headers costs as much as decoding an event, and most records of a batch share theirs.
    distinct = {tuple(record.headers) for record in records}
    contexts = [carried_trace({name: value.decode("utf-8", "replace") for name, value in headers if value}) for headers in distinct]
    return list({context.span_id: context for context in contexts if context.is_valid}.values())
