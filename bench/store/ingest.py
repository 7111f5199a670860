"""How fast ingest is, on servers of its own.

Events wait in Kafka; one ingest process turns them into feature rows and announces them. Beside it, in the same run and into the same
table, raw binary COPY in the same batches: what PostgreSQL alone can take. Printed: events a second, the ratio of the two, and CPU time
per event of each process, which tells what two cores could do when nobody else uses them.
"""

import asyncio
import logging
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import orjson
import psutil
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError

from mojomesh_chassis.publishing import Publisher
from mojomesh_chassis.topics import ensure_topics
from mojomesh_contracts.events import DefinitionApplied, EventReceived, FeaturesWritten
from mojomesh_local import ports
from mojomesh_local.kafka import Kafka
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, Cluster, Postgres
from mojomesh_local.processes import Child, Command, start

BATCH = 5_000
START = datetime(2013, 1, 1, tzinfo=UTC)
CARRIERS = ("UA", "AA", "B6", "DL", "EV", "MQ", "US", "9E", "WN", "VX")
FEATURES = {
    **{name: {"type": "category"} for name in ("carrier", "origin", "dest", "tailnum")},
    **{name: {"type": "number"} for name in ("flight", "distance", "hour", "minute", "month", "day", "seats", "year")},
}
GROUP = f"ingest.{EventReceived.topic.name}"


def make_event(number: int) -> EventReceived:
    return EventReceived(
        event_id=UUID(int=secrets.randbits(128)),
        feature_set="flights",
        entity_id=f"flight-{number}",
        event_time=START + timedelta(seconds=90 * number),
        values={
            "carrier": CARRIERS[number % 10],
            "origin": ("EWR", "JFK", "LGA")[number % 3],
            "dest": f"D{number % 105}",
            "tailnum": f"N{number % 4043}",
            "flight": number % 8500,
            "distance": 80 + number % 4900,
            "hour": number % 24,
            "minute": number % 60,
            "month": 1 + number % 12,
            "day": 1 + number % 31,
            "seats": 2 + number % 448,
            "year": 1956 + number % 57,
        },
    )


@contextmanager
def cpu_seconds(processes: dict[str, int], spent: dict[str, float]) -> Iterator[None]:
    """CPU time that each process and its children (PostgreSQL's backends) spend meanwhile."""

    def read() -> dict[str, float]:
        seconds = {}
        for name, pid in processes.items():
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            seconds[name] = sum(sum(process.cpu_times()[:4]) for process in family)
        return seconds

    before = read()
    yield
    spent.update({name: now - before[name] for name, now in read().items()})


async def fill(kafka: str, n: int) -> float:
    """Put the definition and `n` events into Kafka; seconds."""
    publisher = Publisher(kafka)
    document = {"kind": "FeatureSet", "name": "flights", "entity": "flight_id", "features": FEATURES}
    await publisher.publish([DefinitionApplied(event_id=UUID(int=1), definition_id="FeatureSet/flights", version=1, definition=document)])
    started = time.perf_counter()
    for first in range(0, n, BATCH):
        await publisher.publish([make_event(number) for number in range(first, min(n, first + BATCH))])
    seconds = time.perf_counter() - started
    await publisher.close()
    return seconds


async def handled(kafka: str) -> int:
    """How many events the group has committed."""
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        return sum(found.offset for found in (await admin.list_consumer_group_offsets(GROUP)).values())
    except GroupCoordinatorNotAvailableError:  # nobody has joined a group yet
        return 0
    finally:
        await admin.close()


async def announced(kafka: str) -> int:
    consumer = AIOKafkaConsumer(FeaturesWritten.topic.name, bootstrap_servers=kafka)
    await consumer.start()
    try:
        return sum((await consumer.end_offsets(consumer.assignment())).values())
    finally:
        await consumer.stop()


