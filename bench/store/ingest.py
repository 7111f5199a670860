"""How fast ingest is, on servers of its own: against raw COPY, and for minutes.

    writing     `store.rows`, which stores what is new, and raw binary COPY take turns with the same batches on the same table
    sustained   events wait in Kafka; one ingest process stores, announces and commits them, and every minute is printed: events, memory
                of the process, pages of GIN's pending list (those that a question of containment reads), and the slowest batch (the
                bound of its bucket in ingest's own histogram)

At the end the turns are taken again, on the table as it has become. Printed too: CPU time an event of each process, which tells what two
cores could do if they were always busy, and how memory grows.
"""

import asyncio
import json
import logging
import random
import secrets
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import count
from pathlib import Path
from uuid import UUID

import asyncpg
import orjson
import psutil
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError
from prometheus_client.parser import text_string_to_metric_families

from bench.steal import Steal
from mojomesh_chassis.database import open_database
from mojomesh_chassis.publishing import Publisher, Record
from mojomesh_chassis.topics import ensure_topics
from mojomesh_contracts.events import DefinitionApplied, EventReceived, FeaturesWritten
from mojomesh_local import ports
from mojomesh_local.kafka import Kafka
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, SUPERUSER, Cluster, Postgres
from mojomesh_local.processes import Child, Command, start
from mojomesh_store import rows

BATCH = 5_000
TURN = 10  # batches
AHEAD = 100_000  # events that wait at least, while ingest is measured
START = datetime(2013, 1, 1, tzinfo=UTC)
CARRIERS = ("UA", "AA", "B6", "DL", "EV", "MQ", "US", "9E", "WN", "VX")
GROUP = f"ingest.{EventReceived.topic.name}"
INDEX = "feature_rows_other_any_values_idx"
GOAL_RATE, GOAL_RATIO = 15_000, 0.5


def values_of(number: int) -> dict[str, str | int | float]:
    """20 values in some 300 bytes."""
    return {
        "carrier": CARRIERS[number % 10],
        "origin": ("EWR", "JFK", "LGA")[number % 3],
        "dest": f"D{number % 105}",
        "tailnum": f"N{number % 4043}",
        "type": ("jet", "prop")[number % 2],
        "manufacturer": f"maker {number % 35}",
        "flight": number % 8500,
        "distance": 80 + number % 4900,
        "hour": number % 24,
        "minute": number % 60,
        "month": 1 + number % 12,
        "day": 1 + number % 31,
        "seats": 2 + number % 448,
        "year": 1956 + number % 57,
        "sched_dep": number % 1440,
        "sched_arr": number * 7 % 1440,
        "engines": 1 + number % 4,
        "wind_speed": number % 50 / 2,
        "temp": number % 400 / 4,
        "visib": number % 20 / 2,
    }


FEATURES = {name: {"type": "category" if isinstance(value, str) else "number"} for name, value in values_of(0).items()}


def make_event(number: int) -> EventReceived:
    return EventReceived(
        event_id=UUID(int=random.getrandbits(128)),
        feature_set="flights",
        entity_id=f"flight-{number}",
        event_time=START + timedelta(seconds=10 * number),
        values=values_of(number),
    )


def make_record(number: int) -> Record:
    """The same event as a client sends it, made quickly; an entity has one event, so it may be in any partition."""
    at = (START + timedelta(seconds=10 * number)).isoformat()
    text = f'{{"event_id":"{random.getrandbits(128):032x}","feature_set":"flights","entity_id":"flight-{number}","event_time":"{at}",'
    partition = number // 500 % EventReceived.topic.partitions
    return Record(EventReceived.topic.name, f"flight-{number}".encode(), text.encode() + _rest(number % 50_000), [], partition)


@cache
def _rest(number: int) -> bytes:
    return b'"values":' + orjson.dumps(values_of(number)) + b"}"


@dataclass
class Spent:
    """CPU time of processes and their children (PostgreSQL's backends), from one call to the next."""

    processes: dict[str, int]
    before: dict[str, float] = field(default_factory=dict)

    def read(self) -> dict[str, float]:
        now = {}
        for name, pid in self.processes.items():
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            now[name] = sum(sum(process.cpu_times()[:4]) for process in family)
        spent = {name: seconds - self.before.get(name, 0.0) for name, seconds in now.items()}
        self.before = now
        return spent


# Writing in turns


async def copy_batch(connection: asyncpg.Connection, records: list[tuple[object, ...]]) -> None:
    columns = ["feature_set", "entity_id", "event_time", "reported_at", "created_at", "seq", "event_id", "values"]
    await connection.copy_records_to_table("feature_rows", schema_name="store", records=records, columns=columns)


