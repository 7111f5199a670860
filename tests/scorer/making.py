"""Bundles signed by a real key, stand-ins for registry and features, and whole scorers as child processes."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
import numpy as np
import psutil
import tritonclient.grpc.aio as triton
import uvicorn
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from tritonclient.utils import InferenceServerException

from mojomesh_chassis.bundles import publish_bundle, sign_bundle
from mojomesh_chassis.objects import Objects
from mojomesh_chassis.publishing import Publisher
from mojomesh_chassis.topics import declared_topics, ensure_topics
from mojomesh_contracts.bundles import (
    BASELINE_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MOJO_FILE,
    SCHEMA_FILE,
    Baseline,
    BundleSchema,
    Cause,
    Golden,
    GoldenRow,
    Manifest,
)
from mojomesh_contracts.definitions import Algorithm, FeatureSource, Label, Model, WalkForward
from mojomesh_contracts.events import Challenger, Event, Metrics, ModelPromoted, Prediction, PredictionsMade, TrafficSet
from mojomesh_local import ports
from mojomesh_local.processes import Child, Command, Server

Row = dict[str, Any]
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Trained:
    """A trained model: its MOJO and schema in a folder, rows as clients send them, and H2O's own scores of them."""

    folder: Path
    schema: BundleSchema
    rows: list[Row]
    scores: list[list[float]]

    def encode(self, row: Row) -> list[float | None]:
        """The row as a MOJO takes it, made here anew, so that the scorer's own encoding is not checked against itself."""
        cells: list[float | None] = []
        for column in self.schema.columns:
            value = row[column.name]
            if column.levels is not None:
                cells.append(float(column.levels.index(value)) if value in column.levels else None)
            else:
                cells.append(None if value is None else float(value))
        return cells

    def one_row_tensors(self, row: Row) -> list[dict[str, Any]]:
        """The row as the inputs of a V2 request in JSON; what is missing is left out."""
        kinds = {"category": "BYTES", "number": "FP64", "boolean": "BOOL"}
        return [
            {"name": column.name, "shape": [1], "datatype": kinds[column.type], "data": [row[column.name]]}
            for column in self.schema.columns
            if row[column.name] is not None
        ]


@dataclass(frozen=True)
class Keys:
    private: Path
    public: Path


def make_keys(folder: Path) -> Keys:
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    keys = Keys(folder / "signing.pem", folder / "public.pem")
    keys.private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    keys.public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return keys


def read_trained(home: Path) -> Trained:
    asked = json.loads((home / "asked.json").read_text())
    return Trained(home, BundleSchema.model_validate_json((home / SCHEMA_FILE).read_bytes()), asked["rows"], asked["scores"])


def make_manifest(model: str) -> Manifest:
    now = datetime(2013, 6, 1, tzinfo=UTC)
    day = timedelta(days=1)
    metrics = Metrics(n_rows=1000, auc=0.7)
    return Manifest(
        model=model,
        run_id=uuid4(),
        cause=Cause(kind="requested", event_id=uuid4(), reason="a test wants it"),
        definition=Model(
            name=model,
            spine="flights",
            label=Label(feature_set="arrivals", column="late", type="binary"),
            features=[FeatureSource(feature_set="flights")],
            algorithm=Algorithm(name="gbm"),
            walk_forward=WalkForward(n_windows=1, train="expanding", test=day, step=day),
        ),
        snapshot_time=now,
        snapshot_digest="0" * 64,
        snapshot_path="snapshots/none",
        n_rows=3000,
        train_from=now - 30 * day,
        train_to=now,
        folds=[],
        metrics=metrics,
        naive=metrics,
        parity=0.0,
        fold_runner="local",
        algorithm="gbm",
        params={},
        seed=42,
        pins={"h2o": "3.46.0.11"},
        created_at=now,
    )


def write_bundle(folder: Path, trained: Trained, model: str, keys: Keys, golden: Golden | None = None) -> Path:
    """A signed bundle of a trained model; `golden` replaces rows and scores as H2O gave them."""
    folder.mkdir(parents=True)
    (folder / MOJO_FILE).write_bytes((trained.folder / MOJO_FILE).read_bytes())
    true = [GoldenRow(inputs=trained.encode(row), scores=scores) for row, scores in zip(trained.rows[:20], trained.scores, strict=False)]
    (folder / SCHEMA_FILE).write_text(trained.schema.model_dump_json())
    (folder / BASELINE_FILE).write_text(Baseline(window=1000, bins=[]).model_dump_json())
    (folder / GOLDEN_FILE).write_text((golden or Golden(tolerance=TOLERANCE, rows=true)).model_dump_json())
    (folder / MANIFEST_FILE).write_text(make_manifest(model).model_dump_json())
    sign_bundle(folder, keys.private)
    return folder


