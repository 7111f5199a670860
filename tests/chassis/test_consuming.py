"""Consuming: at least once, and no record stops a partition. The handlers here are the tests' own, the Kafka is real."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, ClassVar
from uuid import UUID, uuid4

import pytest
from aiokafka import AIOKafkaProducer, ConsumerRecord
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mojomesh_chassis.consuming import TRIES, MeshRouter, consuming
from mojomesh_chassis.definitions import Definitions, subscribe_definitions
from mojomesh_chassis.errors import PermanentError, Rejected, TransientError
from mojomesh_chassis.health import Health
from mojomesh_chassis.publishing import Publisher, open_publisher
from mojomesh_chassis.settings import MeshSettings
from mojomesh_contracts.definitions import parse_definition
from mojomesh_contracts.events import DefinitionApplied, Event, EventReceived, TrainingRequested
from mojomesh_contracts.topics import Topic

RECEIVED = EventReceived.topic.name
BURIED = EventReceived.topic.dead_letters.name
NOON = datetime(2013, 3, 1, 12, tzinfo=UTC)
Received = Callable[[list[EventReceived]], Awaitable[list[Event]]]


def make_event(entity_id: str = "UA1545", **values: Any) -> EventReceived:
    return EventReceived(event_id=uuid4(), feature_set="flights", entity_id=entity_id, event_time=NOON, values=values)


def make_events(n: int, entity_id: str = "UA1545") -> list[EventReceived]:
    return [make_event(entity_id, n=number) for number in range(n)]


class Handled:
    """What a handler of the tests was given: each call's events, by their number or id."""

    def __init__(self) -> None:
        self.calls: list[list[UUID]] = []

    def note(self, events: Sequence[Event]) -> None:
        self.calls.append([event.event_id for event in events])

    @property
    def ids(self) -> list[UUID]:
        return [event_id for call in self.calls for event_id in call]


class Busy(Handled):
    """A handler that is busy with what it was given until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()

    async def on_events(self, batch: list[EventReceived]) -> list[Event]:
        self.note(batch)
        await self.go_on.wait()
        return []


@pytest.fixture
def settings(mesh_env: dict[str, str], kafka: str) -> MeshSettings:
    return MeshSettings(**{**mesh_env, "MOJOMESH_KAFKA": kafka})  # type: ignore[arg-type]


@asynccontextmanager
async def running(settings: MeshSettings, router: MeshRouter, **resources: Any) -> AsyncIterator[Publisher]:
    async with open_publisher(settings) as publisher, consuming(router, settings, publisher, Health(), **resources):
        yield publisher


def router_of(handler: Received, batch: int = 100) -> MeshRouter:
    router = MeshRouter("tester")
    router.work(EventReceived, batch=batch)(handler)
    return router


async def run(settings: MeshSettings, records: Any, handler: Received, batch: int = 100) -> None:
    """Run the handler until all that is in the topic is handled."""
    async with running(settings, router_of(handler, batch)):
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)


def reason_of(record: ConsumerRecord) -> str:
    return (dict(record.headers)["mojomesh-reason"] or b"").decode()


async def test_events_come_in_the_order_of_their_key_and_batches_are_bounded(settings: MeshSettings, records: Any) -> None:
    events, handled = make_events(25), Handled()
    await records.publish(*events)

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        handled.note(batch)
        return []

    await run(settings, records, on_events, batch=10)

    assert handled.ids == [event.event_id for event in events]
    assert max(len(call) for call in handled.calls) <= 10


async def test_a_batch_is_what_waits_one_event_that_came_alone_or_as_many_as_are_allowed(settings: MeshSettings, records: Any) -> None:
    handled = Busy()

    async with running(settings, router_of(handled.on_events, batch=500)) as publisher:
        await publisher.publish(make_events(1))
        while not handled.calls:
            await asyncio.sleep(0.01)
        await publisher.publish(make_events(1_200))
        handled.go_on.set()
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)
        for _ in range(3):
            await publisher.publish(make_events(1))
            await records.until_handled(f"tester.{RECEIVED}", RECEIVED)

    sizes = [len(call) for call in handled.calls]
    assert sizes[0] == 1
    assert max(sizes) == 500
    assert sizes[-3:] == [1, 1, 1]
    assert sum(sizes) == 1_204


@pytest.mark.parametrize(("at_once_s", "sizes"), [(60.0, [1, 51]), (-1.0, [1, 1, 50])], ids=["", "control"])
async def test_what_came_while_others_were_handled_is_one_batch(
    at_once_s: float, sizes: list[int], settings: MeshSettings, records: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what aiokafka fetched first is a batch of its own, and all that came after it waits."""
    monkeypatch.setattr("mojomesh_chassis.consuming.AT_ONCE_S", at_once_s)
    monkeypatch.setattr("mojomesh_chassis.consuming.FETCH_MS", 5_000)
    handled = Busy()

    async with running(settings, router_of(handled.on_events)) as publisher:
        await publisher.publish(make_events(1))
        while not handled.calls:
            await asyncio.sleep(0.01)
        await publisher.publish(make_events(1))
        await asyncio.sleep(0.5)  # it is fetched
        await publisher.publish(make_events(50))
        handled.go_on.set()
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)

    assert [len(call) for call in handled.calls] == sizes


