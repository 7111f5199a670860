"""Definitions, snapshots, a trainer in this process or as one of its own, and a features and a registry that stand at its seams."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn
from fastapi import FastAPI, Request, Response
from sqlalchemy import text

from mojomesh_chassis.bundles import Bundle, fetch_bundle
from mojomesh_chassis.database import open_database
from mojomesh_chassis.objects import open_objects
from mojomesh_contracts.bundles import Column, SnapshotQuery, SnapshotTaken
from mojomesh_contracts.definitions import Model
from mojomesh_contracts.events import DefinitionApplied, DriftDetected, Event, ModelReady, TrainingRequested
from mojomesh_trainer.app import build
from mojomesh_trainer.folds import from_ms, plan_folds
from mojomesh_trainer.settings import TrainerSettings
from mojomesh_trainer.snapshots import Snapshot
from mojomesh_trainer.training import TrainingTask

AnyEvent = TypeVar("AnyEvent", bound=Event)

START = datetime(2013, 1, 1, tzinfo=UTC)
DAY_MS = 86_400_000
POLL_S = 0.2
COLUMNS = [
    Column(name="carrier", feature_set="flights", feature="carrier", type="category"),
    Column(name="distance", feature_set="flights", feature="distance", type="number"),
    Column(name="weather.temp", feature_set="weather", feature="temp", type="number"),
    Column(name="wet", feature_set="flights", feature="wet", type="boolean"),
]


def make_model(**changed: Any) -> Model:
    given: dict[str, Any] = {
        "name": "delay",
        "spine": "flights",
        "label": {"feature_set": "arrivals", "column": "late", "type": "binary"},
        "features": [{"feature_set": "flights"}, {"feature_set": "weather", "join": "origin", "max_age": "3h"}],
        "algorithm": {"name": "gbm", "params": {"ntrees": 5, "max_depth": 3, "seed": 7}},
        "walk_forward": {"n_windows": 2, "train": "expanding", "test": "15d", "step": "15d", "embargo": "1d"},
        "drift": {"window": 500},
    }
    return Model.model_validate(given | changed)


def make_snapshot(path: Path, n_rows: int = 3_000, days: int = 90, label: str = "binary") -> None:
    """Flights that are late when it is wet or far, told hours later; one carrier is rare, some values are missing."""
    rng = np.random.default_rng(1)
    event_ms = START.timestamp() * 1000 + np.sort(rng.integers(0, days * DAY_MS, n_rows))
    carriers = rng.choice(["AA", "B6", "UA", "9E"], n_rows, p=[0.4, 0.3, 0.29, 0.01]).astype(object)
    distance, wet = rng.normal(1000, 300, n_rows), rng.random(n_rows) < 0.3
    late = rng.random(n_rows) < 1 / (1 + np.exp(1.5 - 2 * wet - (distance > 1200) - (carriers == "UA")))
    carriers[rng.random(n_rows) < 0.02] = None
    labels = {"binary": late.astype(np.int64), "number": distance / 10 + 30 * late, "multiclass": np.where(wet, "wet", carriers == "UA")}
    columns = {
        "entity_id": [f"flight-{number}" for number in range(n_rows)],
        "event_time": event_ms.astype(np.int64),
        "label_time": (event_ms + rng.integers(2 * 3_600_000, 6 * 3_600_000, n_rows)).astype(np.int64),
        "label": labels[label],
        "carrier": carriers.tolist(),
        "distance": distance,
        "weather.temp": [None if gone else value for value, gone in zip(rng.normal(15, 8, n_rows), rng.random(n_rows) < 0.05, strict=True)],
        "wet": wet.astype(np.int8),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, compression="zstd")


def make_task(model: Model, snapshot: Path, h2o_url: str) -> TrainingTask:
    read = Snapshot.read(str(snapshot))
    first, last = (from_ms(int(end)) for end in (read.label_ms.min(), read.label_ms.max()))
    return TrainingTask(
        run_id=uuid4(),
        model=model,
        columns=COLUMNS,
        snapshot_url=str(snapshot),
        h2o_url=h2o_url,
        objects_url=snapshot.parent.as_uri(),
        plans=plan_folds(first, last, read.label_delay, model.walk_forward),
        results="runs/test",
        timeout_s=120,
    )


@dataclass
class Neighbours:
    """Features and registry as trainer sees them, over real HTTP, answering what the test says."""

    objects: Path
    champion: dict[str, Any] | None = None
    rows: dict[str, Any] = field(default_factory=dict)
    refusals: int = 0
    let_in: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[SnapshotQuery] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/snapshots")
        async def snapshots(query: SnapshotQuery) -> Any:
            if self.refusals:
                self.refusals -= 1
                return Response(status_code=503, content="{}")
            self.asked.append(query)
            await self.let_in.wait()
            days = self.rows.get("days", 90)
            path = f"snapshots/{query.model.name}-{days}.parquet"
            make_snapshot(self.objects / path, **self.rows)
            return SnapshotTaken(path=path, digest=f"{days:064}", n_rows=3_000, snapshot_time=query.snapshot_time, columns=COLUMNS)

        @app.get("/v1/models/{model}")
        async def model(model: str) -> dict[str, Any]:
            return {"model": model, "champion": self.champion}

        return app


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """The URL of an application at a port of its own."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await task


