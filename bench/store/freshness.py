"""How long it takes from the publishing of an event until the features service answers with it, on servers of their own.

One ingest and one features process, as shipped. Events are published in an open loop, whatever becomes of them; of some the entity is
asked for, all that are outstanding in one request, until the answer has the event. The time counts from when the event was due. Half of
those entities were in the cache before with an older row, half are new. They are counted once more without the seconds in which, or before
those in which, the host of this machine gave 1 % of it or more to others (`bench/steal.py`).
"""

import asyncio
import logging
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from uuid import UUID

import httpx
import numpy as np
import orjson
from prometheus_client.parser import text_string_to_metric_families

from bench.steal import CALM, Steal
from bench.store.ingest import Spent, declare, make_event
from mojomesh_chassis.publishing import EncodedEvent, Publisher
from mojomesh_chassis.serving import settle_memory
from mojomesh_chassis.topics import ensure_topics
from mojomesh_contracts.events import EventReceived, FeaturesWritten
from mojomesh_local import ports
from mojomesh_local.kafka import Kafka
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, Cluster, Postgres
from mojomesh_local.processes import Child, Command, Server
from mojomesh_local.redis import Redis

RATE = 2_000  # events a second
WARM_UP_S = 60.0  # Kafka's Java compiles itself
SAMPLED = 50  # one of so many is looked for
KNOWN = 200  # entities that are in the cache
TICK_S = 0.005
POLL_S = 0.01
TARGET_MS = 200


@dataclass
class Sought:
    """Events that are not served yet, by entity: when they are true, and when they were due."""

    outstanding: dict[str, tuple[datetime, float]] = field(default_factory=dict)
    found: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {"known": [], "new": []})
    """When each was due, and after how many seconds it was served."""

    def add(self, event: EventReceived, due: float) -> None:
        self.outstanding[event.entity_id] = event.event_time, due

    def served(self, entity_id: str, event_time: datetime, now: float, began: float) -> None:
        """Note what was answered, unless it is older than what is sought or of the warm-up."""
        wanted, due = self.outstanding[entity_id]
        if event_time >= wanted:
            del self.outstanding[entity_id]
            if due >= began:
                self.found["known" if entity_id.startswith("known") else "new"].append((due, now - due))


def event_of(number: int) -> EventReceived:
    """The events in their order; every other sampled one is of an entity that is in the cache."""
    event = make_event(number)
    if number % (2 * SAMPLED) == 0:
        return event.model_copy(update={"entity_id": f"known-{number // (2 * SAMPLED) % KNOWN}"})
    return event


def encoded(event: EventReceived) -> EncodedEvent:
    return EncodedEvent(event.topic, event.event_id, event.partition_key, event.model_dump_json().encode())


async def publish(
    publisher: Publisher, events: Sequence[EncodedEvent], sampled: Mapping[int, EventReceived], sought: Sought, started: float
) -> list[float]:
    """Publish events at `RATE`, each as soon as it is due; how long Kafka took to acknowledge them."""
    acknowledged: list[float] = []

    async def send(events: Sequence[EncodedEvent], due: float) -> None:
        await publisher.publish(events)
        acknowledged.append(time.perf_counter() - due)

    first = 0
    async with asyncio.TaskGroup() as sending:
        while first < len(events):
            end = min(len(events), int((time.perf_counter() - started) * RATE) + 1)
            if first < end:
                for number in range(first, end):
                    if event := sampled.get(number):
                        sought.add(event, started + number / RATE)
                sending.create_task(send(events[first:end], started + first / RATE))
                first = end
            await asyncio.sleep(TICK_S)
    return acknowledged


class Http:
    """A connection of HTTP/1.1 for one question after the other, at a tenth of what a library costs: it shares two cores with the rest."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def newest(self, entity_ids: Sequence[str]) -> dict[str, datetime]:
        """The event time of the newest row of each entity that has one."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = orjson.dumps({"rows": [{"entity_id": name} for name in entity_ids]})
        head = "POST /v1/features/flights:batch HTTP/1.1\r\nhost: features\r\ncontent-type: application/json\r\ncontent-length: "
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        length = next(int(line.removeprefix("content-length:")) for line in headers if line.startswith("content-length:"))
        answer = await reader.readexactly(length)
        if " 200 " not in status:
            raise RuntimeError(f"{status}: {answer.decode()}")
        rows = orjson.loads(answer)["rows"]
        return {row["entity_id"]: datetime.fromisoformat(row["event_time"]) for row in rows if row is not None}


async def look(http: Http, sought: Sought, began: float) -> None:
    """Ask for what is outstanding, again and again."""
    while True:
        if entity_ids := list(sought.outstanding):
            for entity_id, event_time in (await http.newest(entity_ids)).items():
                sought.served(entity_id, event_time, time.perf_counter(), began)
        await asyncio.sleep(POLL_S)


async def watch(stolen: dict[int, float], started: float) -> None:
    """Note what share of this machine was given to others, by second."""
    while True:
        steal, elapsed = Steal(), time.perf_counter() - started
        await asyncio.sleep(1 - elapsed % 1)
        stolen[int(elapsed)] = steal.share


def start_service(name: str, port: int, env: Mapping[str, str], folder: Path) -> Child:
    command = Command(name, [sys.executable, "-m", f"mojomesh_{name}"], folder / f"{name}.log", {**env, f"{name.upper()}_PORT": str(port)})
    return Server(command, (port,), ready=lambda: ports.says_ok(f"http://127.0.0.1:{port}/health/ready")).start()


