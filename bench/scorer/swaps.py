"""What requests feel of a swap: 1,000 a second, while one version after the other is verified, probed, loaded and committed."""

import asyncio
import csv
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.scorer.load import steady_load
from bench.scorer.model import Known
from bench.scorer.servers import MODEL, Mesh, Serving
from mojomesh_contracts.events import ModelDeployed
from tests.scorer.making import records_of

RATE = 1000
CALM_S = 1.0


@dataclass(frozen=True)
class Swapped:
    before_p99_ms: float
    during_p99_ms: list[float]
    """Of the requests that were due between a promotion and its certificate."""
    took_ms: list[float]
    failed: int
    """Answers that were not 200, and requests that failed by the scorer's own count."""


async def measure_swaps(mesh: Mesh, serving: Serving, known: Known, bodies: Path, n: int, before_s: float) -> Swapped:
    """`n` swaps with calm between them; the versions score alike, and each bundle is a new one."""
    digests = [await mesh.registry.store(known.trained, MODEL) for _ in range(n)]
    table = mesh.folder / "swaps.csv"
    spans: list[tuple[float, float]] = []
    failed = 0
    async with records_of(mesh.kafka, ModelDeployed.topic.name) as certificates, steady_load(serving, bodies, RATE, table) as began:
        await asyncio.sleep(before_s)
        for number, digest in enumerate(digests):
            promoted = await mesh.registry.promote(MODEL, 100 + number, digest)
            begun = time.time()
            while True:
                certificate = ModelDeployed.model_validate_json((await certificates.getone()).value)
                if certificate.version == promoted.version:
                    break
            assert certificate.succeeded, certificate.reason
            failed += certificate.failed_requests
            spans.append((begun, time.time()))
            await asyncio.sleep(CALM_S)
    with table.open() as file:
        answers = list(csv.DictReader(file))
    due = np.array([float(answer["request-start"]) for answer in answers]) + began
    took = np.array([float(answer["request-duration"]) for answer in answers]) * 1000
    calm = (due > spans[0][0] - before_s + 1) & (due < spans[0][0])
    return Swapped(
        float(np.percentile(took[calm], 99)),
        [float(np.percentile(took[(due >= begun) & (due <= ended)], 99)) for begun, ended in spans],
        [(ended - begun) * 1000 for begun, ended in spans],
        failed + sum(answer["status"] != "200" for answer in answers),
    )
