"""Writing and reading feature rows. What takes a session needs a transaction (read committed) and never commits it."""

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

import orjson
from sqlalchemy import BigInteger, TextClause, column, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.database import Database
from mojomesh_chassis.errors import TransientError
from mojomesh_contracts.events import Arrival, FeatureValue
from mojomesh_store.tables import FeatureRow, feature_rows

PASSAGE_TIMEOUT_MS = 200  # a waiting exclusive lock holds up new writers for at most this long
PASSAGE_TRIES = 100
PENDING_LIMIT_KB = 64 * 1024  # at which a writer empties GIN's list of pending entries itself, since nobody else did

RowId = tuple[str, datetime, UUID]
"""What makes a feature row unique: feature_set, event_time, event_id."""


def _reading_rows(sql: str) -> TextClause:
    return text(sql.replace("ROW_COLUMNS", ", ".join(f'row."{column.name}"' for column in feature_rows.c)))


# Rows are numbered in the order of their arrival, so that of two corrections in one batch the later wins. They are inserted in another,
# since two writers that insert the same keys in opposite orders deadlock. Mostly all of them are new, and then no second list comes back.
_INSERT = text("""
    WITH arrived AS MATERIALIZED (
        SELECT nextval('store.feature_row_seq') AS seq, row.*
        FROM unnest(
            CAST(:feature_sets AS text[]), CAST(:entity_ids AS text[]), CAST(:event_times AS timestamptz[]),
            CAST(:reported_ats AS timestamptz[]), CAST(:event_ids AS uuid[]), CAST(:vectors AS text[])
        ) WITH ORDINALITY AS row (feature_set, entity_id, event_time, reported_at, event_id, vector, n)
    ), new AS (
        INSERT INTO store.feature_rows (feature_set, entity_id, event_time, reported_at, created_at, seq, event_id, "values")
        SELECT feature_set, entity_id, event_time, coalesce(reported_at, :created_at), :created_at, seq, event_id, vector::jsonb
        FROM arrived
        WHERE NOT EXISTS (
            SELECT FROM store.retired_events AS gone
            WHERE (gone.feature_set, gone.event_time, gone.event_id) = (arrived.feature_set, arrived.event_time, arrived.event_id)
        )
        ORDER BY feature_set, event_time, event_id
        ON CONFLICT DO NOTHING
        RETURNING seq
    )
    SELECT (SELECT array_agg(seq ORDER BY n) FROM arrived), CASE WHEN count(*) < :n THEN coalesce(array_agg(seq), '{}') END FROM new
""")

_STORED = _reading_rows("""
    SELECT ROW_COLUMNS
    FROM unnest(CAST(:feature_sets AS text[]), CAST(:event_times AS timestamptz[]), CAST(:event_ids AS uuid[]))
        AS asked (feature_set, event_time, event_id)
    JOIN store.feature_rows AS row USING (feature_set, event_time, event_id)
""").columns(*feature_rows.c)

_SETTLED = text("""
    SELECT feature_set, event_time, event_id
    FROM unnest(CAST(:feature_sets AS text[]), CAST(:event_times AS timestamptz[]), CAST(:event_ids AS uuid[]))
        AS asked (feature_set, event_time, event_id)
    WHERE EXISTS (
        SELECT FROM store.feature_rows AS row
        WHERE (row.feature_set, row.event_time, row.event_id) = (asked.feature_set, asked.event_time, asked.event_id)
    ) OR EXISTS (
        SELECT FROM store.retired_events AS gone
        WHERE (gone.feature_set, gone.event_time, gone.event_id) = (asked.feature_set, asked.event_time, asked.event_id)
    )
""")

CLOCK = "greatest(clock_timestamp(), floor + interval '1 microsecond')"
"""In SQL, of `store.snapshot_floor`: the latest time a snapshot may have now."""

_CLOCK = text(f"SELECT {CLOCK} FROM store.snapshot_floor")

_LOCK = text("SELECT pg_advisory_xact_lock_shared(hashtext('mojomesh.snapshot')), set_config('gin_pending_list_limit', :limit, true)")

