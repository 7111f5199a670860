"""How long GIN's list of pending entries may grow: `.venv/bin/python -m bench.store.pending SECONDS LIST/WORK/EVERY …`.

One database for each: `gin_pending_list_limit` and `work_mem`, which is how much of the list a writer puts into the index at a time, in
kB; and after how many batches somebody else empties the list, with `maintenance_work_mem` (0: nobody does).
Each has `GROWN` rows to begin with, since emptying the list costs the more the more rows a value has. They are written to in turns by
`store.rows` in batches of 5,000, all in all for `SECONDS`.
Printed for each: rows a second, CPU time of the server a row, the batches (median, 99th percentile, slowest: the one that empties the
list), pages of the list (median, most), and how long a question of containment with one answer takes (median, slowest).
"""

import asyncio
import secrets
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import asyncpg
import psutil

from bench.store.ingest import BATCH, INDEX, TURN, make_event, pending_pages
from mojomesh_chassis.database import Database, open_database
from mojomesh_local import ports
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, SUPERUSER, Cluster, Postgres
from mojomesh_store import rows

QUESTION = """SELECT entity_id FROM store.feature_rows WHERE "values" @> '{"flight": 77, "distance": 77, "temp": 99.25}' LIMIT 1"""


GROWN = 500_000
# As `values_of` makes them.
GROW = """
    INSERT INTO store.feature_rows (feature_set, entity_id, event_time, reported_at, created_at, event_id, "values")
    SELECT 'flights', 'flight-' || -n, at, at, at, gen_random_uuid(), jsonb_build_object(
        'carrier', (ARRAY['UA', 'AA', 'B6', 'DL', 'EV', 'MQ', 'US', '9E', 'WN', 'VX'])[1 + n % 10],
        'origin', (ARRAY['EWR', 'JFK', 'LGA'])[1 + n % 3], 'dest', 'D' || n % 105, 'tailnum', 'N' || n % 4043,
        'type', (ARRAY['jet', 'prop'])[1 + n % 2], 'manufacturer', 'maker ' || n % 35, 'flight', n % 8500, 'distance', 80 + n % 4900,
        'hour', n % 24, 'minute', n % 60, 'month', 1 + n % 12, 'day', 1 + n % 31, 'seats', 2 + n % 448, 'year', 1956 + n % 57,
        'sched_dep', n % 1440, 'sched_arr', n * 7 % 1440, 'engines', 1 + n % 4, 'wind_speed', n % 50 / 2.0, 'temp', n % 400 / 4.0,
        'visib', n % 20 / 2.0)
    FROM generate_series(1, {n}) AS n, LATERAL (SELECT timestamptz '2012-12-31' - n * interval '10 s' AS at) AS times;
"""
REBUILD = 'CREATE INDEX feature_rows_values ON store.feature_rows USING gin ("values" jsonb_path_ops)'


@dataclass
class Limited:
    """A database with a limit, and what was seen of it."""

    name: str
    database: Database
    looking: asyncpg.Connection
    limit_kb: int
    every: int
    times: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    pages: list[int] = field(default_factory=list)
    asking: list[float] = field(default_factory=list)
    emptying: list[float] = field(default_factory=list)

    async def write(self, server: psutil.Process, first: int) -> None:
        rows.PENDING_LIMIT_KB = self.limit_kb
        for turn in range(TURN):
            events = [make_event(number) for number in range(first + turn * BATCH, first + (turn + 1) * BATCH)]
            before, started = cpu(server), time.perf_counter()
            async with self.database.begin() as db:
                await rows.append(db, events)
            self.times.append(time.perf_counter() - started)
            self.cpu_s += cpu(server) - before
            self.pages.append(await pending_pages(self.looking))
            if self.every and len(self.times) % self.every == 0:
                before, started = cpu(server), time.perf_counter()
                await self.looking.fetch("SELECT gin_clean_pending_list($1::regclass)", f"store.{INDEX}")
                self.emptying.append(time.perf_counter() - started)
                self.cpu_s += cpu(server) - before
        started = time.perf_counter()
        await self.looking.fetch(QUESTION)
        self.asking.append(time.perf_counter() - started)

    def report(self) -> str:
        times, n = sorted(self.times), len(self.times) * BATCH
        batches = f"{statistics.median(times) * 1000:.0f} / {times[len(times) * 99 // 100] * 1000:.0f} / {times[-1] * 1000:.0f} ms a batch"
        pages = f"{statistics.median(self.pages):.0f} / {max(self.pages)} pages"
        asking = f"{statistics.median(self.asking) * 1000:.1f} / {max(self.asking) * 1000:.1f} ms a question"
        if self.emptying:
            asking += f"; {statistics.median(self.emptying) * 1000:.0f} / {max(self.emptying) * 1000:.0f} ms to empty it"
        rate, cpu_us = n / (sum(times) + sum(self.emptying)), self.cpu_s / n * 1e6
        return f"{n:9,} rows, {rate:7,.0f}/s, {cpu_us:5.1f} us of CPU a row; {batches}; {pages}; {asking}"


def cpu(server: psutil.Process) -> float:
    return sum(sum(process.cpu_times()[:4]) for process in [server, *server.children(recursive=True)])


async def main(seconds: float, limits: list[str]) -> None:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mojomesh-bench-"))
        cluster = Cluster(ports.choose(), secrets.token_hex(8))
        child = Postgres(Path(folder) / "postgres", cluster, Path(folder) / "postgres.log").server.start()
        stack.callback(child.stop)
        databases = []
        cluster.create_database("grown")
        await migrate_tables([cluster.url(OWNER, "grown")])
        cluster.execute(f"DROP INDEX store.feature_rows_values; {GROW.format(n=GROWN)}; {REBUILD}; ANALYZE store.feature_rows", "grown")
        for limit in limits:
            pending, work, every = limit.split("/")
            name = f"limits_{pending}_{work}_{every}"
            cluster.execute(f"CREATE DATABASE {name} OWNER {OWNER} TEMPLATE grown STRATEGY FILE_COPY")
            cluster.execute(f"ALTER DATABASE {name} SET work_mem = {work}")
            looking = await asyncpg.connect(cluster.url(SUPERUSER, name))
            stack.push_async_callback(looking.close)
            await looking.execute("SET enable_seqscan = off")
            database = await stack.enter_async_context(open_database(cluster.url(SERVICE, name)))
            databases.append(Limited(limit, database, looking, int(pending), int(every)))
        turns, until = count(), time.monotonic() + seconds
        while time.monotonic() < until:
            first = next(turns) * TURN * BATCH
            for each in databases:
                await each.write(psutil.Process(child.pid), first)
        for each in databases:
            print(f"{each.name:>16}: {each.report()}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), sys.argv[2:]))
