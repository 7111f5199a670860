"""Adding a shard while the mesh writes and reads: copy, fence, verify, switch, clean (docs/decisions/0016-shards.md).

Every step may be repeated, so whoever was killed at it begins again. All of it is the owner's.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.errors import Conflict, PermanentError, TransientError
from mojomesh_chassis.faults import fault
from mojomesh_chassis.telemetry import log
from mojomesh_store import rows
from mojomesh_store.shards import FeatureStore, Shard, ShardRouter

CHUNK = 10_000  # entities told to the server at once


TABLES = {
    "feature_rows": 'feature_set, entity_id, event_time, reported_at, created_at, seq, event_id, "values"',
    "embeddings": "feature, entity_id, event_time, created_at, seq, event_id, embedding",
}
"""What holds rows of entities, with its columns in their order."""


class Rebalanced(NamedTuple):
    """What was done."""

    added: list[int]  # numbers of shards
    copied: int  # rows
    cleaned: int  # rows that left the shards they were copied from
    left: int  # rows that will when they are sealed


class _State(NamedTuple):
    n_shards: int | None
    is_closed: bool


async def claim(store: FeatureStore) -> None:
    """Say on every shard on how many of them entities are placed: on all, or, where that was said before, on no more than so far.

    Raises:
        PermanentError: There were more shards before.
    """
    states = [await _state(shard) for shard in store.shards]
    n_shards = max((state.n_shards for state in states if state.n_shards), default=len(states))
    if n_shards > len(states):
        raise PermanentError(f"entities are placed on {n_shards} shards, and MOJOMESH_POSTGRES_OWNER names {len(states)}")
    for shard in store.shards:
        async with shard.begin() as db:
            await db.execute(text("UPDATE store.shard SET n_shards = :n WHERE n_shards IS NULL"), {"n": n_shards})


async def rebalance(store: FeatureStore) -> Rebalanced:
    """Place entities on all shards of `store`, which was opened as the owner, and clean up after those that moved.

    Raises:
        PermanentError: `mojomesh migrate` was not run with these shards, or a new one is not empty.
        Conflict: A copy differs from what it was made of; nothing was switched.
        TransientError: A shard is away, or its writers hold their transactions open; run it again.
    """
    added, copied = [], 0
    for number in range(1, len(store.shards)):
        if await _is_to_be_added(store.shards, number):
            copied += await _add(store.shards[:number], store.shards[number])
            added.append(number)
    cleaned = left = 0
    for shard in store.shards:
        gone, stayed = await _clean(shard)
        cleaned, left = cleaned + gone, left + stayed
    return Rebalanced(added, copied, cleaned, left)


async def _is_to_be_added(shards: Sequence[Shard], number: int) -> bool:
    states = [await _state(shard) for shard in shards[: number + 1]]
    if any(state.n_shards is None for state in states):
        raise PermanentError("run `mojomesh migrate` with all shards first: it notes on how many entities are placed so far")
    return states[number].is_closed or any((state.n_shards or 0) <= number for state in states)


async def _add(sources: Sequence[Shard], target: Shard) -> int:
    """Add one shard; how many rows it got."""
    router = ShardRouter(len(sources) + 1)
    async with AsyncExitStack() as stack:
        for source in sources:  # rows must not leave between copying and verifying
            held = await stack.enter_async_context(source.begin())
            await held.execute(text("SELECT pg_advisory_xact_lock(hashtext('mojomesh.partitions'))"))
        await _close(target)
        watermarks = []
        for source in sources:
            async with source.begin() as db:
                watermark = await rows.snapshot_clock(db)
            await rows.pass_snapshot(source, watermark)
            await _copy(source, target, router, None, watermark)
            watermarks.append(watermark)
            log.info("shard_copied", of=source.number, to=target.number)
        fault("store.after_copy")
        for shard in (target, *sources):
            await _set(shard, "next_n_shards = :n", target.number + 1)
        for source, watermark in zip(sources, watermarks, strict=True):  # what was written meanwhile
            await _copy(source, target, router, watermark, None)
        fault("store.after_fence")
        n_rows = await _verify(sources, target)
        # Readers first: what they find on either side is the same as long as nobody writes there.
        for shard in (target, *sources):
            await _set(shard, "n_shards = :n, next_n_shards = NULL", target.number + 1)
        fault("store.before_open")
        await _open(sources, target)
    return n_rows


async def _state(shard: Shard) -> _State:
    async with shard.begin() as db:
        return _State(*(await db.execute(text("SELECT n_shards, counts_after = 'infinity' FROM store.shard"))).one())


async def _close(target: Shard) -> None:
    """Let nothing on the shard count, so that it can be filled."""
    async with _past_writers(target) as db:
        has_rows = (await db.execute(text("SELECT EXISTS (SELECT FROM store.feature_rows)"))).scalar_one()
        if has_rows and not (await _state(target)).is_closed:
            raise PermanentError(f"shard {target.number} is to be added, and has rows already")
        await db.execute(text("UPDATE store.shard SET counts_after = 'infinity'"))


async def _set(shard: Shard, what: str, n: int) -> None:
    """Change how entities are placed, with no writer in between: who placed otherwise has committed, and nobody does after."""
    async with _past_writers(shard) as db:
        await db.execute(text(f"UPDATE store.shard SET {what}"), {"n": n})


async def _open(sources: Sequence[Shard], target: Shard) -> None:
    """Let the target be written: later than anything that was stored of its entities, and than any snapshot."""
    clocks = []
    for source in sources:
        async with source.begin() as db:
            clocks.append(await rows.snapshot_clock(db))
    async with _past_writers(target) as db:
        opened = max(*clocks, await rows.snapshot_clock(db))
        await db.execute(text("SELECT store.raise_snapshot_floor(:at)"), {"at": opened})
        await db.execute(text("UPDATE store.shard SET counts_after = :at WHERE counts_after = 'infinity'"), {"at": opened})


async def _copy(source: Shard, target: Shard, router: ShardRouter, after: datetime | None, until: datetime | None) -> None:
    """Copy what was created in (after, until] of the entities that belong on the target, and which events are gone."""
    created = "created_at > coalesce($1::timestamptz, '-infinity') AND created_at <= coalesce($2::timestamptz, 'infinity')"
    before = ShardRouter(target.number)  # what was copied from here to another shard earlier may still be here
    async with _connection(source) as reading, _connection(target) as writing:
        async with reading.transaction():
            moving: list[str] = []
            async for (entity_id,) in reading.cursor(
                f"SELECT DISTINCT entity_id FROM store.feature_rows WHERE {created}", after, until, prefetch=CHUNK
            ):
                if before.place(entity_id) == source.number and router.place(entity_id) == target.number:
                    moving.append(entity_id)
            await reading.execute("INSERT INTO store.moved SELECT unnest($1::text[]), $2 ON CONFLICT DO NOTHING", moving, router.n_shards)
        for made in await reading.fetch("SELECT feature, dimensions, operators FROM store.embedded"):
            await writing.execute("SELECT store.add_embeddings($1, $2, $3)", *made)
        for table, columns in TABLES.items():
            query = f"SELECT {columns} FROM store.{table} JOIN store.moved USING (entity_id) WHERE n_shards = $3 AND {created}"
            await _pipe(reading, writing, query, (after, until, router.n_shards), table)
        gone = "SELECT feature_set, event_time, event_id, forgotten FROM store.retired_events"
        await _pipe(reading, writing, gone, (), "retired_events")
        retired = await reading.fetch("SELECT feature_set, before, announced_at FROM store.retired")
        await writing.executemany("INSERT INTO store.retired VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", [tuple(row) for row in retired])


async def _pipe(reading: Any, writing: Any, query: str, arguments: tuple[Any, ...], table: str) -> None:
    """Insert what a query on one shard finds into a table of another, as it comes, unless it is there."""
    chunks: asyncio.Queue[bytes | None] = asyncio.Queue(maxsize=16)

    async def read() -> None:
        await reading.copy_from_query(query, *arguments, output=chunks.put, format="binary")
        await chunks.put(None)

    async def found() -> AsyncIterator[bytes]:
        while (chunk := await chunks.get()) is not None:
            yield chunk

    async with writing.transaction():
        await writing.execute(f"CREATE TEMPORARY TABLE arriving (LIKE store.{table}) ON COMMIT DROP")
        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            group.create_task(writing.copy_to_table("arriving", source=found(), format="binary"))
        await writing.execute(f"INSERT INTO store.{table} SELECT * FROM arriving ON CONFLICT DO NOTHING")


async def _verify(sources: Sequence[Shard], target: Shard) -> int:
    """Compare what was copied, by its number and a sum over all it holds, with the copies; the number of feature rows."""
    told = "count(*), coalesce(sum(hashtextextended(stored::text, 0)::numeric), 0) FROM store.{} AS stored"
    moved = "JOIN store.moved USING (entity_id) WHERE n_shards = :n"
    numbers = {}
    for table in TABLES:
        parts = [await _asked(source, f"{told.format(table)} {moved}", n=target.number + 1) for source in sources]
        copied = await _asked(target, told.format(table))
        if copied != tuple(map(sum, zip(*parts, strict=True))):
            raise Conflict(f"shard {target.number} has {copied[0]} {table}, copied of {parts}, or other ones; empty it and begin again")
        numbers[table] = int(copied[0])
    return numbers["feature_rows"]


async def _asked(shard: Shard, what: str, **parameters: int) -> tuple[Any, ...]:
    async with shard.begin() as db:
        await db.execute(text("SET LOCAL timezone = 'UTC'"))  # texts of times are compared
        return tuple((await db.execute(text(f"SELECT {what}"), parameters)).one())


async def _clean(shard: Shard) -> tuple[int, int]:
    """Take away what was copied from here and is sealed, or was itself a copy; how many rows went, and how many have to wait."""
    async with shard.begin() as db:
        gone = await db.execute(
            text("""
                DELETE FROM store.feature_rows AS row USING store.moved, store.shard
                WHERE row.entity_id = moved.entity_id AND created_at <= greatest(counts_after,
                    (SELECT max(created_until) FROM store.segments AS sealed WHERE sealed.feature_set = row.feature_set))
                RETURNING 1
            """)
        )
        n_gone = len(gone.all())
        none = "NOT EXISTS (SELECT FROM store.feature_rows AS row WHERE row.entity_id = moved.entity_id)"
        await db.execute(text(f"DELETE FROM store.embeddings USING store.moved WHERE embeddings.entity_id = moved.entity_id AND {none}"))
        await db.execute(text(f"DELETE FROM store.moved WHERE {none}"))
        left = await db.execute(text("SELECT count(*) FROM store.feature_rows JOIN store.moved USING (entity_id)"))
    return n_gone, int(left.scalar_one())


@asynccontextmanager
async def _past_writers(shard: Shard) -> AsyncIterator[AsyncSession]:
    """A transaction that no writer of rows is in, and none begins beside.

    Raises:
        TransientError: Writers held theirs open for all the tries.
    """
    for _ in range(rows.PASSAGE_TRIES):
        async with shard.begin() as db:
            if await rows.gets_past_writers(db):
                yield db
                return
        await asyncio.sleep(rows.PASSAGE_TIMEOUT_MS / 4000)
    raise TransientError(f"rows are being written on shard {shard.number} without a pause; run it again")


@asynccontextmanager
async def _connection(shard: Shard) -> AsyncIterator[Any]:
    """Asyncpg's own connection, which copies."""
    async with shard.engine.connect() as connection:
        yield (await connection.get_raw_connection()).driver_connection
