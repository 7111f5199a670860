"""Receipts of predictions, written to Kafka off the hot path."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from uuid import NAMESPACE_OID, uuid5

import orjson
from opentelemetry import trace
from prometheus_client import Counter

from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_chassis.publishing import EncodedEvent, Publisher
from mojomesh_chassis.telemetry import links, log, tracer
from mojomesh_contracts.events import PredictionsMade
from mojomesh_scorer.models import LoadedModel
from mojomesh_scorer.scoring import NO_ROW, Scored

BLOCK_S = 0.05  # a killed worker loses at most these receipts, and those that are on their way: 100 ms
BLOCK_CELLS, BLOCK_ROWS = 20_000, 1_000  # most of a record; keeps it well under what the topic takes
DURABLE_S = 10.0
CLOSE_S = 5.0

_DROPPED = Counter("mojomesh_scorer_receipts_dropped_total", "Predictions whose receipts were dropped because Kafka did not take them")


def blocks_of(scored: Iterable[Scored], replica: str) -> Iterator[EncodedEvent]:
    """The predictions as `PredictionsMade` events, as few as their size allows, each of one model version.

    A block's id follows from the ids in it. Written without a model an element, which would cost more than the prediction.
    """
    by_model: dict[LoadedModel, list[dict[str, object]]] = {}
    for one in scored:
        by_model.setdefault(one.model, []).extend(_predictions(one))
    for model, predictions in by_model.items():
        size = max(1, min(BLOCK_ROWS, BLOCK_CELLS // len(model.schema.columns)))
        for start in range(0, len(predictions), size):
            yield _block(model, predictions[start : start + size], replica)


def _block(model: LoadedModel, predictions: list[dict[str, object]], replica: str) -> EncodedEvent:
    event_id = uuid5(NAMESPACE_OID, "".join(str(prediction["prediction_id"]) for prediction in predictions))
    event = PredictionsMade.model_construct(
        event_id=event_id, model=model.name, version=model.version, bundle_digest=model.digest, replica=replica, predictions=[]
    )
    return EncodedEvent(event.topic, event_id, event.partition_key, orjson.dumps({**event.__dict__, "predictions": predictions}))


def _predictions(scored: Scored) -> Iterator[dict[str, object]]:
    made_at = scored.made_at.isoformat()
    for n, (prediction_id, inputs, scores) in enumerate(zip(scored.prediction_ids, scored.inputs, scored.scores, strict=True)):
        row = scored.rows[n] if scored.rows else NO_ROW
        prediction: dict[str, object] = {
            "prediction_id": prediction_id,
            "entity_id": row.entity_id,
            "event_time": row.event_time or made_at,
            "made_at": made_at,
            "inputs": inputs,  # a missing value is NaN here, and null in JSON
            "scores": scores,
        }
        if scored.found and (found := scored.found[n]):
            prediction["rows"] = [used.__dict__ for used in found.used]
        if row.request_id:
            prediction["request_id"] = row.request_id
        yield prediction


_Kept = tuple[Scored, trace.SpanContext]


class Receipts:
    """Gathers predictions and publishes them in blocks."""

    def __init__(self, publisher: Publisher, replica: str, max_waiting: int) -> None:
        self._publisher = publisher
        self._replica = replica
        self._max_waiting = max_waiting
        self._waiting: list[_Kept] = []
        self._leaving: list[_Kept] = []
        self._n_waiting = 0
        self._any = asyncio.Event()

    def add(self, scored: Scored) -> None:
        """Keep the receipts for the next block, or drop them when too many wait."""
        if self._n_waiting + len(scored.scores) > self._max_waiting:
            _DROPPED.inc(len(scored.scores))
            return
        self._n_waiting += len(scored.scores)
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
                _DROPPED.inc(sum(len(scored.scores) for scored, _ in self._leaving))
            self._n_waiting -= sum(len(scored.scores) for scored, _ in self._leaving)
            self._leaving = []


@asynccontextmanager
async def open_receipts(publisher: Publisher, replica: str, max_waiting: int) -> AsyncIterator[Receipts]:
    """Receipts that are published while this is open, and to the last one when it closes."""
    receipts = Receipts(publisher, replica, max_waiting)
    publishing = asyncio.create_task(receipts.publish_blocks())
    try:
        yield receipts
    finally:
        publishing.cancel()
        with suppress(asyncio.CancelledError):
            await publishing
        await receipts.close()