async def write_in_turns(url: str, numbers: Iterator[int], least_s: float) -> dict[str, float]:
    """Rows a second by COPY and by `store.rows`, each for at least `least_s`; each puts all that it wrote into the index of values."""
    connection = await asyncpg.connect(url)
    await connection.set_type_codec("jsonb", schema="pg_catalog", format="binary", encoder=lambda raw: b"\x01" + raw, decoder=bytes)
    spent = {"COPY": 0.0, "rows": 0.0}
    n = dict.fromkeys(spent, 0)
    async with open_database(url) as database:
        while min(spent.values()) < least_s:
            for how in spent:
                for _ in range(TURN):
                    events = [make_event(next(numbers)) for _ in range(BATCH)]
                    now = datetime.now(UTC)
                    records = [
                        (e.feature_set, e.entity_id, e.event_time, now, now, seq, e.event_id, orjson.dumps(e.values))
                        for seq, e in enumerate(events)
                    ]
                    started = time.perf_counter()
                    if how == "COPY":
                        await copy_batch(connection, records)
                    else:
                        async with database.begin() as db:
                            await rows.append(db, events)
                    spent[how] += time.perf_counter() - started
                    n[how] += BATCH
                started = time.perf_counter()
                await connection.execute("SELECT store.empty_pending_lists()")
                spent[how] += time.perf_counter() - started
    await connection.close()
    rates = {how: n[how] / seconds for how, seconds in spent.items()}
    print(f"written in turns, {spent['COPY']:.0f} s and {spent['rows']:.0f} s: raw COPY {rates['COPY']:,.0f} rows/s, ", end="")
    print(f"store.rows {rates['rows']:,.0f} rows/s: {rates['rows'] / rates['COPY']:.2f} x COPY (goal {GOAL_RATIO})", flush=True)
    return rates


# From Kafka


async def declare(publisher: Publisher) -> None:
    document = {"kind": "FeatureSet", "name": "flights", "entity": "flight_id", "features": FEATURES}
    await publisher.publish([DefinitionApplied(event_id=UUID(int=1), definition_id="FeatureSet/flights", version=1, definition=document)])


async def fill(publisher: Publisher, numbers: Iterator[int], n: int) -> None:
    for _ in range(0, n, 2 * BATCH):
        await publisher.send([make_record(next(numbers)) for _ in range(2 * BATCH)])


async def handled(admin: AIOKafkaAdminClient) -> int:
    """How many events the group has committed."""
    try:
        return sum(found.offset for found in (await admin.list_consumer_group_offsets(GROUP)).values())
    except GroupCoordinatorNotAvailableError:  # nobody has joined a group yet
        return 0


async def announced(kafka: str) -> int:
    consumer = AIOKafkaConsumer(FeaturesWritten.topic.name, bootstrap_servers=kafka)
    await consumer.start()
    try:
        return sum((await consumer.end_offsets(consumer.assignment())).values())
    finally:
        await consumer.stop()


async def stored(connection: asyncpg.Connection) -> int:
    return int(await connection.fetchval("SELECT count(*) FROM store.feature_rows"))


