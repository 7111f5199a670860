"""Insert-if-new of a batch: unnest against binary COPY into a staging table: `.venv/bin/python -m bench.store.insert [rounds [rows]]`.

Both write batches of new rows (5,000) in turns, each in a transaction, into the feature store's table with all its indexes, on a
PostgreSQL of its own. Printed: milliseconds a batch of wall time, of the server's CPU and of the client's. `store.rows` uses the better.
"""

import asyncio
import secrets
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import asyncpg
import orjson
import psutil

from bench.store.ingest import BATCH, make_event
from mojomesh_contracts.events import EventReceived
from mojomesh_local import ports
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, Cluster, Postgres

UNNEST = """
    INSERT INTO store.feature_rows (feature_set, entity_id, event_time, reported_at, created_at, seq, event_id, "values")
    SELECT feature_set, entity_id, event_time, $7, $7, seq, event_id, vector::jsonb
    FROM unnest($1::text[], $2::text[], $3::timestamptz[], $4::bigint[], $5::uuid[], $6::text[])
        AS arrived (feature_set, entity_id, event_time, seq, event_id, vector)
    ORDER BY feature_set, event_time, event_id ON CONFLICT DO NOTHING RETURNING seq
"""
STAGING = "CREATE TEMP TABLE staging (LIKE store.feature_rows) ON COMMIT DELETE ROWS"
FROM_STAGING = """
    INSERT INTO store.feature_rows SELECT * FROM staging ORDER BY feature_set, event_time, event_id ON CONFLICT DO NOTHING RETURNING seq
"""


async def by_unnest(connection: asyncpg.Connection, events: list[EventReceived], now: datetime) -> None:
    columns = zip(
        *((e.feature_set, e.entity_id, e.event_time, seq, e.event_id, orjson.dumps(e.values).decode()) for seq, e in enumerate(events)),
        strict=True,
    )
    await connection.fetch(UNNEST, *map(list, columns), now)


async def by_copy(connection: asyncpg.Connection, events: list[EventReceived], now: datetime) -> None:
    rows = [
        (e.feature_set, e.entity_id, e.event_time, now, now, seq, e.event_id, b"\x01" + orjson.dumps(e.values))
        for seq, e in enumerate(events)
    ]
    await connection.copy_records_to_table("staging", records=rows)
    await connection.fetch(FROM_STAGING)


async def measure(url: str, rounds: int, batch: int) -> None:
    connection = await asyncpg.connect(url)
    await connection.set_type_codec("jsonb", schema="pg_catalog", format="binary", encoder=bytes, decoder=bytes)
    await connection.execute(STAGING)
    server, client = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()")), psutil.Process()
    spent: dict[str, list[tuple[float, float, float]]] = {"unnest": [], "copy": []}
    for number in range(2 * rounds):
        how, insert = (("unnest", by_unnest), ("copy", by_copy))[number % 2]
        events = [make_event(n) for n in range(number * batch, (number + 1) * batch)]
        before = time.perf_counter(), sum(server.cpu_times()[:2]), sum(client.cpu_times()[:2])
        async with connection.transaction():
            await insert(connection, events, datetime.now(UTC))
        after = time.perf_counter(), sum(server.cpu_times()[:2]), sum(client.cpu_times()[:2])
        spent[how].append((after[0] - before[0], after[1] - before[1], after[2] - before[2]))
    await connection.close()
    for how, times in spent.items():
        wall, of_server, of_client = (statistics.mean(column) * 1000 for column in zip(*times, strict=True))
        print(f"{how:7} {wall:6.0f} ms a batch; CPU of the server {of_server:5.0f} ms, of the client {of_client:5.0f} ms")


async def main(rounds: int = 30, batch: int = BATCH) -> None:
    with tempfile.TemporaryDirectory(prefix="mojomesh-bench-") as folder:
        cluster = Cluster(ports.choose(), secrets.token_hex(8))
        server = Postgres(Path(folder) / "postgres", cluster, Path(folder) / "postgres.log").server.start()
        try:
            await migrate_tables([cluster.url(OWNER)])
            await measure(cluster.url(SERVICE), rounds, batch)
        finally:
            server.stop()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:])))