async def test_what_follows_is_published_and_a_restart_goes_on_where_it_was(settings: MeshSettings, records: Any) -> None:
    handled = Handled()

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        handled.note(batch)
        return [TrainingRequested(event_id=event.derive_id("x"), model="m", reason="r", requested_at=NOON) for event in batch]

    events = make_events(4)
    await records.publish(*events[:2])
    await run(settings, records, on_events)
    await records.publish(*events[2:])
    await run(settings, records, on_events)

    assert handled.ids == [event.event_id for event in events]
    following = [TrainingRequested.model_validate_json(record.value) for record in await records.read(TrainingRequested.topic.name)]
    assert [event.event_id for event in following] == [event.derive_id("x") for event in events]


GARBAGE: list[tuple[bytes | None, str]] = [
    (b"\xff\x00 not json", "Invalid JSON"),
    (b'{"event_id": "x"}', "feature_set: Field required"),
    (b"[1, 2]", "EventReceived"),
    (b"", "Invalid JSON"),
    (None, "Invalid JSON"),
]


@pytest.mark.parametrize(("garbage", "reason"), GARBAGE)
async def test_garbage_is_dead_lettered_as_it_came_and_the_partition_goes_on(
    settings: MeshSettings, records: Any, garbage: bytes | None, reason: str
) -> None:
    handled = Handled()
    good = make_event("k")

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        handled.note(batch)
        return []

    headers = [("nothing", None), ("bytes", b"\xff\xfe"), ("text", b"yes")]
    await records.send(RECEIVED, garbage, good.model_dump_json().encode(), key=b"k", headers=headers)
    await run(settings, records, on_events)

    assert handled.ids == [good.event_id]
    (buried,) = await records.read(BURIED)
    assert (buried.value, buried.key) == (garbage, b"k")
    assert list(buried.headers)[:3] == headers
    assert reason in reason_of(buried)
    about = dict(buried.headers)
    (origin, _) = await records.read(RECEIVED)
    assert (about["mojomesh-topic"], about["mojomesh-service"]) == (RECEIVED.encode(), b"tester")
    assert (about["mojomesh-partition"], about["mojomesh-offset"]) == (str(origin.partition).encode(), b"0")


async def test_a_record_without_key_and_value_is_dead_lettered_too(settings: MeshSettings, records: Any, kafka: str) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
        batch = producer.create_batch()
        batch.append(timestamp=None, key=None, value=None, headers=[])
        await (await producer.send_batch(batch, RECEIVED, partition=0))

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        return []

    await run(settings, records, on_events)

    (buried,) = await records.read(BURIED)
    assert (buried.key, buried.value) == (None, None)


async def test_a_record_that_grows_too_large_when_unpacked_is_dead_lettered(settings: MeshSettings, records: Any) -> None:
    handled = Handled()
    huge, good = make_event("k", text="x" * 3 * 2**20), make_event("k")

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        handled.note(batch)
        return []

    values = (huge.model_dump_json().encode(), good.model_dump_json().encode())
    await records.send(RECEIVED, *values, key=b"k", compression_type="gzip", max_batch_size=2**23)
    await run(settings, records, on_events)

    assert handled.ids == [good.event_id]
    (buried,) = await records.read(BURIED)
    assert f"takes at most {2**20}" in reason_of(buried)
    assert values[0].startswith(buried.value)
    assert dict(buried.headers)["mojomesh-cut-from-bytes"] == str(len(values[0])).encode()