async def pending_pages(connection: asyncpg.Connection) -> int:
    """Pages of the pending list: what a question reads whose answer is nowhere, less three (of the index itself and its root)."""
    asked = """SELECT FROM store.feature_rows_other_any WHERE "values" @> '{"carrier": "nobody"}'"""
    (plan,) = json.loads(await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {asked}"))
    scan = plan["Plan"]["Plans"][0]
    assert scan["Index Name"] == INDEX, scan
    return max(0, scan["Shared Hit Blocks"] + scan["Shared Read Blocks"] - 3)


def batches(url: str) -> dict[float, float]:
    """How many batches took at most so many seconds."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    (histogram,) = [family for family in families if family.name == "mojomesh_handling_seconds"]
    of_events = [each for each in histogram.samples if each.labels["topic"] == EventReceived.topic.name and "le" in each.labels]
    return {float(sample.labels["le"]): sample.value for sample in of_events}


def slowest(before: dict[float, float], after: dict[float, float]) -> float:
    return min(bound for bound in after if after[bound] - before.get(bound, 0) == after[float("inf")] - before.get(float("inf"), 0))


@dataclass
class Mesh:
    """The servers, ingest on them, and who looks on."""

    url: str
    publisher: Publisher
    numbers: Iterator[int]
    admin: AIOKafkaAdminClient
    owner: asyncpg.Connection
    ingest: Child
    spent: Spent


async def sustain(mesh: Mesh, seconds: float, n_waiting: int) -> float:
    """Look on while ingest works for so long, and see to it that events wait; events a second."""
    first = await handled(mesh.admin)
    begun = started = time.perf_counter()
    mesh.spent.read()
    process = psutil.Process(mesh.ingest.pid)
    total, n, n_before, before = first, n_waiting, first, batches(mesh.url)
    minute = min(60.0, seconds / 2)
    steal = Steal()
    memory: list[tuple[float, float]] = []
    rates: list[float] = []
    while True:
        pages = []
        while time.perf_counter() < started + minute:
            await asyncio.sleep(2)
            pages.append(await pending_pages(mesh.owner))
            memory.append(((time.perf_counter() - begun) / 60, process.memory_info().rss / 2**20))
            total = await handled(mesh.admin)
            if n - total < AHEAD:
                await fill(mesh.publisher, mesh.numbers, AHEAD // 2)
                n += AHEAD // 2
        took, started = time.perf_counter() - started, time.perf_counter()
        after = batches(mesh.url)
        rates.append((total - n_before) / took)
        print(f"minute {len(rates):2}: {rates[-1]:7,.0f} events/s; memory {memory[-1][1]:4.0f} MB; pending pages ", end="")
        print(f"{statistics.median(pages):.0f}, at most {max(pages)}; slowest batch < {slowest(before, after):g} s", flush=True)
        n_before, before = total, after
        if started >= begun + seconds - 1:
            break
    spent = mesh.spent.read()
    n_done, took = total - first, time.perf_counter() - begun
    print(f"sustained {n_done / took:,.0f} events/s for {took / 60:.1f} minutes, {min(rates):,.0f} in the slowest (goal {GOAL_RATE:,})")
    later = [each for each in memory if each[0] > memory[-1][0] / 5]  # caches fill in the first fifth
    slope, _ = statistics.linear_regression(*zip(*later, strict=True))
    print(f"memory of ingest: {slope:+.1f} MB a minute after the first fifth, {memory[-1][1]:.0f} MB at the end")
    for name, each in spent.items():
        print(f"{name:11} {each / n_done * 1e6:6.1f} us of CPU an event")
    together = sum(spent.values()) / n_done
    print(f"together    {together * 1e6:6.1f} us: {2 / together:,.0f} events/s if two cores were always busy; ", end="")
    print(f"{sum(spent.values()) / took:.2f} were, and {2 * steal.share:.2f} given to others by the host")
    return n_done / took


async def measure(folder: Path, seconds: float, turns_s: float, stack: ExitStack) -> None:
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
    publisher, numbers = Publisher(kafka.bootstrap), count()
    owner = await asyncpg.connect(cluster.url(SUPERUSER))
    await owner.execute("SET enable_seqscan = off")
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap)
    await admin.start()
    try:
        await write_in_turns(cluster.url(SERVICE), numbers, turns_s)
        n_before = await stored(owner)
        n_waiting = int(seconds * GOAL_RATE * 5 / 3)
        await declare(publisher)
        started = time.perf_counter()
        await fill(publisher, numbers, n_waiting)
        print(f"{n_waiting:,} events put into Kafka, {n_waiting / (time.perf_counter() - started):,.0f}/s by one client", flush=True)
        ingest = start(Command("ingest", [sys.executable, "-m", "mojomesh_ingest"], folder / "ingest.log", env=env))
        stack.callback(ingest.stop)
        while await handled(admin) < BATCH or not ports.answers(first + 3):  # it works before it opens its door
            await asyncio.sleep(0.02)
        spent = Spent({name: each.pid for name, each in {**servers, "ingest": ingest}.items()})
        url = f"http://127.0.0.1:{env['INGEST_PORT']}"
        rate = await sustain(Mesh(url, publisher, numbers, admin, owner, ingest, spent), seconds, n_waiting)
        ingest.stop()
        n_announced, n_handled = await announced(kafka.bootstrap), await handled(admin)
        print(f"{await stored(owner) - n_before:,} stored, {n_announced:,} announced, {n_handled:,} committed")
        rates = await write_in_turns(cluster.url(SERVICE), numbers, turns_s)
        print(f"the whole path from Kafka: {rate / rates['COPY']:.2f} x COPY, beside Kafka on the same cores")
    finally:
        await admin.close()
        await owner.close()
        await publisher.close()


def main(quick: bool) -> None:
    """Measure for five minutes, with `quick` for 20 seconds."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics have no leader for a moment
    seconds, turns_s = (20.0, 4.0) if quick else (300.0, 10.0)
    with tempfile.TemporaryDirectory(prefix="mojomesh-bench-") as folder, ExitStack() as stack:
        asyncio.run(measure(Path(folder), seconds, turns_s, stack))
