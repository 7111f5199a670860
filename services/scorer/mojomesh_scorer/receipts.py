"""Receipts of predictions, written to Kafka off the hot path."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
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
WARM = 32  # requests whose receipts are written together: more of them would have left the processor's cache, which costs ten times as much
DURABLE_S = 10.0
CLOSE_S = 5.0

_DROPPED = Counter("mojomesh_scorer_receipts_dropped_total", "Predictions whose receipts were dropped because Kafka did not take them")


@dataclass(frozen=True, slots=True)
class _Written:
    """Predictions of one model version as JSON, without the brackets of a list."""

    model: LoadedModel
    n: int
    ids: str
    text: bytes


def blocks_of(scored: Iterable[Scored], replica: str) -> Iterator[EncodedEvent]:
    """The predictions as `PredictionsMade` events, as few as their size allows, each of one model version.

    A block's id follows from the ids in it. Written without a model an element, which would cost more than the prediction.
    """
    return _blocks(_write(scored), replica)


def _write(scored: Iterable[Scored]) -> Iterator[_Written]:
    by_model: dict[LoadedModel, list[dict[str, object]]] = {}
    for one in scored:
        by_model.setdefault(one.model, []).extend(_predictions(one))
    for model, predictions in by_model.items():
        for start in range(0, len(predictions), size := _most_rows(model)):
            part = predictions[start : start + size]
            ids = "".join(str(prediction["prediction_id"]) for prediction in part)
            yield _Written(model, len(part), ids, orjson.dumps(part)[1:-1])


def _blocks(written: Iterable[_Written], replica: str) -> Iterator[EncodedEvent]:
    by_model: dict[LoadedModel, list[_Written]] = {}
    for one in written:
        parts = by_model.setdefault(one.model, [])
        if sum(part.n for part in parts) + one.n > _most_rows(one.model):
            yield _block(parts, replica)
            parts.clear()
        parts.append(one)
    for parts in by_model.values():
        yield _block(parts, replica)


def _most_rows(model: LoadedModel) -> int:
    return max(1, min(BLOCK_ROWS, BLOCK_CELLS // len(model.schema.columns)))


def _block(parts: Sequence[_Written], replica: str) -> EncodedEvent:
    model = parts[0].model
    event_id = uuid5(NAMESPACE_OID, "".join(part.ids for part in parts))
    event = PredictionsMade.model_construct(
        event_id=event_id, model=model.name, version=model.version, bundle_digest=model.digest, replica=replica, predictions=[]
    )
    predictions = orjson.Fragment(b"[%b]" % b",".join([part.text for part in parts]))
    return EncodedEvent(event.topic, event_id, event.partition_key, orjson.dumps({**event.__dict__, "predictions": predictions}))


def _predictions(scored: Scored) -> Iterator[dict[str, object]]:
    for n, (prediction_id, inputs, scores) in enumerate(zip(scored.prediction_ids, scored.inputs, scored.scores, strict=True)):
        row = scored.rows[n] if scored.rows else NO_ROW
        prediction: dict[str, object] = {
            "prediction_id": prediction_id,
            "entity_id": row.entity_id,
            "event_time": row.event_time or scored.made_at,
            "made_at": scored.made_at,
            "inputs": inputs,  # a missing value is NaN here, and null in JSON
            "scores": scores,
        }
        if scored.found and (found := scored.found[n]):
            prediction["rows"] = [used.__dict__ for used in found.used]
        if row.request_id:
            prediction["request_id"] = row.request_id
        yield prediction


class Receipts:
    """Gathers predictions and publishes them in blocks."""

    def __init__(self, publisher: Publisher, replica: str, max_waiting: int) -> None:
        self._publisher = publisher
        self._replica = replica
        self._max_waiting = max_waiting
        self._new: list[Scored] = []
        self._waiting: list[_Written] = []
        self._leaving: list[_Written] = []
        self._traced: list[trace.SpanContext] = []
        self._n_waiting = 0
        self._any = asyncio.Event()

    def add(self, scored: Scored, traced: trace.SpanContext | None = None) -> None:
        """Keep the receipts for the next block, which links to the trace, or drop them when too many wait."""
        if self._n_waiting + len(scored.scores) > self._max_waiting:
            _DROPPED.inc(len(scored.scores))
            return
        self._n_waiting += len(scored.scores)
        self._new.append(scored)
        if len(self._new) >= WARM:
            self._write_new()
        if traced:
            self._traced.append(traced)
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

    def _write_new(self) -> None:
        self._waiting += _write(self._new)
        self._new.clear()

    async def _publish_waiting(self) -> None:
        self._any.clear()
        self._write_new()
        self._leaving, self._waiting = self._leaving + self._waiting, []
        traced, self._traced = self._traced, []
        while self._leaving:
            try:
                with tracer.start_as_current_span("scorer receipts", links=links(traced)):
                    await self._publisher.publish(list(_blocks(self._leaving, self._replica)))
            except TransientError as error:
                log.warning("receipts_wait", n=self._n_waiting, reason=str(error))
                await asyncio.sleep(error.retry_after_s)
                continue
            except PermanentError as error:
                log.error("receipts_dropped", reason=str(error))
                _DROPPED.inc(sum(part.n for part in self._leaving))
            self._n_waiting -= sum(part.n for part in self._leaving)
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