async def test_what_follows_from_an_event_and_is_too_large_dead_letters_that_event_alone(settings: MeshSettings, records: Any) -> None:
    events = make_events(8)

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        return [
            TrainingRequested(event_id=uuid4(), model="m", reason="x" * (5 * 2**20 if event.values["n"] == 3 else 1), requested_at=NOON)
            for event in batch
        ]

    await records.publish(*events)
    await run(settings, records, on_events)

    (buried,) = await records.read(BURIED)
    assert json.loads(buried.value)["event_id"] == str(events[3].event_id)
    assert len({record.value for record in await records.read(TrainingRequested.topic.name)}) >= 7


async def test_bad_events_that_the_handler_names_are_buried_without_a_search(settings: MeshSettings, records: Any) -> None:
    handled, calls = Handled(), 0
    events = make_events(60)

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        nonlocal calls
        calls += 1
        if bad := {index: f"{event.values['n']} is odd" for index, event in enumerate(batch) if event.values["n"] % 2}:  # type: ignore[operator]
            raise Rejected(bad)
        handled.note(batch)
        return []

    await records.publish(*events)
    await run(settings, records, on_events)

    assert handled.ids == [event.event_id for event in events[::2]]
    assert calls == 2 * len(handled.calls)
    assert [reason_of(record) for record in await records.read(BURIED)] == [f"{number} is odd" for number in range(1, 60, 2)]


@pytest.mark.parametrize("error", [PermanentError("cannot be"), ZeroDivisionError("a bug")])
async def test_a_batch_that_fails_is_searched_for_the_event_at_fault(settings: MeshSettings, records: Any, error: Exception) -> None:
    handled, tries = Handled(), 0
    events = make_events(20)

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        nonlocal tries
        if any(event.values["n"] == 7 for event in batch):
            tries += len(batch) > 1 and len(batch) == max(len(batch), 2)
            raise error
        handled.note(batch)
        return []

    await records.publish(*events)
    await run(settings, records, on_events)

    assert set(handled.ids) == {event.event_id for event in events if event.values["n"] != 7}
    (buried,) = await records.read(BURIED)
    assert json.loads(buried.value)["values"] == {"n": 7}
    assert reason_of(buried) == ("cannot be" if isinstance(error, PermanentError) else "ZeroDivisionError: a bug")


async def test_a_bug_gets_a_few_tries_even_after_an_outage(settings: MeshSettings, records: Any) -> None:
    tries: list[str] = []

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        tries.append("outage" if len(tries) < 4 else "bug")
        if tries[-1] == "outage":
            raise TransientError("away", retry_after_s=0.01)
        raise ZeroDivisionError

    await records.publish(make_event())
    await run(settings, records, on_events)

    assert tries == ["outage"] * 4 + ["bug"] * TRIES
    assert len(await records.read(BURIED)) == 1


@pytest.mark.parametrize("error", [TransientError("away", 0.01), ConnectionRefusedError(), TimeoutError()])
async def test_during_an_outage_the_partition_waits_and_nothing_is_buried_or_lost(
    settings: MeshSettings, records: Any, error: Exception
) -> None:
    handled, failures = Handled(), 0
    events = make_events(10, "k")

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        nonlocal failures
        if failures < 4:
            failures += 1
            raise error
        handled.note(batch)
        return []

    await records.publish(*events)
    await run(settings, records, on_events)

    assert handled.ids == [event.event_id for event in events]
    assert await records.read(BURIED) == []


async def test_an_outage_does_not_bury_the_garbage_of_its_batch_at_every_try(settings: MeshSettings, records: Any) -> None:
    failures = 0

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        nonlocal failures
        failures += 1
        if failures < 4:
            raise TransientError("away", 0.01)
        return []

    await records.send(RECEIVED, b"garbage", make_event("k").model_dump_json().encode(), key=b"k")
    await run(settings, records, on_events)

    assert failures == 4
    assert len(await records.read(BURIED)) == 1


async def test_work_starts_when_everything_declared_is_known(settings: MeshSettings, records: Any) -> None:
    names = [f"set{number}" for number in range(250)]
    await records.publish(*(definition_applied(name) for name in names), make_event())
    seen: list[int] = []
    router = MeshRouter("tester")
    subscribe_definitions(router)

    @router.work(EventReceived)
    async def on_events(batch: list[EventReceived], definitions: Definitions) -> list[Event]:
        seen.append(len(definitions.feature_sets))
        return []

    async with running(settings, router, definitions=Definitions()):
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)

    assert seen == [250]


