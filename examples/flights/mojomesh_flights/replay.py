"""The year, told to the mesh as it happened: facts at a fixed pace, a question for each flight, and a clock held while a model trains."""

import asyncio
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import uuid5

import pyarrow.compute as pc

from mojomesh_chassis.publishing import Publisher, Record
from mojomesh_contracts.events import DriftDetected, EventReceived, ScoreRequested
from mojomesh_flights.dataset import NAMESPACE, WHOLE_YEAR, Fact, Year
from mojomesh_flights.errors import DemoFailed
from mojomesh_flights.listening import Listener, Offsets
from mojomesh_flights.load import MODEL, Asked
from mojomesh_flights.mesh import Mesh

TICK_S = 0.1
MOST_BEHIND = 4_000  # questions without an answer, at which the clock waits for the mesh: what is far behind is late to see drift
PATIENCE_S = 60.0
RECENT = 5_000  # flights that the HTTP load asks about


@dataclass(frozen=True)
class Plan:
    """What part of the year is replayed, and how fast."""

    train_until: datetime = datetime(2013, 5, 1, 4, tzinfo=UTC)  # midnight in New York
    until: datetime = WHOLE_YEAR
    history_pace: int = 12_000  # facts a second, before there is a model
    pace: int = 4_000  # facts a second after that
    load: int = 60  # HTTP requests a second
    swap_load: int = 300  # from the moment a version is ready until it serves; a swap takes a second or two, and many should see it
    drift: bool = True


@dataclass(frozen=True)
class Hold:
    """The clock stood still, since an alert had asked for a new version."""

    alert: DriftDetected
    event_ms: int
    seconds: float
    version: int | None
    outcome: str


