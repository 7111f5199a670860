"""Shadows: versions that score what the champion answered, later and aside, and are only counted."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter

from mojomesh_chassis.errors import MeshError
from mojomesh_chassis.publishing import Publisher
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.events import ShadowCompared
from mojomesh_scorer.encoding import Matrix, recoder
from mojomesh_scorer.models import LoadedModel, stand_back

PAUSE_S = 0.05  # so that a block is worth a thread's turn
SLICE_ROWS = 256  # to make an array of so many rows holds Python's lock for some 0.2 ms, and requests wait as long

_DROPPED = Counter("mojomesh_scorer_shadow_rows_dropped_total", "Rows that shadows had no time to score")

Rows = list[list[float]]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """What a shadow made of a block of rows."""

    n_rows: int
    counts: Counts
    shadow_counts: Counts
    sum_of_differences: float
    n_agreed: int


class Comparison:
    """One worker's counting of one shadow against one champion."""

    def __init__(self, champion: LoadedModel, shadow: LoadedModel) -> None:
        self.n_dropped = 0
        self.n_rows = 0
        self.n_published = 0
        self._champion = champion
        self._shadow = shadow
        self._recode = recoder(champion.schema, shadow.schema)
        self._counter = uuid4()
        self._counts = self._count(np.empty(0))
        self._shadow_counts = self._counts.copy()
        self._sum_of_differences = 0.0
        self._n_agreed = 0

    def score(self, inputs: Rows, scores: Rows) -> Outcome:
        """Score what the champion scored; changes nothing, so any thread may."""
        champion = np.array(scores)
        shadow = self._shadow.score_aside(self._recode(np.array(inputs)))
        one, other = watched(champion), watched(shadow)
        return Outcome(
            n_rows=len(inputs),
            counts=self._count(one),
            shadow_counts=self._count(other),
            sum_of_differences=float(np.abs(one - other).sum()),
            n_agreed=int((champion.argmax(axis=1) == shadow.argmax(axis=1)).sum()),
        )

    def add(self, outcome: Outcome) -> None:
        """Count."""
        self.n_rows += outcome.n_rows
        self._counts += outcome.counts
        self._shadow_counts += outcome.shadow_counts
        self._sum_of_differences += outcome.sum_of_differences
        self._n_agreed += outcome.n_agreed

    def event(self) -> ShadowCompared:
        """All that was counted."""
        return ShadowCompared(
            event_id=uuid4(),
            model=self._champion.name,
            version=self._champion.version,
            shadow_version=self._shadow.version,
            counter=self._counter,
            counted_at=datetime.now(UTC),
            n_rows=self.n_rows,
            n_dropped=self.n_dropped,
            edges=self._champion.score_edges,
            counts=self._counts.tolist(),
            shadow_counts=self._shadow_counts.tolist(),
            sum_of_differences=self._sum_of_differences,
            n_agreed=self._n_agreed if self._champion.schema.classes else None,
        )

    def _count(self, scores: NDArray[np.float64]) -> Counts:
        edges = self._champion.score_edges
        bins = np.where(np.isnan(scores), len(edges) + 1, np.searchsorted(edges, scores))
        return np.bincount(bins, minlength=len(edges) + 2)


def watched(scores: Matrix) -> NDArray[np.float64]:
    """The one number of each row, as `drift.score_of`."""
    column: NDArray[np.float64] = scores[:, -1] if scores.shape[1] <= 2 else scores.max(axis=1)
    return column


@dataclass(frozen=True)
class _Answered:
    champion: LoadedModel
    shadows: Sequence[LoadedModel]
    inputs: Rows
    scores: Rows


class Shadowing:
    """A bounded queue of answered rows, drained by one thread that stands back; rows that come to a full one are dropped, and counted."""

    def __init__(self, publisher: Publisher, max_waiting: int, every_s: float) -> None:
        self.n_waiting = 0
        self._publisher = publisher
        self._max_waiting = max_waiting
        self._every_s = every_s
        self._waiting: list[_Answered] = []
        self._any = asyncio.Event()
        self._comparisons: dict[tuple[LoadedModel, LoadedModel], Comparison] = {}
        self._scorer = ThreadPoolExecutor(1, "shadows", stand_back)

    def add(self, champion: LoadedModel, shadows: Sequence[LoadedModel], inputs: Rows, scores: Rows) -> None:
        """Have the shadows score rows that the champion has scored."""
        if self.n_waiting + len(inputs) > self._max_waiting:
            _DROPPED.inc(len(inputs))
            for shadow in shadows:
                self._comparison(champion, shadow).n_dropped += len(inputs)
            return
        self.n_waiting += len(inputs)
        self._waiting.append(_Answered(champion, shadows, inputs, scores))
        self._any.set()

    async def compare(self) -> None:
        """Score what waits, block after block, for ever."""
        while True:
            await self._any.wait()
            await asyncio.sleep(PAUSE_S)
            await self._compare_waiting()

    async def publish(self) -> None:
        """Tell of the counts again and again, for ever; they only grow, so one that Kafka does not take is no loss."""
        while True:
            await asyncio.sleep(self._every_s)
            await self._publish_counts()

    async def close(self) -> None:
        """Score what waits, and tell."""
        await self._compare_waiting()
        await self._publish_counts()
        self._scorer.shutdown()

    async def _compare_waiting(self) -> None:
        self._any.clear()
        waiting, self._waiting = self._waiting, []
        blocks: dict[tuple[LoadedModel, LoadedModel], tuple[Rows, Rows]] = {}
        for one in waiting:
            for shadow in one.shadows:
                inputs, scores = blocks.setdefault((one.champion, shadow), ([], []))
                inputs += one.inputs
                scores += one.scores
        for pair, (inputs, scores) in blocks.items():
            comparison = self._comparison(*pair)
            for start in range(0, len(inputs), SLICE_ROWS):
                slices = inputs[start : start + SLICE_ROWS], scores[start : start + SLICE_ROWS]
                comparison.add(await asyncio.get_running_loop().run_in_executor(self._scorer, comparison.score, *slices))
        self.n_waiting -= sum(len(one.inputs) for one in waiting)

    async def _publish_counts(self) -> None:
        if not self.n_waiting:  # who counted nothing since the last time may be a pair of former days; should it come again, it counts anew
            self._comparisons = {pair: one for pair, one in self._comparisons.items() if one.n_rows > one.n_published}
        told = [(one, one.n_rows, one.event()) for one in self._comparisons.values() if one.n_rows > one.n_published]
        try:
            async with asyncio.timeout(self._every_s):
                await self._publisher.publish([event for _, _, event in told])
        except (MeshError, TimeoutError) as error:
            log.warning("shadows_not_told", reason=str(error))
            return
        for one, n_rows, _ in told:
            one.n_published = n_rows

    def _comparison(self, champion: LoadedModel, shadow: LoadedModel) -> Comparison:
        if (known := self._comparisons.get((champion, shadow))) is None:
            known = self._comparisons[champion, shadow] = Comparison(champion, shadow)
        return known


@asynccontextmanager
async def open_shadowing(publisher: Publisher, max_waiting: int, every_s: float) -> AsyncIterator[Shadowing]:
    """Shadows that score while this is open."""
    shadowing = Shadowing(publisher, max_waiting, every_s)
    tasks = [asyncio.create_task(shadowing.compare()), asyncio.create_task(shadowing.publish())]
    try:
        yield shadowing
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await shadowing.close()
