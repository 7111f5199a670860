"""How long GIN's list of pending entries may grow: `.venv/bin/python -m bench.store.pending SECONDS LIST/WORK …`.

One database for each pair, in kB, of `gin_pending_list_limit` and `work_mem`, which is what of the list is put into the index at a time.
They are written to in turns by `store.rows` in batches of 5,000, all in all for `SECONDS`.
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

from bench.store.ingest import BATCH, TURN, make_event, pending_pages
from mojomesh_chassis.database import Database, open_database
from mojomesh_local import ports
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, SUPERUSER, Cluster, Postgres
from mojomesh_store import rows

QUESTION = """SELECT entity_id FROM store.feature_rows WHERE "values" @> '{"flight": 77, "distance": 77, "temp": 99.25}' LIMIT 1"""


@dataclass
class Limited:
    """A database with a limit, and what was seen of it."""

    name: str
    database: Database
    looking: asyncpg.Connection
    times: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    pages: list[int] = field(default_factory=list)
    asking: list[float] = field(default_factory=list)

    async def write(self, server: psutil.Process, first: int) -> None:
        for turn in range(TURN):
            events = [make_event(number) for number in range(first + turn * BATCH, first + (turn + 1) * BATCH)]
            before, started = cpu(server), time.perf_counter()
            async with self.database.begin() as db:
                await rows.append(db, events)
            self.times.append(time.perf_counter() - started)
            self.cpu_s += cpu(server) - before
            self.pages.append(await pending_pages(self.looking))
        started = time.perf_counter()
        await self.looking.fetch(QUESTION)
        self.asking.append(time.perf_counter() - started)

    def report(self) -> str:
        times, n = sorted(self.times), len(self.times) * BATCH
        batches = f"{statistics.median(times) * 1000:.0f} / {times[len(times) * 99 // 100] * 1000:.0f} / {times[-1] * 1000:.0f} ms a batch"
        pages = f"{statistics.median(self.pages):.0f} / {max(self.pages)} pages"
        asking = f"{statistics.median(self.asking) * 1000:.1f} / {max(self.asking) * 1000:.1f} ms a question"
        return f"{n:9,} rows, {n / sum(times):7,.0f}/s, {self.cpu_s / n * 1e6:5.1f} us of CPU a row; {batches}; {pages}; {asking}"


def cpu(server: psutil.Process) -> float:
    return sum(sum(process.cpu_times()[:4]) for process in [server, *server.children(recursive=True)])


async def main(seconds: float, limits: list[str]) -> None:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mojomesh-bench-"))
        cluster = Cluster(ports.choose(), secrets.token_hex(8))
        child = Postgres(Path(folder) / "postgres", cluster, Path(folder) / "postgres.log").server.start()
        stack.callback(child.stop)
        databases = []
        for limit in limits:
            pending, work = limit.split("/")
            name = f"limits_{pending}_{work}"
            cluster.create_database(name)
            await migrate_tables([cluster.url(OWNER, name)])
            cluster.execute(f"ALTER DATABASE {name} SET gin_pending_list_limit = {pending}; ALTER DATABASE {name} SET work_mem = {work}")
            looking = await asyncpg.connect(cluster.url(SUPERUSER, name))
            stack.push_async_callback(looking.close)
            await looking.execute("SET enable_seqscan = off")
            database = await stack.enter_async_context(open_database(cluster.url(SERVICE, name)))
            databases.append(Limited(limit, database, looking))
        turns, until = count(), time.monotonic() + seconds
        while time.monotonic() < until:
            first = next(turns) * TURN * BATCH
            for each in databases:
                await each.write(psutil.Process(child.pid), first)
        for each in databases:
            print(f"{each.name:>12} kB: {each.report()}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), sys.argv[2:]))