@asynccontextmanager
async def stumbling(h2o_url: str, failures: int) -> AsyncIterator[str]:
    """A way to H2O on which the first so many models are refused."""
    app = FastAPI()
    left = [failures]
    client = httpx.AsyncClient(base_url=h2o_url, trust_env=False, timeout=60)

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
    async def forward(path: str, request: Request) -> Response:
        if path.startswith("3/ModelBuilders/") and left[0]:
            left[0] -= 1
            return Response(status_code=400, content='{"exception_msg": "stumbled on purpose"}')
        headers = {"Content-Type": request.headers.get("Content-Type", "")}
        target = request.url.path if not request.url.query else f"{request.url.path}?{request.url.query}"
        answer = await client.request(request.method, target, content=await request.body(), headers=headers)
        return Response(answer.content, answer.status_code)

    async with client, serving(app) as url:
        yield url


@dataclass
class World:
    """The servers of one test, with the model `delay` declared, and what trainer has left there."""

    records: Any
    postgres: Any
    env: dict[str, str]
    neighbours: Neighbours
    folder: Path

    @property
    def settings(self) -> TrainerSettings:
        # Its own fields are named without the prefix when it is not the environment that names them.
        given = {name.removeprefix("TRAINER_").lower() if name.startswith("TRAINER_") else name: value for name, value in self.env.items()}
        return TrainerSettings.model_validate(given)

    async def define(self, **changed: Any) -> None:
        model = make_model(**changed)
        document = model.model_dump(mode="json")
        await self.records.publish(DefinitionApplied(event_id=uuid4(), definition_id=f"Model/{model.name}", version=1, definition=document))

    async def request(self, model: str = "delay") -> TrainingRequested:
        event = TrainingRequested(event_id=uuid4(), model=model, reason="a test", requested_at=datetime.now(UTC))
        await self.records.publish(event)
        return event

    async def alert(self) -> DriftDetected:
        event = DriftDetected(
            event_id=uuid4(),
            model="delay",
            version=1,
            feature="weather.temp",
            measure="psi",
            value=0.4,
            threshold=0.25,
            windows=3,
            window_from=START,
            window_to=START + timedelta(days=1),
        )
        await self.records.publish(event)
        return event

    async def heard(self, event: type[AnyEvent]) -> list[AnyEvent]:
        return [event.model_validate_json(record.value) for record in await self.records.read(event.topic.name)]

    async def until_heard(self, count: int) -> list[ModelReady]:
        """What was announced, as soon as so many runs have ended well."""
        async with open_database(self.postgres.owner_url) as database:
            while True:
                async with database.begin() as db:
                    if await db.scalar(text("SELECT count(*) FROM trainer.runs WHERE state = 'succeeded'")) >= count:
                        return await self.heard(ModelReady)
                await asyncio.sleep(POLL_S)

    async def run(self, run_id: UUID, *states: str) -> dict[str, Any]:
        """The run's row, as soon as it is in one of these states."""
        async with open_database(self.postgres.owner_url) as database:
            while True:
                async with database.begin() as db:
                    found = (await db.execute(text("SELECT * FROM trainer.runs WHERE run_id = :id"), {"id": run_id})).mappings().first()
                if found and found["state"] in (states or ("succeeded", "failed", "skipped")):
                    return dict(found)
                await asyncio.sleep(POLL_S)

    async def execute(self, statement: str) -> None:
        """As the owner."""
        async with open_database(self.postgres.owner_url) as database, database.begin() as db:
            await db.execute(text(statement))

    async def bundle(self, digest: str) -> Bundle:
        return await fetch_bundle(open_objects(self.settings.objects), digest, self.folder / "bundles", self.settings.public_key)

    def training(self, **changed: Any) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        """Trainer in this process; a client of its HTTP door."""
        return training(self.settings.model_copy(update=changed))


@asynccontextmanager
async def training(settings: TrainerSettings) -> AsyncIterator[httpx.AsyncClient]:
    app = build(settings)
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(app.router.lifespan_context(app))

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(state or {})}, receive, send)

        transport = httpx.ASGITransport(with_state)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://trainer"))


class Process:
    """A trainer in a process of its own, which tests kill at named points and start again."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._faults = folder / "faults"
        self._faults.mkdir(parents=True)
        self._url = f"http://127.0.0.1:{port}"
        self._env = os.environ | env | {"TRAINER_PORT": str(port), "MOJOMESH_FAULT": str(self._faults)}
        self._log = folder / "trainer.log"
        self._child: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Ready when this returns."""
        self._child = self._spawn()
        async with httpx.AsyncClient(trust_env=False) as client:
            while not await self._ready(client):
                assert self._child.poll() is None, self._log.read_text()
                await asyncio.sleep(0.05)

    def _spawn(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "mojomesh_trainer"], env=self._env, stdout=log, stderr=log)

    async def _ready(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self._url}/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    def arm(self, point: str) -> None:
        (self._faults / point).touch()

    async def died(self) -> None:
        """Wait until the armed point has killed it."""
        assert self._child is not None
        while self._child.poll() is None:
            await asyncio.sleep(0.05)
        assert self._child.returncode == -signal.SIGKILL, self._log.read_text()

    def stop(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()