async def test_a_handler_can_wait_for_what_was_declared_just_now(settings: MeshSettings, records: Any) -> None:
    known: list[bool] = []
    router = MeshRouter("tester")
    subscribe_definitions(router)

    @router.work(EventReceived)
    async def on_events(batch: list[EventReceived], definitions: Definitions) -> list[Event]:
        await records.publish(definition_applied("late"))
        await definitions.caught_up()
        known.append("late" in definitions.feature_sets)
        return []

    async with running(settings, router, definitions=Definitions()):
        await records.publish(make_event())
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)

    assert known == [True]


async def test_every_replica_hears_a_broadcast_and_skips_what_it_cannot_read(settings: MeshSettings, records: Any) -> None:
    replicas = [Definitions(), Definitions()]
    await records.send(DefinitionApplied.topic.name, b"garbage", key=b"x")
    await records.publish(definition_applied("one"), definition_applied("bad").model_copy(update={"definition": {"kind": "Poem"}}))

    for definitions in replicas:
        router = MeshRouter("tester")
        subscribe_definitions(router)
        async with running(settings, router, definitions=definitions):
            assert set(definitions.feature_sets) == {"one"}

    assert await records.read(DefinitionApplied.topic.dead_letters.name) == []


async def test_two_slots_share_the_partitions_and_a_stopped_one_leaves_its_share(settings: MeshSettings, records: Any) -> None:
    events = [make_event(f"entity-{number}") for number in range(200)]
    handled = {"0": Handled(), "1": Handled()}

    def router_for(slot: str) -> MeshRouter:
        async def on_events(batch: list[EventReceived]) -> list[Event]:
            handled[slot].note(batch)
            return []

        return router_of(on_events)

    async with (
        open_publisher(settings) as publisher,
        consuming(router_for("0"), settings, publisher, Health(), slot="0"),
        consuming(router_for("1"), settings, publisher, Health(), slot="1"),
    ):
        await records.publish(*events)
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)

    assert {*handled["0"].ids, *handled["1"].ids} == {event.event_id for event in events}


@pytest.mark.parametrize("pace_s", [0.5, 0.0], ids=["", "control"])
async def test_batches_that_are_not_full_begin_so_far_apart_as_was_asked_for(pace_s: float, settings: MeshSettings, records: Any) -> None:
    began: list[float] = []

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        began.append(time.monotonic())
        return []

    router = MeshRouter("tester")
    router.work(EventReceived, batch=100, pace_s=pace_s)(on_events)
    async with running(settings, router) as publisher:
        for n in range(1, 5):
            await publisher.publish(make_events(1))
            while len(began) < n:
                await asyncio.sleep(0.005)

    least = min(after - before for before, after in pairwise(began))
    assert (least >= 0.5) == (pace_s == 0.5)


async def test_full_batches_follow_at_once(settings: MeshSettings, records: Any) -> None:
    handled = Handled()
    await records.publish(*make_events(30))

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        handled.note(batch)
        return []

    router = MeshRouter("tester")
    router.work(EventReceived, batch=10, pace_s=3600.0)(on_events)
    async with running(settings, router):
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)

    assert [len(call) for call in handled.calls] == [10, 10, 10]


@pytest.mark.parametrize("members", [1, 2])
async def test_so_many_batches_are_handled_at_a_time_as_a_process_has_members(settings: MeshSettings, records: Any, members: int) -> None:
    events, handled = [make_event(f"entity-{number}") for number in range(200)], Handled()
    at_a_time = [0]

    async def on_events(batch: list[EventReceived]) -> list[Event]:
        at_a_time.append(at_a_time[-1] + 1)
        await asyncio.sleep(0.01)
        at_a_time.append(at_a_time[-1] - 1)
        handled.note(batch)
        return []

    router = MeshRouter("tester")
    router.work(EventReceived, batch=5, members=members)(on_events)
    async with running(settings, router):
        await records.publish(*events)
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)

    assert max(at_a_time) == members
    assert set(handled.ids) == {event.event_id for event in events}