_LATEST = _reading_rows("""
    SELECT ROW_COLUMNS, asked.n
    FROM unnest(CAST(:entity_ids AS text[]), CAST(:ats AS timestamptz[])) WITH ORDINALITY AS asked (entity_id, at, n)
    CROSS JOIN LATERAL (
        SELECT * FROM store.feature_rows
        WHERE feature_set = :feature_set AND entity_id = asked.entity_id AND event_time <= asked.at AND created_at <= :snapshot_time
        ORDER BY event_time DESC, created_at DESC, seq DESC
        LIMIT 1
    ) AS row
""").columns(*feature_rows.c, column("n", BigInteger))

_NEWEST = _reading_rows("""
    SELECT ROW_COLUMNS, asked.n
    FROM unnest(CAST(:entity_ids AS text[])) WITH ORDINALITY AS asked (entity_id, n)
    CROSS JOIN LATERAL (
        SELECT * FROM store.feature_rows
        WHERE feature_set = :feature_set AND entity_id = asked.entity_id
        ORDER BY event_time DESC, created_at DESC, seq DESC
        LIMIT :limit
    ) AS row
    ORDER BY asked.n, row.event_time DESC, row.created_at DESC, row.seq DESC
""").columns(*feature_rows.c, column("n", BigInteger))


async def write_time(db: AsyncSession) -> datetime:
    """created_at for rows of this transaction, from now on protected from snapshots passing by until it ends."""
    await keep_snapshots_out(db)
    return await snapshot_clock(db)


async def keep_snapshots_out(db: AsyncSession) -> None:
    """Let no snapshot pass until this transaction of a writer ends.

    The clock is asked in a statement after this one: it must see the floor as it was left before the lock was given.
    """
    await db.execute(_LOCK, {"limit": str(PENDING_LIMIT_KB)})


async def append(db: AsyncSession, events: Sequence[Arrival]) -> list[FeatureRow]:
    """Store each event once; the stored row of every event, in their order, whether it is new or a repeat.

    Of events with one (feature_set, event_time, event_id) the first to be stored stays, whatever later ones say. A repeat of one whose row
    has left PostgreSQL has no row here.
    """
    return (await append_at(db, events, await write_time(db)))[0]


async def append_at(db: AsyncSession, events: Sequence[Arrival], created_at: datetime) -> tuple[list[FeatureRow], dict[RowId, FeatureRow]]:
    """`append` at the `write_time` of the transaction; the rows, and those of them that are new."""
    keys = [row_id(event) for event in events]
    firsts: dict[RowId, Arrival] = {}
    for key, event in zip(keys, events, strict=True):
        firsts.setdefault(key, event)
    new = await _insert(db, firsts, created_at)
    repeats = [key for key in firsts if key not in new]
    stored = new | await _rows_of(db, repeats) if repeats else new
    return [row for key in keys if (row := stored.get(key))], new


async def settled(db: AsyncSession, events: Sequence[Arrival]) -> set[RowId]:
    """Those of the events that are stored, or were and must not be again."""
    feature_sets, event_times, event_ids = (list(column) for column in zip(*map(row_id, events), strict=True))
    asked = {"feature_sets": feature_sets, "event_times": event_times, "event_ids": event_ids}
    return {(feature_set, event_time, event_id) for feature_set, event_time, event_id in await db.execute(_SETTLED, asked)}


async def latest(db: AsyncSession, feature_set: str, entity_id: str, at: datetime, snapshot_time: datetime) -> FeatureRow | None:
    """The row that was true of `entity_id` at event time `at`, as the mesh knew it at `snapshot_time`; both included.

    Of two rows with one event time the later known wins: it is a correction.
    """
    return (await latest_of_many(db, feature_set, [(entity_id, at)], snapshot_time))[0]


async def latest_of_many(
    db: AsyncSession, feature_set: str, asked: Sequence[tuple[str, datetime]], snapshot_time: datetime
) -> list[FeatureRow | None]:
    """`latest` for many pairs of entity and event time in one statement; the answers in their order."""
    found: list[FeatureRow | None] = [None] * len(asked)
    parameters = {"feature_set": feature_set, "snapshot_time": snapshot_time}
    parameters |= {"entity_ids": [entity_id for entity_id, _ in asked], "ats": [at for _, at in asked]}
    for *columns, n in await db.execute(_LATEST, parameters):
        found[n - 1] = FeatureRow(*columns)
    return found