@dataclass
class Registry:
    """Stands where the registry does: puts bundles into the object store and promotes them."""

    objects: Objects
    publisher: Publisher
    keys: Keys
    folder: Path
    _promotions: dict[str, int] = field(default_factory=dict)

    async def store(self, trained: Trained, model: str, golden: Golden | None = None) -> str:
        """Store a bundle; returns its digest."""
        return await publish_bundle(self.objects, write_bundle(self.folder / uuid4().hex, trained, model, self.keys, golden))

    async def promote(self, model: str, version: int, digest: str, promotion: int | None = None) -> ModelPromoted:
        """Announce a champion."""
        if promotion is None:
            promotion = self._promotions[model] = self._promotions.get(model, 0) + 1
        event = ModelPromoted(
            event_id=uuid4(),
            model=model,
            version=version,
            bundle_digest=digest,
            promotion=promotion,
            promoted_at=datetime.now(UTC),
            cause="hand",
            caused_by=uuid4(),
        )
        await self.publisher.publish([event])
        return event

    async def set_traffic(self, model: str, setting: int, *challengers: Challenger) -> None:
        """Announce who scores beside the champion."""
        event = TrafficSet(event_id=uuid4(), model=model, setting=setting, set_at=datetime.now(UTC), challengers=list(challengers))
        await self.publisher.publish([event])


