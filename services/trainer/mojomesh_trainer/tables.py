"""Training runs: rows with leases, so that a run survives any crash and is never run twice at once."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import DateTime, MetaData, Text, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from mojomesh_contracts.bundles import Cause

Json = dict[str, Any]
State = Literal["waiting", "running", "announcing", "succeeded", "failed", "skipped"]


class Base(DeclarativeBase):
    """Texts are Text, times know their zone."""

    metadata = MetaData(schema="trainer")
    type_annotation_map = {str: Text, datetime: DateTime(timezone=True), Json: JSONB, list[Json]: JSONB}  # noqa: RUF012


class Run(Base):
    """One training run. `announced` holds the events it ends with, as they are published, again on every redelivery of its cause."""

    __tablename__ = "runs"

    run_id: Mapped[UUID] = mapped_column(primary_key=True)
    model: Mapped[str]
    cause: Mapped[Json]
    state: Mapped[str]
    reason: Mapped[str | None]
    stage: Mapped[str | None]
    snapshot_time: Mapped[datetime | None]
    tries: Mapped[int]
    fold_runner: Mapped[str | None]
    pipeline_run: Mapped[str | None]
    bundle_digest: Mapped[str | None]
    announced: Mapped[list[Json]]
    leased_by: Mapped[str | None]
    leased_until: Mapped[datetime | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]


class LeaseLost(Exception):
    """The lease ran out and somebody else may have the run: whatever was being done for it is no longer wanted."""


async def open_run(db: AsyncSession, run_id: UUID, model: str, cause: Cause, snapshot_time: datetime | None) -> Run:
    """The run of that id, made if it is new; one caused by drift is skipped while another run of the model is under way."""
    await db.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"trainer.runs/{model}", 0))))
    known = await db.get(Run, run_id)
    if known is not None:
        return known
    busy = await db.scalar(select(Run.run_id).where(Run.model == model, Run.state.in_(["waiting", "running"])).limit(1))
    skipped = cause.kind == "drift" and busy is not None
    await db.execute(
        insert(Run).values(
            run_id=run_id,
            model=model,
            cause=cause.model_dump(mode="json"),
            state="skipped" if skipped else "waiting",
            reason=f"run {busy} of this model was under way already" if skipped else None,
            snapshot_time=snapshot_time,
            tries=0,
            announced=[],
            created_at=func.clock_timestamp(),
            ended_at=func.clock_timestamp() if skipped else None,
        )
    )
    return await db.get_one(Run, run_id)


async def lease_run(db: AsyncSession, replica: str, process: str, lease_s: float) -> Run | None:
    """Take the oldest run that nobody works on; None when there is none. What it was known at is fixed when it is first taken.

    A replica has one process, so a run that an earlier process of it left behind is free at once.
    """
    ours = Run.leased_by.startswith(f"{replica}/", autoescape=True)
    free = or_(Run.leased_until.is_(None), Run.leased_until < func.clock_timestamp(), ours)
    found = await db.scalar(
        select(Run)
        .where(Run.state.in_(["waiting", "running", "announcing"]), free)
        .order_by(Run.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if found is None:
        return None
    await db.execute(
        update(Run)
        .where(Run.run_id == found.run_id)
        .values(
            state="announcing" if found.state == "announcing" else "running",
            tries=Run.tries + 1,
            snapshot_time=func.coalesce(Run.snapshot_time, func.clock_timestamp()),
            started_at=func.coalesce(Run.started_at, func.clock_timestamp()),
            leased_by=f"{replica}/{process}",
            leased_until=_from_now(lease_s),
        )
    )
    await db.refresh(found)
    return found


async def save_run(db: AsyncSession, run: Run, lease_s: float, **values: Any) -> None:
    """Renew the lease, and keep `values` with it.

    Raises:
        LeaseLost: It is somebody else's now.
    """
    statement = update(Run).where(Run.run_id == run.run_id, Run.leased_by == run.leased_by, Run.leased_until >= func.clock_timestamp())
    kept = await db.scalar(statement.values(leased_until=_from_now(lease_s), **values).returning(Run.run_id))
    if kept is None:
        raise LeaseLost(str(run.run_id))


async def pause_run(db: AsyncSession, run: Run, wait_s: float, reason: str) -> None:
    """Put the run back for `wait_s`; that it was begun does not count, since it was not the run's fault.

    Raises:
        LeaseLost: It is somebody else's now.
    """
    state = "announcing" if run.announced else "waiting"
    await save_run(db, run, wait_s, leased_by=None, state=state, reason=reason, stage=None, tries=Run.tries - 1)


async def end_run(db: AsyncSession, run: Run, state: State, reason: str | None = None) -> None:
    """Give the run up for good.

    Raises:
        LeaseLost: It is somebody else's now.
    """
    await save_run(db, run, 0, state=state, reason=reason, stage=None, ended_at=func.clock_timestamp())


async def runs(db: AsyncSession, model: str | None, limit: int) -> Sequence[Run]:
    """Runs, newest first."""
    statement = select(Run).order_by(Run.created_at.desc()).limit(limit)
    return (await db.scalars(statement.where(Run.model == model) if model else statement)).all()


def _from_now(seconds: float) -> Any:
    return func.clock_timestamp() + text("make_interval(secs => :lease_s)").bindparams(lease_s=seconds)