async def newest_of_many(db: AsyncSession, feature_set: str, entity_ids: Sequence[str], limit: int) -> list[list[FeatureRow]]:
    """The newest rows of each entity, at most `limit`, newest first: corrections come before what they correct."""
    found: list[list[FeatureRow]] = [[] for _ in entity_ids]
    for *columns, n in await db.execute(_NEWEST, {"feature_set": feature_set, "entity_ids": list(entity_ids), "limit": limit}):
        found[n - 1].append(FeatureRow(*columns))
    return found


async def pass_snapshot(shard: Database, snapshot_time: datetime) -> None:
    """Make the rows with `created_at <= snapshot_time` the same for ever: when this returns none is on its way, and none will follow.

    Waits for the writers that are in their transaction, and leaves the time behind as a floor: later writes get a later time, even if
    the clock is stepped back.

    Raises:
        TransientError: Writers held their transactions open for all the tries.
    """
    for _ in range(PASSAGE_TRIES):
        async with shard.begin() as db:
            if await _floor_reaches(db, snapshot_time):
                return
            if await gets_past_writers(db):
                await db.execute(select(func.store.raise_snapshot_floor(snapshot_time)))
                return
        await asyncio.sleep(PASSAGE_TIMEOUT_MS / 4000)  # let the writers go who waited behind us
    raise TransientError("feature rows are being written without a pause; no snapshot could pass, try again")


async def empty_pending_lists(db: AsyncSession) -> int:
    """Put what writers left on GIN's lists of pending entries into the index, how many pages; 0 if somebody else is at it."""
    return int((await db.execute(text("SELECT store.empty_pending_lists()"))).scalar_one())


async def snapshot_clock(db: AsyncSession) -> datetime:
    """The latest time a snapshot may have now: the database's clock, or the floor's next tick where the clock was stepped back."""
    time: datetime = (await db.execute(_CLOCK)).scalar_one()
    return time


async def _insert(db: AsyncSession, events: dict[RowId, Arrival], created_at: datetime) -> dict[RowId, FeatureRow]:
    """Insert what is new; the new rows."""
    arrived = list(events.values())
    inserted = await db.execute(
        _INSERT,
        {
            "n": len(arrived),
            "created_at": created_at,
            "feature_sets": [event.feature_set for event in arrived],
            "entity_ids": [event.entity_id for event in arrived],
            "event_times": [event.event_time for event in arrived],
            "reported_ats": [event.reported_at for event in arrived],
            "event_ids": [event.event_id for event in arrived],
            "vectors": [_as_json(event.values) for event in arrived],
        },
    )
    seqs, some = inserted.one()
    new = seqs if some is None else set(some)
    return {
        key: FeatureRow(
            event.feature_set,
            event.entity_id,
            event.event_time,
            event.reported_at or created_at,
            created_at,
            seq,
            event.event_id,
            event.values,
        )
        for (key, event), seq in zip(events.items(), seqs, strict=True)
        if new is seqs or seq in new
    }


def _as_json(values: dict[str, FeatureValue]) -> str:
    try:
        return orjson.dumps(values).decode()
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(values)


async def _rows_of(db: AsyncSession, row_ids: Sequence[RowId]) -> dict[RowId, FeatureRow]:
    feature_sets, event_times, event_ids = (list(column) for column in zip(*row_ids, strict=True))
    found = await db.execute(_STORED, {"feature_sets": feature_sets, "event_times": event_times, "event_ids": event_ids})
    return {(row.feature_set, row.event_time, row.event_id): row for row in map(FeatureRow._make, found.all())}


def row_id(event: Arrival) -> RowId:
    """What the row of an event is known by."""
    return event.feature_set, event.event_time, event.event_id


async def _floor_reaches(db: AsyncSession, snapshot_time: datetime) -> bool:
    return bool((await db.execute(text("SELECT floor >= :time FROM store.snapshot_floor"), {"time": snapshot_time})).scalar_one())


async def gets_past_writers(db: AsyncSession) -> bool:
    """Whether all who write rows have committed; none of them begins until this transaction ends. False: it was rolled back."""
    await db.execute(text(f"SET LOCAL lock_timeout = {PASSAGE_TIMEOUT_MS}"))
    try:
        await db.execute(text("SELECT pg_advisory_xact_lock(hashtext('mojomesh.snapshot'))"))
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != "55P03":  # lock_not_available
            raise
        await db.rollback()
        return False
    return True