async def copy_raw(url: str, n: int) -> float:
    """Write `n` events like the others by binary COPY and nothing else; seconds."""
    connection = await asyncpg.connect(url)
    await connection.set_type_codec("jsonb", schema="pg_catalog", format="binary", encoder=lambda raw: b"\x01" + raw, decoder=bytes)
    columns = ["feature_set", "entity_id", "event_time", "reported_at", "created_at", "seq", "event_id", "values"]
    seconds = 0.0
    for first in range(0, n, BATCH):
        batch = [make_event(number) for number in range(first, min(n, first + BATCH))]
        now = datetime.now(UTC)
        rows = [
            ("copied", event.entity_id, event.event_time, now, now, number, event.event_id, orjson.dumps(event.values))
            for number, event in enumerate(batch)
        ]
        started = time.perf_counter()
        await connection.copy_records_to_table("feature_rows", schema_name="store", records=rows, columns=columns)
        seconds += time.perf_counter() - started
    await connection.close()
    return seconds


async def run_ingest(env: dict[str, str], folder: Path, servers: dict[str, Child], n: int) -> tuple[float, dict[str, float]]:
    """Seconds from the first handled batch to the last, and CPU seconds by process."""
    command = Command("ingest", [sys.executable, "-m", "mojomesh_ingest"], folder / "ingest.log", env=env)
    child = start(command)
    spent: dict[str, float] = {}
    try:
        while not (first := await handled(env["MOJOMESH_KAFKA"])):
            await asyncio.sleep(0.02)
        started = time.perf_counter()
        with cpu_seconds({name: each.pid for name, each in {**servers, "ingest": child}.items()}, spent):
            while (done := await handled(env["MOJOMESH_KAFKA"])) < n:
                await asyncio.sleep(0.1)
        seconds = (time.perf_counter() - started) * n / (done - first)
        return seconds, {name: each * n / (done - first) for name, each in spent.items()}
    finally:
        child.stop()


async def measure(folder: Path, n: int, stack: ExitStack) -> None:
    first = ports.choose(4)
    cluster = Cluster(first, secrets.token_hex(8))
    kafka = Kafka(folder / "kafka", first + 1, folder / "kafka.log")  # and the port after it
    servers = {
        "postgres": Postgres(folder / "postgres", cluster, folder / "postgres.log").server.start(),
        "kafka": kafka.server.start(),
    }
    for server in servers.values():
        stack.callback(server.stop)
    await ensure_topics(kafka.bootstrap)
    await migrate_tables([cluster.url(OWNER)])
    env = {
        "MOJOMESH_KAFKA": kafka.bootstrap,
        "MOJOMESH_POSTGRES": cluster.url(SERVICE),
        "MOJOMESH_OBJECTS": folder.as_uri(),
        "MOJOMESH_TOKEN": secrets.token_hex(16),
        "INGEST_PORT": str(first + 3),
    }
    publishing = await fill(kafka.bootstrap, n)
    print(f"published   {n / publishing:10,.0f} events/s by one client, making them included")
    seconds, spent = await run_ingest(env, folder, servers, n)
    copying = await copy_raw(cluster.url(SERVICE), min(n, 100_000)) * n / min(n, 100_000)
    print(f"ingested    {n / seconds:10,.0f} events/s: stored, announced, committed ({await announced(kafka.bootstrap):,} announced)")
    print(f"raw COPY    {n / copying:10,.0f} rows/s into the same table; ingest reaches {copying / seconds:.0%} of it")
    for name, each in spent.items():
        print(f"{name:11} {each / n * 1e6:10.1f} us of CPU an event")
    total = sum(spent.values())
    print(f"together    {total / n * 1e6:10.1f} us of CPU an event: {2 * n / total:,.0f} events/s if two cores did nothing else")


def main(quick: bool) -> None:
    """Measure, with `quick` a tenth of the events."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics have no leader for a moment
    n = 30_000 if quick else 300_000
    with tempfile.TemporaryDirectory(prefix="mojomesh-bench-") as folder, ExitStack() as stack:
        asyncio.run(measure(Path(folder), n, stack))
