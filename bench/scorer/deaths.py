"""How soon a killed worker is replaced, and requests over Kafka go on, under 1,000 requests a second over HTTP."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import psutil
from aiokafka import AIOKafkaConsumer

from bench.scorer.load import steady_load
from bench.scorer.model import Known
from bench.scorer.servers import MODEL, Mesh, Serving
from mojomesh_contracts.events import PredictionsMade, ScoreRequested
from tests.scorer.making import Scorer, records_of

RATE = 1000
EVERY_S = 5.0
N_REQUESTS = 200  # enough for every partition of the topic


@dataclass(frozen=True)
class Died:
    """Seconds from each kill."""

    back_s: list[float]
    """Until all workers listen again."""
    streaming_s: list[float]
    """Until the requests that were put on Kafka at that moment, on every partition, are predicted."""


async def measure_deaths(mesh: Mesh, serving: Serving, scorer: Scorer, known: Known, bodies: Path, n: int) -> Died:
    """Kill one worker after the other."""
    back_s, streaming_s = [], []
    async with (
        records_of(mesh.kafka, PredictionsMade.topic.name) as records,
        steady_load(serving, bodies, RATE, mesh.folder / "deaths.csv"),
    ):
        for number in range(n):
            await asyncio.sleep(EVERY_S)
            worker = scorer.workers()[number % 2]
            rows = known.trained.rows[:N_REQUESTS]
            requests = [ScoreRequested(event_id=uuid4(), model=MODEL, entity_id=f"F{place}", values=row) for place, row in enumerate(rows)]
            wanted = {request.derive_id("prediction") for request in requests}
            psutil.Process(worker.pid).kill()
            killed = time.monotonic()
            await mesh.registry.publisher.publish(requests)
            workers, streaming = await asyncio.gather(_all_listen(scorer, worker.pid), _predicted(records, wanted))
            back_s.append(workers - killed)
            streaming_s.append(streaming - killed)
    return Died(back_s, streaming_s)


async def _all_listen(scorer: Scorer, killed: int) -> float:
    while True:
        workers = (await scorer.admin.get("/admin/workers", headers=scorer.authorized)).json()
        if len(workers) == 2 and all(worker["open"] and worker["pid"] != killed for worker in workers):
            return time.monotonic()
        await asyncio.sleep(0.02)


async def _predicted(records: AIOKafkaConsumer, wanted: set[UUID]) -> float:
    missing = set(wanted)
    while missing:
        for found in (await records.getmany(timeout_ms=20)).values():
            for record in found:
                missing -= {prediction.prediction_id for prediction in PredictionsMade.model_validate_json(record.value).predictions}
    return time.monotonic()
