"""The manifest of sealed segments, on the shard whose rows they hold.

A segment holds every row of one feature set that was created in (follows, created_until], and only those. The segments of a set follow
each other without a gap; what was created after the last is the unsealed tail and lies in `store.feature_rows` only.
"""

from datetime import datetime
from typing import NamedTuple

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


class Unsealed(NamedTuple):
    """What of a feature set may be sealed, and the next segment of it."""

    n_rows: int
    oldest: datetime  # created_at of the oldest, to the second
    until: datetime  # created_at up to which the next segment should reach, so that it does not grow too large
    checksum: tuple[int, int]  # of the rows until then: their number and the sum of their seqs


_NAMES = ", ".join(Segment._fields)

_UNSEALED = text("""
    WITH seconds AS (
        SELECT date_bin('1 second', created_at, 'epoch') AS second, count(*) AS n, sum(seq) AS seqs FROM store.feature_rows
        WHERE feature_set = :feature_set AND created_at <= :watermark AND created_at > :after
        GROUP BY 1
    ), growing AS (
        SELECT *, sum(n) OVER (ORDER BY second) AS so_far FROM seconds
    ), next AS (
        SELECT second, n, seqs FROM growing WHERE so_far - n < :most
    )
    SELECT sum(n)::bigint, min(second),
        (SELECT CASE WHEN sum(n) < :most THEN :watermark ELSE least(:watermark, max(second) + interval '999999 us') END FROM next),
        (SELECT sum(n)::bigint FROM next), (SELECT sum(seqs)::bigint FROM next)
    FROM seconds HAVING count(*) > 0
""")


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


async def unsealed(db: AsyncSession, feature_set: str, follows: datetime | None, watermark: datetime, most: int) -> Unsealed | None:
    """The rows created in (follows, watermark], and where to cut so that a segment has little more than `most`; None if there are none."""
    # Asked for on its own: the planner, told a value, reads a long tail from end to end and not by its index.
    after = (await db.execute(text("SELECT greatest(:follows, counts_after) FROM store.shard"), {"follows": follows})).scalar_one()
    asked = {"feature_set": feature_set, "after": after, "watermark": watermark, "most": most}
    found = (await db.execute(_UNSEALED, asked)).one_or_none()
    if found is None:
        return None
    n_rows, oldest, until, *checksum = found
    return Unsealed(n_rows, oldest, until, tuple(checksum))


async def checksum(db: AsyncSession, feature_set: str, follows: datetime | None, until: datetime) -> tuple[int, int]:
    """Number and sum of seq of the rows created in (follows, until]: equal to a segment's only if it holds these rows."""
    found = await db.execute(
        text("""
            SELECT count(*), coalesce(sum(seq), 0)::bigint FROM store.feature_rows
            WHERE feature_set = :feature_set AND created_at <= :until
                AND created_at > (SELECT greatest(:follows, counts_after) FROM store.shard)
        """),
        {"feature_set": feature_set, "follows": follows, "until": until},
    )
    n_rows, sum_of_seqs = found.one()
    return n_rows, sum_of_seqs


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
