"""Events of a shard that is away wait in a partition of that shard's own, so that the others go on (docs/decisions/0016-shards.md)."""

import asyncio
import time
from collections.abc import Sequence

from prometheus_client import Counter

from mojomesh_chassis.consuming import Follower
from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.events import Arrival, EventParked
from mojomesh_ingest.reading import event_of
from mojomesh_store.shards import Shard

_PARKED = Counter("mojomesh_events_parked_total", "Events that their shard did not take when they came", ["shard"])

FEW = 5_000  # a queue as short as this is worth waiting for until it is empty
WAIT_S = 0.5
WAIT_EVERY_S = 5.0


class Parking(Follower):
    """The queues of events that wait for their shards."""

    event = EventParked

    def __init__(self) -> None:
        self._handled: dict[int, int] = {}  # of each queue, when it was last looked at
        self._waited_at = -WAIT_EVERY_S
        self._n_placed = 0

    async def queues(self, n_placed: int) -> set[int]:
        """The partitions in which events wait; what comes for their shards must queue behind, or it would overtake.

        A short queue that is getting shorter is waited for, for a moment and not always: under a steady stream it would never be empty.

        Args:
            n_placed: On how many shards entities are placed now.

        Raises:
            TransientError: Kafka does not say; or entities are placed otherwise than before, and some wait where they were placed then.
        """
        assert self._followed is not None
        until = time.monotonic() + WAIT_S if time.monotonic() > self._waited_at + WAIT_EVERY_S else 0.0
        before = self._handled
        while True:
            found = await self._followed.left()
            waiting = {queue for queue, (handled, end) in found.items() if handled < end}
            short = {queue for queue in waiting if found[queue][1] - found[queue][0] <= FEW and found[queue][0] > before.get(queue, 0)}
            if not short or time.monotonic() >= until:
                break
            self._waited_at = time.monotonic()
            await asyncio.sleep(0.02)
        self._handled = {queue: handled for queue, (handled, _) in found.items()}
        if 0 < self._n_placed < n_placed and any(queue < self._n_placed for queue in waiting):
            raise TransientError("entities were moved, and events of theirs wait for the shard that they were on", retry_after_s=0.1)
        self._n_placed = n_placed
        return waiting

    def queue_of(self, shard: Shard) -> int:
        """The partition in which events wait for a shard; a thirteenth shard shares that of the first."""
        return shard.number % EventParked.topic.partitions

    def park(self, shard: Shard, events: Sequence[Arrival], error: BaseException | None) -> list[EventParked]:
        """What is to be published so that the events wait for their shard, because of `error` or because others wait already."""
        if error is not None:
            log.warning("shard_away", shard=shard.number, n_parked=len(events), reason=repr(error))
        _PARKED.labels(shard.number).inc(len(events))
        parked = map(event_of, events)
        return [EventParked.model_construct(event_id=event.derive_id("parked"), shard=shard.number, event=event) for event in parked]
