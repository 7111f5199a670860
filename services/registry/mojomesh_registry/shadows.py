"""What shadows made of rows that champions answered."""

from collections.abc import Sequence
from datetime import datetime

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_contracts.drift import psi
from mojomesh_contracts.events import ShadowCompared
from mojomesh_registry.tables import Shadow


class ShadowInfo(BaseModel):
    """A shadow beside a champion, over all workers and since the first row.

    `psi` is the distance of its scores' distribution from the champion's, over the bins between `edges`; `agreement` the share of rows of
    which both find the same class the likeliest, None when they predict a number.
    """

    version: int
    shadow_version: int
    n_rows: int
    n_dropped: int
    psi: float
    mean_absolute_difference: float
    agreement: float | None
    edges: list[float]
    counts: list[int]
    shadow_counts: list[int]
    counted_at: datetime


async def shadow_infos(db: AsyncSession, model: str) -> list[ShadowInfo]:
    """Every pair of champion and shadow that was compared, newest versions first."""
    pairs: dict[tuple[int, int], list[ShadowCompared]] = {}
    for document in await db.scalars(select(Shadow.event).where(Shadow.model == model)):
        event = ShadowCompared.model_validate(document)
        pairs.setdefault((event.version, event.shadow_version), []).append(event)
    return [_info(pairs[pair]) for pair in sorted(pairs, reverse=True)]


def _info(events: Sequence[ShadowCompared]) -> ShadowInfo:
    n_rows = sum(event.n_rows for event in events)
    agreed = [event.n_agreed for event in events if event.n_agreed is not None]
    counts, shadow_counts = _sums([event.counts for event in events]), _sums([event.shadow_counts for event in events])
    return ShadowInfo(
        version=events[0].version,
        shadow_version=events[0].shadow_version,
        n_rows=n_rows,
        n_dropped=sum(event.n_dropped for event in events),
        psi=psi(counts, shadow_counts),
        mean_absolute_difference=sum(event.sum_of_differences for event in events) / n_rows,
        agreement=sum(agreed) / n_rows if agreed else None,
        edges=events[0].edges,
        counts=counts,
        shadow_counts=shadow_counts,
        counted_at=max(event.counted_at for event in events),
    )


def _sums(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(of_bin) for of_bin in zip(*counts, strict=True)]