async def test_a_handler_gets_what_a_reader_of_its_own_makes_and_what_that_refuses_is_dead_lettered(
    settings: MeshSettings, records: Any
) -> None:
    seen: list[str] = []
    event = make_event("UA1545", n=1)

    async def on_events(batch: list[str]) -> list[Event]:
        seen.extend(batch)
        return []

    def read(value: bytes) -> str:
        return EventReceived.model_validate_json(value).entity_id

    await records.publish(event)
    await records.send(RECEIVED, b"{}")
    router = MeshRouter("tester")
    router.work(EventReceived, batch=10, read=read)(on_events)
    async with running(settings, router):
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)

    assert seen == ["UA1545"]
    [buried] = await records.read(BURIED)
    assert "event_id" in reason_of(buried)


def test_a_handler_that_asks_for_what_nobody_opened_fails_at_start(settings: MeshSettings) -> None:
    async def on_events(batch: list[EventReceived], feature_store: Any) -> list[Event]:
        return []

    async def start() -> None:
        router = MeshRouter("tester")
        router.work(EventReceived)(on_events)
        async with running(settings, router):
            pass

    with pytest.raises(TypeError, match="feature_store"):
        asyncio.run(start())


async def test_a_service_that_finds_no_kafka_or_no_topic_says_so_and_does_not_start(settings: MeshSettings) -> None:
    class Poem(Event):
        topic: ClassVar[Topic] = Topic("poems.read.v1", partitions=1)
        keyed_by: ClassVar[str] = "event_id"

    async def on_poems(batch: list[Poem]) -> list[Event]:
        return []

    router = MeshRouter("tester")
    router.work(Poem)(on_poems)
    for where, reason in (
        (settings.kafka, r"no topic poems\.read\.v1; run `mojomesh migrate`"),
        ("127.0.0.1:9", "nobody answers as Kafka"),
    ):
        with pytest.raises(TransientError, match=reason):
            async with running(settings.model_copy(update={"kafka": where}), router):
                pass


async def test_a_trace_is_carried_from_event_to_event(settings: MeshSettings, records: Any, spans: InMemorySpanExporter) -> None:
    async def on_events(batch: list[EventReceived]) -> list[Event]:
        return [TrainingRequested(event_id=uuid4(), model="m", reason="r", requested_at=NOON)]

    router = router_of(on_events)
    heard = Handled()

    @router.work(TrainingRequested)
    async def on_training_requested(batch: list[TrainingRequested]) -> list[Event]:
        heard.note(batch)
        return []

    async with running(settings, router) as publisher:
        with trace.get_tracer("test").start_as_current_span("client") as client:
            sent = client.get_span_context()
            await publisher.publish([make_event()])
        await records.until_handled(f"tester.{RECEIVED}", RECEIVED)
        await records.until_handled(f"tester.{TrainingRequested.topic.name}", TrainingRequested.topic.name)

    first, second = (
        next(span for span in spans.get_finished_spans() if span.name == f"tester {name}")
        for name in (RECEIVED, TrainingRequested.topic.name)
    )
    assert first.parent is not None
    assert second.parent is not None
    assert first.parent.span_id == sent.span_id
    assert second.parent.span_id == first.context.span_id
    assert first.context.trace_id == second.context.trace_id == sent.trace_id


async def test_a_batch_of_many_causes_links_to_them(settings: MeshSettings, records: Any, spans: InMemorySpanExporter) -> None:
    async def on_events(batch: list[EventReceived]) -> list[Event]:
        return []

    carried = [f"00-{number:032x}-{number:016x}-01" for number in (1, 2)]
    for header in carried:
        await records.send(RECEIVED, make_event("k").model_dump_json().encode(), key=b"k", headers=[("traceparent", header.encode())])
    await run(settings, records, on_events)

    consumed = [span for span in spans.get_finished_spans() if span.name == f"tester {RECEIVED}"]
    causes = {link.context.trace_id for span in consumed for link in span.links}
    assert causes == {1, 2}


@pytest.fixture
def spans() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


def definition_applied(name: str) -> DefinitionApplied:
    document = {"kind": "FeatureSet", "name": name, "entity": "flight_id", "features": {"distance": {"type": "number"}}}
    parse_definition(document)
    return DefinitionApplied(event_id=uuid4(), definition_id=f"FeatureSet/{name}", version=1, definition=document)
