"""Rows that are sealed and old leave PostgreSQL; what reads at or after a time need stays.

A time is announced first: reads before it are refused from then on, by every process within `GRACE`. Rows go after that: all that are
older, but for each entity's last, so that a read at or after the time finds what it found before.
"""

from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

MONTHS_AHEAD = 2
GRACE = timedelta(minutes=5)  # several times what a process takes to look again at `retirements`
LOCK_TIMEOUT_MS = 200  # a waiting exclusive lock holds up readers and writers for at most this long


class Retirement(NamedTuple):
    """Of a feature set the rows before an event time are leaving, or have left."""

    feature_set: str
    before: datetime
    announced_at: datetime


async def take_turn(db: AsyncSession) -> bool:
    """Whether this transaction may change partitions; until it ends nobody else may, and no lock is waited for long."""
    await db.execute(text(f"SET LOCAL lock_timeout = {LOCK_TIMEOUT_MS}"))
    return bool((await db.execute(text("SELECT pg_try_advisory_xact_lock(hashtext('mojomesh.partitions'))"))).scalar_one())


async def wait_turn(db: AsyncSession) -> None:
    """Until this transaction ends nobody moves rows to other partitions or shards, or out of PostgreSQL."""
    await db.execute(text("SELECT pg_advisory_xact_lock(hashtext('mojomesh.partitions'))"))


async def add_partitions(db: AsyncSession, feature_set: str) -> None:
    """Give the feature set partitions of its own for this month and those ahead, unless it has rows among those of all sets already."""
    await db.execute(text("SELECT store.add_partitions(:set, :months)"), {"set": feature_set, "months": MONTHS_AHEAD})


async def announce(db: AsyncSession, feature_set: str, before: datetime) -> None:
    """Say that rows before an event time are to leave; an earlier time than was announced changes nothing."""
    await db.execute(text("SELECT store.announce_retirement(:set, :before)"), {"set": feature_set, "before": before})


async def retire(db: AsyncSession, feature_set: str, grace: timedelta = GRACE) -> int:
    """Take out what may leave, if it was announced `grace` ago; the number of rows. What is not sealed stays."""
    gone = await db.execute(text("SELECT store.retire(:set, :grace)"), {"set": feature_set, "grace": grace})
    return int(gone.scalar_one())


async def retirements(db: AsyncSession) -> list[Retirement]:
    """What was announced on this shard."""
    found = await db.execute(text("SELECT feature_set, before, announced_at FROM store.retired"))
    return [Retirement(*row) for row in found]
