"""What every door of a worker has: the core, and the receipts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import Request
from opentelemetry import trace

from mojomesh_scorer.errors import DeadlineMissed
from mojomesh_scorer.receipts import Receipts
from mojomesh_scorer.scoring import Scored, Scoring

MAX_JSON_BYTES = 2**20
MAX_BINARY_BYTES = 64 * 2**20
"""Most bytes of a request in JSON, and in binary tensors; a row of a hundred numbers has some 2,000 and 800."""


@dataclass
class Doors:
    """One worker's core behind its doors."""

    scoring: Scoring
    receipts: Receipts
    ready: bool = False

    async def keep_receipt(self, scored: Scored, durable: bool) -> None:
        """Leave the receipts for the next block, or, `durable`, wait until Kafka has them.

        Raises:
            TransientError: Kafka did not take them.
        """
        if durable:
            await self.receipts.save(scored)
        else:
            self.receipts.add(scored, trace.get_current_span().get_span_context())


@asynccontextmanager
async def within(timeout_s: float | None) -> AsyncIterator[None]:
    """Give up what is inside after a time; None gives it all it needs.

    Raises:
        DeadlineMissed: The time is over.
    """
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise DeadlineMissed(f"not answered within {timeout_s:g} s, as the request asks") from None


async def doors_of(request: Request) -> Doors:  # async, or FastAPI calls it in a thread: 0.1 ms
    """The worker's doors, for routes."""
    doors: Doors = request.state.doors
    return doors
