"""Receipts of predictions, written to Kafka off the hot path."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from uuid import uuid5

from opentelemetry import trace
from prometheus_client import Counter

from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_chassis.publishing import Publisher
from mojomesh_chassis.telemetry import links, log, tracer
from mojomesh_contracts.events import Prediction, PredictionsMade
from mojomesh_scorer.scoring import Scored

BLOCK_S = 0.05  # a killed worker loses at most these receipts, and those that are on their way: 100 ms
BLOCK_CELLS, BLOCK_ROWS = 20_000, 1_000  # most of a record; keeps it well under what the topic takes
MAX_WAITING = 100_000  # predictions whose receipts wait for Kafka; more are dropped, and counted
DURABLE_S = 10.0
CLOSE_S = 5.0

_DROPPED = Counter("mojomesh_scorer_receipts_dropped_total", "Predictions whose receipts were dropped because Kafka did not take them")


def blocks_of(scored: Sequence[Scored], replica: str) -> Iterator[PredictionsMade]:
    """The predictions as events, a block of one model version each; the id of a block follows from the ids in it."""
    for one in scored:
        predictions = _predictions(one)
        size = max(1, min(BLOCK_ROWS, BLOCK_CELLS // one.inputs.shape[1]))
        for start in range(0, len(predictions), size):
            block = predictions[start : start + size]
            yield PredictionsMade.model_construct(
                event_id=uuid5(block[0].prediction_id, "".join(prediction.prediction_id.hex for prediction in block)),
                model=one.model.name,
                version=one.model.version,
                bundle_digest=one.model.digest,
                replica=replica,
                predictions=block,
            )


def _predictions(scored: Scored) -> list[Prediction]:
    cells, scores = scored.inputs.tolist(), scored.scores.tolist()
    return [
        Prediction.model_construct(  # nothing to validate: all of it was made here
            prediction_id=scored.prediction_ids[n],
            entity_id=row.entity_id,
            event_time=row.event_time or scored.made_at,
            made_at=scored.made_at,
            inputs=[None if cell != cell else cell for cell in cells[n]],
            scores=scores[n],
            rows=found.used if found else [],
            request_id=row.request_id,
        )
        for n, (row, found) in enumerate(zip(scored.rows, scored.found, strict=True))
    ]


_Kept = tuple[Scored, trace.SpanContext]


class Receipts:
    """Gathers predictions and publishes them in blocks."""

    def __init__(self, publisher: Publisher, replica: str) -> None:
        self._publisher = publisher
        self._replica = replica
        self._waiting: list[_Kept] = []
        self._leaving: list[_Kept] = []
        self._n_waiting = 0
        self._any = asyncio.Event()

    def add(self, scored: Scored) -> None:
        """Keep the receipts for the next block, or drop them when too many wait."""
        if self._n_waiting + len(scored.rows) > MAX_WAITING:
            _DROPPED.inc(len(scored.rows))
            return
        self._n_waiting += len(scored.rows)
        self._waiting.append((scored, trace.get_current_span().get_span_context()))
        self._any.set()

    async def save(self, scored: Scored) -> None:
        """Publish the receipts now; returns when Kafka has them.

        Raises:
            TransientError: Kafka did not take them in time.
        """
        try:
            async with asyncio.timeout(DURABLE_S):
                await self._publisher.publish(list(blocks_of([scored], self._replica)))
        except TimeoutError:
            raise TransientError(f"Kafka did not take the receipt within {DURABLE_S:g} s") from None

    async def publish_blocks(self) -> None:
        """Publish what waits, block after block, for ever; a block that Kafka does not take is tried again."""
        while True:
            await self._any.wait()
            await asyncio.sleep(BLOCK_S)
            await self._publish_waiting()

    async def close(self) -> None:
        """Publish what still waits; what Kafka does not take in time is dropped, and counted."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._publish_waiting()
        if self._n_waiting:
            _DROPPED.inc(self._n_waiting)
            log.error("receipts_dropped", n=self._n_waiting)

    async def _publish_waiting(self) -> None:
        self._any.clear()
        self._leaving, self._waiting = self._leaving + self._waiting, []
        while self._leaving:
            try:
                with tracer.start_as_current_span("scorer receipts", links=links(context for _, context in self._leaving)):
                    await self._publisher.publish(list(blocks_of([scored for scored, _ in self._leaving], self._replica)))
            except TransientError as error:
                log.warning("receipts_wait", n=self._n_waiting, reason=str(error))
                await asyncio.sleep(error.retry_after_s)
                continue
            except PermanentError as error:
                log.error("receipts_dropped", reason=str(error))
                _DROPPED.inc(sum(len(scored.rows) for scored, _ in self._leaving))
            self._n_waiting -= sum(len(scored.rows) for scored, _ in self._leaving)
            self._leaving = []


@asynccontextmanager
async def open_receipts(publisher: Publisher, replica: str) -> AsyncIterator[Receipts]:
    """Receipts that are published while this is open, and to the last one when it closes."""
    receipts = Receipts(publisher, replica)
    publishing = asyncio.create_task(receipts.publish_blocks())
    try:
        yield receipts
    finally:
        publishing.cancel()
        with suppress(asyncio.CancelledError):
            await publishing
        await receipts.close()