async def measure(folder: Path, seconds: float, stack: AsyncExitStack) -> None:
    first = ports.choose(6)
    cluster = Cluster(first, secrets.token_hex(8))
    kafka = Kafka(folder / "kafka", first + 1, folder / "kafka.log")  # and the port after it
    redis = Redis(folder / "redis", first + 3, secrets.token_hex(8), folder / "redis.log")
    postgres = Postgres(folder / "postgres", cluster, folder / "postgres.log")
    processes: dict[str, int] = {}
    for name, server in {"postgres": postgres.server, "kafka": kafka.server, "redis": redis.server}.items():
        child = server.start()
        stack.callback(child.stop)
        processes[name] = child.pid
    await ensure_topics(kafka.bootstrap)
    await migrate_tables([cluster.url(OWNER)])
    publisher = Publisher(kafka.bootstrap)
    stack.push_async_callback(publisher.close)
    known = [make_event(-1).model_copy(update={"entity_id": f"known-{number}"}) for number in range(KNOWN)]
    await declare(publisher)
    await publisher.publish([event.model_copy(update={"event_id": UUID(int=n)}) for n, event in enumerate(known)])
    env = {
        "MOJOMESH_KAFKA": kafka.bootstrap,
        "MOJOMESH_POSTGRES": cluster.url(SERVICE),
        "MOJOMESH_REDIS": redis.url,
        "MOJOMESH_OBJECTS": folder.as_uri(),
        "MOJOMESH_TOKEN": secrets.token_hex(16),
        "MOJOMESH_PUBLIC_KEY": str(folder / "nobody.pem"),
        "FEATURES_WORK_FOLDER": str(folder / "work"),
    }
    for name, port in {"ingest": first + 4, "features": first + 5}.items():
        service = start_service(name, port, env, folder)
        stack.callback(service.stop)
        processes[name] = service.pid
    http = Http(first + 5)
    while len(await http.newest([event.entity_id for event in known])) < KNOWN:
        await asyncio.sleep(0.1)

    made = [event_of(number) for number in range(int((WARM_UP_S + seconds) * RATE))]
    events, sampled = [encoded(event) for event in made], {number: made[number] for number in range(0, len(made), SAMPLED)}
    del made
    settle_memory()
    sought = Sought()
    started, own_started = time.perf_counter(), time.process_time()
    stolen: dict[int, float] = {}
    watching = asyncio.create_task(watch(stolen, started))
    cpu = Spent(processes)
    cpu.read()
    looking = asyncio.create_task(look(http, sought, started + WARM_UP_S))
    acknowledged = await publish(publisher, events, sampled, sought, started)
    spent = cpu.read() | {"this client": time.process_time() - own_started}
    while sought.outstanding and not looking.done():
        await asyncio.sleep(POLL_S)
    looking.cancel()
    watching.cancel()
    for port in (first + 4, first + 5):
        async with httpx.AsyncClient(trust_env=False) as client:
            print_batches((await client.get(f"http://127.0.0.1:{port}/metrics")).text)
    calm = {second for second in stolen if max(stolen[second], stolen.get(second + 1, 1.0)) < CALM}
    print(f"calm in {len(calm)} of {len(stolen)} seconds; {statistics.mean(stolen.values()):.1%} of the machine was given to others")
    print(f"{RATE:,} events/s for {WARM_UP_S + seconds:.0f} s, the first {WARM_UP_S:.0f} not counted; asked every {1000 * POLL_S:.0f} ms\n")
    together = [each for found in sought.found.values() for each in found]
    report(
        {
            "acknowledged by Kafka": acknowledged[int(WARM_UP_S / (WARM_UP_S + seconds) * len(acknowledged)) :],
            **{f"{kind} entities": [took for _, took in found] for kind, found in sought.found.items()},
            "together": [took for _, took in together],
            "in calm seconds": [took for due, took in together if int(due - started) in calm],
        }
    )
    print("cores: " + ", ".join(f"{name} {each / (WARM_UP_S + seconds):.2f}" for name, each in spent.items()))


def print_batches(metrics: str) -> None:
    """How long a service took for a batch, by topic."""
    found = {
        s.name + s.labels["topic"]: s.value
        for f in text_string_to_metric_families(metrics)
        for s in f.samples
        if "topic" in s.labels and s.labels.get("outcome", "handled") == "handled"
    }
    for topic in (EventReceived.topic.name, FeaturesWritten.topic.name):
        if n := found.get(f"mojomesh_handling_seconds_count{topic}"):
            events, seconds = found[f"mojomesh_events_consumed_total{topic}"], found[f"mojomesh_handling_seconds_sum{topic}"]
            print(f"{topic:22} {events / n:6.1f} a batch, {1000 * seconds / n:6.1f} ms")


def report(measured: Mapping[str, Sequence[float]]) -> None:
    for name, found in measured.items():
        if found:
            p50, p99, most = 1000 * np.percentile(found, [50, 99, 100])
            goal = f"   {p99 / TARGET_MS:.0%} of what it may be" if name in ("together", "in calm seconds") else ""
            print(f"{name:22} p50 {p50:6.1f} ms   p99 {p99:6.1f} ms   max {most:6.1f} ms   of {len(found):,}{goal}")


async def run(seconds: float) -> None:
    with tempfile.TemporaryDirectory(prefix="mojomesh-bench-") as folder:
        async with AsyncExitStack() as stack:
            await measure(Path(folder), seconds, stack)


def main(quick: bool) -> None:
    """Measure for a minute, with `quick` for ten seconds."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics have no leader for a moment
    asyncio.run(run(10 if quick else 60))