class Replay:
    """Walks through the year once."""

    def __init__(self, year: Year, plan: Plan, publisher: Publisher, listener: Listener, offsets: Offsets) -> None:
        self._year, self._plan, self._publisher = year, plan, publisher
        self._listener, self._offsets = listener, offsets
        self._pending: list[Fact] = []
        self._flights: dict[str, int] = {entity_id: row for row, entity_id in enumerate(year.flights["entity_id"].to_pylist())}
        self._recent: list[Fact] = []
        self.n_published = 0
        self.n_bad = 0
        self.n_requested = 0
        self.event_ms = 0
        self.waited_s = 0.0
        self.holds: list[Hold] = []

    async def history(self) -> None:
        """The months before there is a model, and wait until they are stored."""
        await self._publish(0, self._position(self._plan.train_until), self._plan.history_pace)
        await self._offsets.stored()

    async def live(self, mesh: Mesh) -> None:
        """The rest of the year: each flight is asked about as soon as the mesh can know it; an alert holds the clock.

        Raises:
            DemoFailed: Questions stay without an answer.
        """
        start, stop = self._position(self._plan.train_until), self._year.facts.num_rows
        told = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._ask_when_stored(told))
            await self._publish(start, (start + stop) // 2, self._plan.pace, mesh)
            await self._publish_bad()
            await self._publish((start + stop) // 2, stop, self._plan.pace, mesh)
            told.set()
        await self._answered(mesh)
        await self._offsets.stored()

    def choose(self, chance: random.Random) -> Asked | None:
        """One of the flights that were asked about last, for the HTTP load."""
        if not self._recent:
            return None
        fact = self._recent[chance.randrange(len(self._recent))]
        return Asked(fact.entity_id, fact.event_time, lambda: self._columns(fact.entity_id))

    def _columns(self, entity_id: str) -> dict[str, object]:
        row: dict[str, object] = self._year.flights.slice(self._flights[entity_id], 1).to_pylist()[0]
        return {name: value for name, value in row.items() if name not in ("entity_id", "event_ms", "label_ms", "late")}

    def _position(self, at: datetime) -> int:
        return int(pc.sum(pc.less(self._year.facts["event_ms"], round(at.timestamp() * 1000))).as_py())

    @property
    def behind(self) -> int:
        """Questions without an answer."""
        return self.n_requested - self._listener.predictions.n_requested

    async def _publish(self, start: int, stop: int, pace: int, mesh: Mesh | None = None) -> None:
        """Publish the facts at positions [start, stop), `pace` a second by the wall clock, less the time it was held."""
        due = time.monotonic()
        a_tick = max(1, round(pace * TICK_S))
        for position in range(start, stop, a_tick):
            if mesh is not None:
                due += await self._hold(mesh) + await self._wait_for_mesh()
            facts = list(self._year.facts_from(position, min(position + a_tick, stop)))
            await self._publisher.send([_told(fact) for fact in facts])
            self.n_published += len(facts)
            self.event_ms = facts[-1].event_ms
            if mesh is not None:
                self._pending += [fact for fact in facts if fact.feature_set == "flights"]
            due += len(facts) / pace
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _publish_bad(self) -> None:
        bad = list(_bad_events())
        await self._publisher.send([Record(EventReceived.topic.name, b"bad", value, []) for value in bad])
        self.n_bad += len(bad)

    async def _ask_when_stored(self, told: asyncio.Event) -> None:
        """Ask about flights in blocks, each after its facts have become features: a client that asks earlier gets an older answer."""
        while self._pending or not told.is_set():
            facts, self._pending = self._pending, []
            if facts:
                await self._offsets.stored()
                await self._publisher.send([_question(fact) for fact in facts])
                self.n_requested += len(facts)
                self._recent = [*self._recent, *facts][-RECENT:]
            else:
                await asyncio.sleep(TICK_S)

    async def _hold(self, mesh: Mesh) -> float:
        """Hold the clock while the alerts that came since lead to new versions; returns for how many seconds."""
        started = time.monotonic()
        for alert in self._listener.alerts[len(self.holds) :]:
            since = time.monotonic()
            version, outcome = await mesh.retrained(alert)
            self.holds.append(Hold(alert, self.event_ms, time.monotonic() - since, version, outcome))
        return time.monotonic() - started

    async def _wait_for_mesh(self) -> float:
        """A fixed pace that the mesh cannot keep would only fill queues: wait until it has caught up; returns for how many seconds."""
        started = time.monotonic()
        while self.behind + len(self._pending) > MOST_BEHIND:
            await asyncio.sleep(TICK_S)
        waited = time.monotonic() - started
        self.waited_s += waited
        return waited

    async def _answered(self, mesh: Mesh) -> None:
        last, moved_at = self.behind, time.monotonic()
        while self.behind:
            await self._hold(mesh)
            await asyncio.sleep(TICK_S)
            if self.behind < last:
                last, moved_at = self.behind, time.monotonic()
            elif time.monotonic() - moved_at > PATIENCE_S:
                raise DemoFailed(
                    f"{self.behind} of {self.n_requested} questions have no answer after {PATIENCE_S:.0f} s; see `mojomesh dlt list`"
                )


def _told(fact: Fact) -> Record:
    return Record(EventReceived.topic.name, fact.entity_id.encode(), fact.json, [])


def _question(fact: Fact) -> Record:
    asked = ScoreRequested(
        event_id=uuid5(NAMESPACE, f"score/{fact.event_id}"),
        model=MODEL,
        entity_id=fact.entity_id,
        event_time=datetime.fromisoformat(fact.event_time),
    )
    return Record(asked.topic.name, asked.partition_key.encode(), asked.model_dump_json().encode(), [])


def _bad_events() -> Iterator[bytes]:
    """One event for each way to be wrong."""
    good = {"carrier": "UA", "origin": "EWR", "dest": "IAH", "hour": 5, "distance": 1400, "tailnum": "N14228"}
    now = datetime.now(UTC)
    for number, (feature_set, event_time, values) in enumerate(
        (
            ("flights", now, {**good, "hour": "five"}),
            ("flights", now, {**good, "gate": "B12"}),
            ("ferries", now, good),
            ("flights", now + timedelta(days=1), good),
        )
    ):
        body = {"event_id": str(uuid5(NAMESPACE, f"bad/{number}")), "feature_set": feature_set, "entity_id": f"bad-{number}"}
        yield json.dumps({**body, "event_time": event_time.isoformat(), "values": values}).encode()
    yield b"UA1545,EWR,IAH,517"
