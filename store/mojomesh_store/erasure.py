"""Erasing an entity's rows, as the owner: the service role cannot. What snapshots must tell of it, everybody may read.

Of an erased row its id stays, as of one that left PostgreSQL: a replay of its event is not stored again. A later event of the same entity
is a new fact, and is.
"""

from collections.abc import Collection, Sequence
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_store.rows import RowId


async def known_from(db: AsyncSession, feature_set: str, entity_id: str) -> datetime | None:
    """When the oldest of an entity's rows that are in PostgreSQL became known."""
    found = await db.execute(
        text("SELECT min(created_at) FROM store.feature_rows WHERE feature_set = :set AND entity_id = :entity_id"),
        {"set": feature_set, "entity_id": entity_id},
    )
    time: datetime | None = found.scalar_one()
    return time


async def wait_turn(db: AsyncSession, feature_set: str) -> None:
    """Be the one who erases rows of the feature set, until this transaction ends: nobody else records the end of it."""
    lock = text("SELECT pg_advisory_xact_lock(hashtextextended('mojomesh.erase/' || :feature_set, 0))")
    await db.execute(lock, {"feature_set": feature_set})


async def record_begin(db: AsyncSession, feature_set: str, known_from: datetime) -> None:
    """Say for ever that snapshots of `known_from` and later are not what they were, until `record_end` says up to when."""
    await db.execute(
        text("INSERT INTO store.erasures (feature_set, known_from, erased_at) VALUES (:set, :known_from, 'infinity')"),
        {"set": feature_set, "known_from": known_from},
    )


async def record_end(db: AsyncSession, feature_set: str, erased_at: datetime) -> None:
    """Say that snapshots later than `erased_at` stay what they are, after whatever erasures have begun."""
    await db.execute(
        text("UPDATE store.erasures SET erased_at = :erased_at WHERE feature_set = :set AND erased_at = 'infinity'"),
        {"set": feature_set, "erased_at": erased_at},
    )


async def forget_rows(db: AsyncSession, feature_set: str, entity_id: str) -> int:
    """Erase an entity's rows and vectors from PostgreSQL; how many rows."""
    vectors = text("DELETE FROM store.embeddings WHERE starts_with(feature, :set || '.') AND entity_id = :entity_id")
    await db.execute(vectors, {"set": feature_set, "entity_id": entity_id})
    gone = await db.execute(
        text("""
            WITH gone AS (
                DELETE FROM store.feature_rows WHERE feature_set = :set AND entity_id = :entity_id
                RETURNING feature_set, event_time, event_id
            )
            INSERT INTO store.retired_events (feature_set, event_time, event_id, forgotten)
            SELECT feature_set, event_time, event_id, true FROM gone
            ON CONFLICT (feature_set, event_time, event_id) DO UPDATE SET forgotten = true
            RETURNING 1
        """),
        {"set": feature_set, "entity_id": entity_id},
    )
    n_rows = len(gone.all())
    moved = """
        DELETE FROM store.moved WHERE entity_id = :entity_id
            AND NOT EXISTS (SELECT FROM store.feature_rows AS row WHERE row.entity_id = moved.entity_id)
    """
    await db.execute(text(moved), {"entity_id": entity_id})
    return n_rows


async def forget_events(db: AsyncSession, keys: Sequence[RowId]) -> None:
    """Never store these events, whatever became of them so far."""
    if not keys:
        return
    feature_sets, event_times, event_ids = (list(column) for column in zip(*keys, strict=True))
    await db.execute(
        text("""
            INSERT INTO store.retired_events (feature_set, event_time, event_id, forgotten)
            SELECT DISTINCT feature_set, event_time, event_id, true
            FROM unnest(CAST(:feature_sets AS text[]), CAST(:event_times AS timestamptz[]), CAST(:event_ids AS uuid[]))
                AS gone (feature_set, event_time, event_id)
            ON CONFLICT (feature_set, event_time, event_id) DO UPDATE SET forgotten = true
        """),
        {"feature_sets": feature_sets, "event_times": event_times, "event_ids": event_ids},
    )


async def erasures(db: AsyncSession, feature_sets: Collection[str], snapshot_time: datetime) -> set[datetime]:
    """When rows of these feature sets were erased that had been known at `snapshot_time`, on this shard; now, if they still are being."""
    found = await db.scalars(
        text("""
            SELECT DISTINCT CASE WHEN erased_at = 'infinity' THEN now() ELSE erased_at END FROM store.erasures
            WHERE feature_set = ANY(:sets) AND known_from <= :time AND erased_at >= :time
        """),
        {"sets": list(feature_sets), "time": snapshot_time},
    )
    return set(found)
