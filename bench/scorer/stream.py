"""The way over Kafka: `scores.requested` to `predictions.made`, the broker on the same cores."""

import asyncio
import time
from dataclasses import dataclass
from uuid import UUID

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError

from bench.scorer.model import Known
from bench.scorer.servers import MODEL, Mesh
from mojomesh_contracts.events import PredictionsMade, ScoreRequested
from tests.scorer.making import records_of

BATCH = 5_000
GROUP = f"scorer.{ScoreRequested.topic.name}"


@dataclass(frozen=True)
class Streamed:
    messages_per_s: float
    limit_per_s: float
    """What one aiokafka consumer reads of the same topic when it does nothing with it."""
    cpu_us: float
    """CPU time of the scorer, per message."""
    broker_cpu_us: float
    wrong: int
    """Predictions whose score is not to the last bit what it must be, and requests without one."""


async def measure_stream(mesh: Mesh, known: Known, n: int) -> Streamed:
    """Put `n` requests into an empty topic, start a scorer, and wait until it has predicted all of them.

    Time counts from the first block handled, so that the scorer's own start is left out.
    """
    rows = known.trained.rows
    ids: dict[UUID, float] = {}
    for first in range(0, n, BATCH):
        requests = [
            ScoreRequested(event_id=UUID(int=number + 1), model=MODEL, entity_id=f"F{number}", values=rows[number % len(rows)])
            for number in range(first, min(n, first + BATCH))
        ]
        ids |= {request.derive_id("prediction"): known.scores[(first + place) % len(rows)] for place, request in enumerate(requests)}
        await mesh.registry.publisher.publish(requests)
    limit = await _only_consuming(mesh.kafka, n)
    admin = AIOKafkaAdminClient(bootstrap_servers=mesh.kafka)
    await admin.start()
    try:
        async with mesh.scorer("streaming") as (serving, _):
            while not (first := await _handled(admin)):
                await asyncio.sleep(0.01)
            started, cpu, broker = time.perf_counter(), serving.cpu_s(), mesh.broker_cpu_s()
            while (done := await _handled(admin)) < n:
                await asyncio.sleep(0.02)
            seconds = time.perf_counter() - started
            cpu, broker = serving.cpu_s() - cpu, mesh.broker_cpu_s() - broker
    finally:
        await admin.close()
    counted = done - first
    return Streamed(counted / seconds, limit, cpu / counted * 1e6, broker / counted * 1e6, await _wrong(mesh.kafka, ids))


async def _handled(admin: AIOKafkaAdminClient) -> int:
    """Requests whose predictions Kafka has: offsets are committed after that."""
    try:
        return sum(found.offset for found in (await admin.list_consumer_group_offsets(GROUP)).values())
    except GroupCoordinatorNotAvailableError:  # nobody has joined a group yet
        return 0


async def _only_consuming(kafka: str, n: int) -> float:
    consumer = AIOKafkaConsumer(ScoreRequested.topic.name, bootstrap_servers=kafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        started, read = time.perf_counter(), 0
        while read < n:
            read += sum(len(records) for records in (await consumer.getmany(timeout_ms=100, max_records=500)).values())
        return n / (time.perf_counter() - started)
    finally:
        await consumer.stop()


async def _wrong(kafka: str, expected: dict[UUID, float]) -> int:
    missing, n_wrong = dict(expected), 0
    async with records_of(kafka, PredictionsMade.topic.name) as records:
        ends = await records.end_offsets(records.assignment())
        while any([await records.position(partition) < end for partition, end in ends.items()]):
            for found in (await records.getmany(timeout_ms=100)).values():
                for record in found:
                    for prediction in PredictionsMade.model_validate_json(record.value).predictions:
                        score = missing.pop(prediction.prediction_id, None)
                        n_wrong += score is not None and prediction.scores[-1] != score
    return n_wrong + len(missing)
