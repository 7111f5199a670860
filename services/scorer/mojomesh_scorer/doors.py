"""What every door of a worker has: the core, and the receipts."""

from dataclasses import dataclass

from fastapi import Request

from mojomesh_scorer.receipts import Receipts
from mojomesh_scorer.scoring import Scored, Scoring


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
            self.receipts.add(scored)


def doors_of(request: Request) -> Doors:
    """The worker's doors, for routes."""
    doors: Doors = request.state.doors
    return doors
