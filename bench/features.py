"""How fast features answers, on this machine, for a year of flights: a snapshot, vectors for a scorer, receipts with drift.

    python bench/features.py [--flights 350000]

Starts its own PostgreSQL and Redis in a temporary folder. Prints seconds and rates.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.redis import open_redis
from mojomesh_contracts.definitions import parse_definitions
from mojomesh_contracts.events import EventReceived, FeatureValue, ModelPromoted, Prediction, PredictionsMade
from mojomesh_features.champions import Champions
from mojomesh_features.handlers import on_predictions_made
from mojomesh_features.reading import FeatureReader
from mojomesh_features.retiring import Retired
from mojomesh_features.snapshots import Snapshots, label_of
from mojomesh_local import ports
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, Cluster, Postgres
from mojomesh_local.processes import Server
from mojomesh_local.redis import Redis
from mojomesh_store import rows
from mojomesh_store.online import OnlineStore, microseconds
from mojomesh_store.shards import FeatureStore, open_feature_store
from mojomesh_store.vectors import plan_of

DEFINITIONS = """
kind: FeatureSet
name: flights
entity: flight_id
features: {carrier: {type: category}, origin: {type: category}, dest: {type: category}, hour: {type: number}, distance: {type: number}}
---
kind: FeatureSet
name: weather
entity: airport
features: {temp: {type: number}, humid: {type: number}, wind: {type: number}, visib: {type: number}}
---
kind: FeatureSet
name: arrivals
entity: flight_id
features: {late: {type: boolean}}
---
kind: Model
name: delay
spine: flights
label: {feature_set: arrivals, column: late, type: binary}
features: [{feature_set: flights}, {feature_set: weather, join: origin, max_age: 3h}]
algorithm: {name: gbm}
walk_forward: {n_windows: 2, train: expanding, test: 15d, step: 15d}
"""
START = datetime(2013, 1, 1, tzinfo=UTC)
YEAR_S = 365 * 86_400
AIRPORTS = ("EWR", "JFK", "LGA")


class NoBundles:
    """There are none: receipts are kept and counted, no window is measured."""

    async def of(self, _: ModelPromoted) -> None:
        return None


@contextmanager
def running(server: Server) -> Iterator[None]:
    child = server.start()
    try:
        yield
    finally:
        child.stop()


@contextmanager
def timed(what: str, n: int = 1) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    print(f"{what:<58}{seconds:8.2f} s" + (f"{n / seconds:12,.0f} /s" if n > 1 else ""))


@asynccontextmanager
async def servers(folder: Path) -> AsyncIterator[tuple[str, str]]:
    cluster = Cluster(ports.choose(), "bench")
    redis = Redis(folder / "redis", ports.choose(), "bench", folder / "redis.log")
    with running(Postgres(folder / "postgres", cluster, folder / "postgres.log").server), running(redis.server):
        cluster.create_database("bench")
        await migrate_tables([cluster.url(OWNER, "bench")])
        yield cluster.url(SERVICE, "bench"), redis.url


def event(feature_set: str, entity_id: str, seconds: float, **values: FeatureValue) -> EventReceived:
    at = START + timedelta(seconds=seconds)
    return EventReceived(event_id=uuid4(), feature_set=feature_set, entity_id=entity_id, event_time=at, values=values)


def a_year(n_flights: int) -> Iterator[EventReceived]:
    dice = random.Random(7)
    for hour in range(365 * 24):
        for airport in AIRPORTS:
            yield event("weather", airport, hour * 3600, temp=dice.random(), humid=dice.random(), wind=dice.random(), visib=dice.random())
    for n in range(n_flights):
        at = YEAR_S * n / n_flights
        origin = dice.choice(AIRPORTS)
        yield event("flights", f"F{n}", at, carrier="UA", origin=origin, dest="LAX", hour=n % 24, distance=dice.random())
        yield event("arrivals", f"F{n}", at + 3600, late=dice.random() < 0.2)


async def fill(store: FeatureStore, n_flights: int) -> int:
    events = list(a_year(n_flights))
    for begin in range(0, len(events), 5000):
        async with store.shards[0].begin() as db:
            await rows.append(db, events[begin : begin + 5000])
    return len(events)


def blocks(n: int, size: int) -> list[PredictionsMade]:
    made = [
        Prediction(
            prediction_id=uuid4(),
            entity_id=f"F{index}",
            event_time=START,
            made_at=START,
            inputs=[random.random() for _ in range(12)],
            scores=[0.5, 0.5],
        )
        for index in range(n)
    ]
    head = {"model": "delay", "version": 1, "bundle_digest": "x", "replica": "0"}
    return [PredictionsMade(event_id=uuid4(), predictions=made[begin : begin + size], **head) for begin in range(0, n, size)]


async def main(n_flights: int) -> None:
    definitions = Definitions(*parse_definitions(DEFINITIONS))
    model = definitions.model("delay")
    plan = plan_of(model, definitions)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with servers(folder) as (url, redis_url), open_feature_store([url]) as store, open_redis(redis_url) as redis:
            with timed("rows stored", 2 * n_flights + 26_280):
                await fill(store, n_flights)
            (folder / "objects").mkdir()
            snapshots = Snapshots(store, [url], open_objects((folder / "objects").as_uri()), folder / "work", "2GB")
            for _ in range(2):
                with timed(f"snapshot of {n_flights:,} flights, as many outcomes"):
                    await snapshots.take(plan, label_of(model.label, definitions), datetime.now(UTC) - timedelta(seconds=1))
            reader = FeatureReader(store, OnlineStore(redis), Retired())
            # In event-time order, as the demo asks; weather is older than the last rows kept, so PostgreSQL answers it too.
            asked = [(f"F{n}", microseconds(START) + 1_000_000 * int(YEAR_S * n / n_flights)) for n in range(20_000)]
            for size in (1, 100, 1000):
                for again in ("cold", "kept"):
                    some = asked[size * 3 : size * 3 + min(20 * size, 15_000)]
                    with timed(f"vectors, {size} a request, {again}", len(some)):
                        for begin in range(0, len(some), size):
                            await reader.vectors(plan, some[begin : begin + size])
            made = blocks(50_000, 50)
            champions = Champions()
            champions.put(
                ModelPromoted(
                    event_id=uuid4(),
                    model="delay",
                    version=1,
                    bundle_digest="x",
                    promotion=1,
                    promoted_at=START,
                    cause="gate",
                    caused_by=uuid4(),
                )
            )
            with timed("receipts kept and counted", 50_000):
                for begin in range(0, len(made), 200):
                    await on_predictions_made(made[begin : begin + 200], store.shards[0], champions, NoBundles(), definitions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flights", type=int, default=350_000)
    asyncio.run(main(parser.parse_args().flights))