@dataclass
class Scorer:
    """A scorer as a child process, and clients of it."""

    child: Child
    http_port: int
    grpc_port: int
    http: httpx.AsyncClient
    admin: httpx.AsyncClient
    token: str

    @property
    def authorized(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    @property
    def log(self) -> str:
        return self.child.command.log.read_text()

    def workers(self) -> list[psutil.Process]:
        """The worker processes that listen, in no order: without the spare one."""
        children = [child for child in psutil.Process(self.child.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
        return [child for child in children if any(open.status == psutil.CONN_LISTEN for open in child.net_connections("tcp"))]

    async def spare(self, after: int = 0) -> int:
        """Process id of the process that waits to take a lost worker's slot, once it is ready; `after` is that of one before."""
        while not (ready := [line["pid"] for line in self.logged("spare_up")]) or ready[-1] == after:
            await asyncio.sleep(0.02)
        return int(ready[-1])

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Lines of the log with that event."""
        return [json.loads(line) for line in self.log.splitlines() if f'"event": "{event}"' in line]

    async def score(self, model: str, values: Row, **more: Any) -> dict[str, Any]:
        """One native prediction, which must succeed."""
        reply = await self.http.post(f"/v1/models/{model}:score", json={"values": values, **more})
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer


StartScorer = Callable[..., Awaitable[Scorer]]


@asynccontextmanager
async def running_scorer(env: dict[str, str], keys: Keys, folder: Path) -> AsyncIterator[Scorer]:
    http_port = ports.choose(3)
    grpc_port, admin_port = http_port + 1, http_port + 2
    admin_url = f"http://127.0.0.1:{admin_port}"
    own = {
        "MOJOMESH_PUBLIC_KEY": str(keys.public),
        "SCORER_FOLDER": str(folder / f"scorer-{http_port}"),
        "SCORER_PORT": str(http_port),
        "SCORER_GRPC_PORT": str(grpc_port),
        "SCORER_ADMIN_PORT": str(admin_port),
    }
    command = Command("scorer", [sys.executable, "-m", "mojomesh_scorer"], folder / f"scorer-{http_port}.log", env={**env, **own})
    child = Server(
        command, (http_port, grpc_port, admin_port), ready=lambda: ports.says_ok(f"{admin_url}/health/ready"), within_s=120
    ).start()
    try:
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", timeout=30, trust_env=False) as http,
            httpx.AsyncClient(base_url=admin_url, timeout=90, trust_env=False) as admin,
        ):
            yield Scorer(child, http_port, grpc_port, http, admin, env["MOJOMESH_TOKEN"])
    finally:
        child.stop()


async def all_serving(scorer: Scorer, n_workers: int) -> list[int]:
    """Process ids of the workers, once there are so many and all listen."""
    while True:
        workers = (await scorer.admin.get("/admin/workers", headers=scorer.authorized)).json()
        if len(workers) == n_workers and all(worker["open"] for worker in workers):
            assert all(worker["serving"] == {"delay": 1} for worker in workers)
            return [worker["pid"] for worker in workers]
        await asyncio.sleep(0.05)


AnyEvent = TypeVar("AnyEvent", bound=Event)


@asynccontextmanager
async def records_of(kafka: str, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
    """The records of a topic, from its beginning and for ever."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=kafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.stop()


async def read_events(kafka: str, event: type[AnyEvent], n: int) -> list[AnyEvent]:
    """The first `n` events of a topic, once they are there."""
    async with records_of(kafka, event.topic.name) as records:
        return [event.model_validate_json((await records.getone()).value) for _ in range(n)]


async def read_predictions(kafka: str, wanted: Iterable[str]) -> dict[str, Prediction]:
    """Receipts by prediction id: all from the beginning, until those wanted are among them."""
    found: dict[str, Prediction] = {}
    missing = set(wanted)
    async with records_of(kafka, PredictionsMade.topic.name) as records:
        while missing:
            block = PredictionsMade.model_validate_json((await records.getone()).value)
            found |= {str(prediction.prediction_id): prediction for prediction in block.predictions}
            missing -= found.keys()
    return found


class Features:
    """Stands where features does: answers look-ups from a dictionary, when `gate` lets it."""

    def __init__(self) -> None:
        self.vectors: dict[str, Row] = {}
        self.refusing: dict[str, int] = {}  # a whole request, by the entity that is in it
        self.asked: list[dict[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def lookup(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.asked.append(body)
        await self.gate.wait()
        for row in body["rows"]:
            if (status := self.refusing.get(row["entity_id"])) is not None:
                return JSONResponse({"error": f"not with {row['entity_id']}"}, status)
        return JSONResponse({"rows": [self._row(row) for row in body["rows"]]})

    def _row(self, row: dict[str, str]) -> dict[str, Any]:
        if (vector := self.vectors.get(row["entity_id"])) is None:
            return {"error": "no row of 'flights'"}
        key = {"feature_set": "flights", "entity_id": row["entity_id"], "event_time": ROW_TIME, "created_at": ROW_TIME, "seq": 7}
        return {"values": vector, "used": [key], "ages_ms": {"flights": 1500}}


ROW_TIME = "2013-05-01T12:00:00Z"


@asynccontextmanager
async def serving_features(port: int) -> AsyncIterator[Features]:
    features = Features()
    app = Starlette(routes=[Route("/v1/features:lookup", features.lookup, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off", ws="none"))
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield features
    server.should_exit = True
    await serving


@asynccontextmanager
async def with_topics(bootstrap: str) -> AsyncIterator[None]:
    """The topics of the mesh, for a fixture that outlives one test; gone at the end."""
    await ensure_topics(bootstrap)
    yield
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    await admin.delete_topics([topic.name for topic in declared_topics()])
    while any(not name.startswith("__") for name in await admin.list_topics()):
        await asyncio.sleep(0.02)
    await admin.close()


@dataclass(frozen=True)
class Reply:
    """One prediction as a client got it; `number` counts requests in the order in which they were begun."""

    number: int
    door: str
    row: int
    version: int
    score: float
    prediction_id: str


class Load:
    """Clients that ask without a pause, and the log they keep; each request that fails is one more in `failures`."""

    ROWS = 100

    def __init__(self) -> None:
        self.begun = 0
        self.replies: list[Reply] = []
        self.failures: list[str] = []

    async def at_least(self, n: int) -> None:
        """Wait for so many more replies."""
        wanted = len(self.replies) + n
        while len(self.replies) < wanted:
            await asyncio.sleep(0.01)

    def begin(self) -> int:
        self.begun += 1
        return self.begun


@asynccontextmanager
async def under_load(scorer: Scorer, model: str, rows: Sequence[Row]) -> AsyncIterator[Load]:
    """Three clients over HTTP, each reply over a connection that stays, and one over gRPC."""
    load = Load()
    clients = [asyncio.create_task(_ask_http(load, scorer, model, rows)) for _ in range(3)]
    clients.append(asyncio.create_task(_ask_grpc(load, scorer, model, rows)))
    try:
        yield load
        ended = [client for client in clients if client.done()]
        assert not ended, ended
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def _ask_http(load: Load, scorer: Scorer, model: str, rows: Sequence[Row]) -> None:
    async with httpx.AsyncClient(base_url=scorer.http.base_url, timeout=30, trust_env=False) as client:
        while True:
            number = load.begin()
            row = number % Load.ROWS
            try:
                reply = await client.post(f"/v1/models/{model}:score", json={"values": rows[row]})
                answer = reply.raise_for_status().json()
            except httpx.HTTPError as error:
                load.failures.append(repr(error))
                await asyncio.sleep(0.05)
            else:
                load.replies.append(Reply(number, "http", row, answer["version"], answer["score"], answer["prediction_id"]))


async def _ask_grpc(load: Load, scorer: Scorer, model: str, rows: Sequence[Row]) -> None:
    async with triton.InferenceServerClient(f"127.0.0.1:{scorer.grpc_port}") as client:
        while True:
            number = load.begin()
            row = number % Load.ROWS
            try:
                result = await client.infer(model, [infer_tensor(name, value) for name, value in rows[row].items()])
            except InferenceServerException as error:
                load.failures.append(repr(error))
                await asyncio.sleep(0.05)
            else:
                version, score = int(result.get_response().model_version), float(result.as_numpy("score")[0])
                load.replies.append(Reply(number, "grpc", row, version, score, result.as_numpy("prediction_id")[0].decode()))


def infer_tensor(name: str, value: Any) -> Any:
    text = name in ("carrier", "origin")
    tensor = triton.InferInput(name, [1], "BYTES" if text else "FP64")
    tensor.set_data_from_numpy(np.array([value or ""], dtype=np.object_) if text else np.array([value], dtype=np.float64))
    return tensor
