"""The manifest of sealed segments, on the shard whose rows they hold.

A segment holds every row of one feature set that was created in (follows, created_until], and only those. The segments of a set follow
each other without a gap; what was created after the last is the unsealed tail and lies in `store.feature_rows` only.
"""

from datetime import datetime
from typing import Any, NamedTuple

import orjson
from sqlalchemy import text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession


class Segment(NamedTuple):
    """One sealed file."""

    feature_set: str
    follows: datetime | None  # created_until of the segment before; None: this is the first
    created_until: datetime
    path: str  # key in the object store
    columns: dict[str, str]  # features that have a column of their own, with their types
    n_rows: int
    n_tied: int  # rows that a later seq of the same entity, event_time and created_at replaces
    sum_of_seqs: int  # with n_rows a checksum against PostgreSQL
    first_event_time: datetime
    last_event_time: datetime


_NAMES = ", ".join(Segment._fields)
_SAMPLE = 40_000  # rows of a whole segment that are looked at to say where it ends: it is a few per cent off


async def take_turn(db: AsyncSession, feature_set: str) -> bool:
    """Whether this transaction may seal the feature set; until it ends nobody else may."""
    lock = text("SELECT pg_try_advisory_xact_lock(hashtextextended('mojomesh.seal/' || :feature_set, 0))")
    return bool((await db.execute(lock, {"feature_set": feature_set})).scalar_one())


async def wait_turn(db: AsyncSession, feature_set: str) -> None:
    """Be the one who may seal the feature set, until this transaction ends."""
    lock = text("SELECT pg_advisory_xact_lock(hashtextextended('mojomesh.seal/' || :feature_set, 0))")
    await db.execute(lock, {"feature_set": feature_set})


async def sealed_until(db: AsyncSession, feature_set: str) -> datetime | None:
    """created_at up to which every row is sealed; None if none is."""
    found = await db.execute(text("SELECT max(created_until) FROM store.segments WHERE feature_set = :set"), {"set": feature_set})
    until: datetime | None = found.scalar_one()
    return until


async def unsealed(
    db: AsyncSession, feature_set: str, follows: datetime | None, watermark: datetime, enough: int
) -> tuple[int, datetime | None]:
    """Number and least created_at of the rows created in (follows, watermark]; of more than `enough` only of so many."""
    found = await db.execute(
        text("""
            SELECT count(*), min(created_at) FROM (
                SELECT created_at FROM store.feature_rows
                WHERE feature_set = :feature_set AND created_at <= :until AND created_at > :after
                LIMIT :enough
            ) AS rows
        """),
        await _extent(db, feature_set, follows, watermark) | {"enough": enough},
    )
    n_rows, oldest = found.one()
    return n_rows, oldest


async def cut(db: AsyncSession, feature_set: str, follows: datetime | None, watermark: datetime, most: int) -> datetime:
    """created_at, the end of a second or `watermark`, up to which about `most` rows at most were created after `follows`."""
    sampled = min(most, _SAMPLE)
    found = await db.execute(
        text("""
            SELECT date_bin('1 second', created_at, 'epoch') + interval '999999 us' FROM store.feature_rows TABLESAMPLE SYSTEM (:percent)
            WHERE feature_set = :feature_set AND created_at <= :until AND created_at > :after
            ORDER BY created_at OFFSET :before LIMIT 1
        """),
        await _extent(db, feature_set, follows, watermark) | {"percent": 100 * sampled / most, "before": sampled - 1},
    )
    return min(watermark, found.scalar_one_or_none() or watermark)


async def checksum(db: AsyncSession, feature_set: str, follows: datetime | None, until: datetime) -> tuple[int, int]:
    """Number and sum of seq of the rows created in (follows, until]: equal to a segment's only if it holds these rows."""
    found = await db.execute(
        text("""
            SELECT count(*), coalesce(sum(seq), 0)::bigint FROM store.feature_rows
            WHERE feature_set = :feature_set AND created_at <= :until AND created_at > :after
        """),
        await _extent(db, feature_set, follows, until),
    )
    n_rows, sum_of_seqs = found.one()
    return n_rows, sum_of_seqs


async def _extent(db: AsyncSession, feature_set: str, follows: datetime | None, until: datetime) -> dict[str, Any]:
    """What names the rows created in (follows, until].

    Where they begin is asked for on its own: told a value, the planner knows whether it is most of the rows or few, and reads a long tail
    from end to end, a short one by the index.
    """
    after = (await db.execute(text("SELECT greatest(:follows, counts_after) FROM store.shard"), {"follows": follows})).scalar_one()
    return {"feature_set": feature_set, "after": after, "until": until}


async def register(db: AsyncSession, segment: Segment) -> None:
    """Count the rows of `segment` as sealed, from the end of this transaction on."""
    values = segment._asdict() | {"columns": orjson.dumps(segment.columns).decode()}
    await db.execute(text(f"INSERT INTO store.segments ({_NAMES}) VALUES ({', '.join(f':{name}' for name in Segment._fields)})"), values)


async def segments_of(db: AsyncSession, feature_set: str) -> list[Segment]:
    """The segments of a feature set on this shard, oldest first."""
    listed = text(f"SELECT {_NAMES} FROM store.segments WHERE feature_set = :set ORDER BY created_until").columns(columns=JSONB)
    found = await db.execute(listed, {"set": feature_set})
    return [Segment(*row) for row in found]


async def correct(db: AsyncSession, segment: Segment) -> None:
    """Say what is in a segment from which an entity was erased; as the owner."""
    await db.execute(
        text("""
            UPDATE store.segments SET n_rows = :n_rows, n_tied = :n_tied, sum_of_seqs = :sum_of_seqs,
                first_event_time = :first_event_time, last_event_time = :last_event_time
            WHERE path = :path
        """),
        {name: value for name, value in segment._asdict().items() if name not in ("feature_set", "follows", "created_until", "columns")},
    )
