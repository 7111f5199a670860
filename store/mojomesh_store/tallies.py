"""Counts of what came in, for the feature sets that something is expected of: written with the rows, so each row counts once.

A tally has the `created_at` of the rows it counts. Hence when a snapshot has passed, the tallies up to its time are all there are.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from uuid import UUID

import orjson
from sqlalchemy import text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

EXAMPLES = 5  # of a feature, in a tally and in what is made of several


@dataclass
class Odd:
    """Values of a feature that are not as expected."""

    n: int = 0
    reason: str = ""  # of the first
    event_ids: list[str] = field(default_factory=list)

    def add(self, n: int, reason: str, event_ids: list[str]) -> None:
        self.n += n
        self.reason = self.reason or reason
        self.event_ids = (self.event_ids + event_ids)[:EXAMPLES]


@dataclass
class Tally:
    """What came in of one feature set."""

    n_rows: int = 0
    n_held: int = 0
    newest_event_time: datetime | None = None
    missing: dict[str, int] = field(default_factory=dict)
    odd: dict[str, Odd] = field(default_factory=dict)

    def count_odd(self, problems: Mapping[str, str], event_id: UUID) -> None:
        """Count what is wrong with an event, by feature."""
        for feature, reason in problems.items():
            self.odd.setdefault(feature, Odd()).add(1, f"'{feature}' {reason}", [str(event_id)])

    def see(self, event_time: datetime | None) -> None:
        """Remember the newest event time."""
        if event_time is not None and (self.newest_event_time is None or event_time > self.newest_event_time):
            self.newest_event_time = event_time

    def add(self, other: "Tally") -> None:
        """Take in what another counted."""
        self.n_rows += other.n_rows
        self.n_held += other.n_held
        self.see(other.newest_event_time)
        for feature, n in other.missing.items():
            self.missing[feature] = self.missing.get(feature, 0) + n
        for feature, odd in other.odd.items():
            self.odd.setdefault(feature, Odd()).add(odd.n, odd.reason, odd.event_ids)


async def save(db: AsyncSession, tallies: Mapping[str, Tally], created_at: datetime) -> None:
    """Keep tallies by feature set, in the transaction that stores what they count, at its `write_time`."""
    if not tallies:
        return
    await db.execute(
        text("""
            INSERT INTO store.tallies (feature_set, created_at, n_rows, n_held, newest_event_time, missing, odd)
            VALUES (:feature_set, :created_at, :n_rows, :n_held, :newest, CAST(:missing AS jsonb), CAST(:odd AS jsonb))
        """),
        [
            {
                "feature_set": feature_set,
                "created_at": created_at,
                "n_rows": tally.n_rows,
                "n_held": tally.n_held,
                "newest": tally.newest_event_time,
                "missing": orjson.dumps(tally.missing).decode(),
                "odd": orjson.dumps({feature: asdict(odd) for feature, odd in tally.odd.items()}).decode(),
            }
            for feature_set, tally in tallies.items()
        ],
    )


async def counted(db: AsyncSession, feature_set: str, after: datetime, until: datetime) -> Tally:
    """What came in on this shard in (after, until], in all."""
    found = await db.execute(
        text("""
            SELECT n_rows, n_held, newest_event_time, missing, odd FROM store.tallies
            WHERE feature_set = :feature_set AND created_at > :after AND created_at <= :until ORDER BY created_at
        """).columns(missing=JSONB, odd=JSONB),
        {"feature_set": feature_set, "after": after, "until": until},
    )
    whole = Tally()
    for n_rows, n_held, newest, missing, odd in found:
        whole.add(Tally(n_rows, n_held, newest, missing, {feature: Odd(**about) for feature, about in odd.items()}))
    return whole


async def oldest(db: AsyncSession, feature_set: str) -> datetime | None:
    """When the first tally was taken that is still here."""
    found = await db.execute(text("SELECT min(created_at) FROM store.tallies WHERE feature_set = :set"), {"set": feature_set})
    time: datetime | None = found.scalar_one()
    return time


async def forget(db: AsyncSession, feature_set: str, until: datetime) -> None:
    """Drop what has been judged."""
    await db.execute(
        text("DELETE FROM store.tallies WHERE feature_set = :feature_set AND created_at <= :until"),
        {"feature_set": feature_set, "until": until},
    )
