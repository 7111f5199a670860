"""A registry on real PostgreSQL and Kafka, in the test's process, and bundles to offer it."""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
import pytest
import uvicorn
from aiokafka import AIOKafkaConsumer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mojomesh_chassis.bundles import publish_bundle, sign_bundle
from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.publishing import open_publisher
from mojomesh_contracts.bundles import (
    BASELINE_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MOJO_FILE,
    SCHEMA_FILE,
    Baseline,
    BundleSchema,
    Cause,
    ChampionComparison,
    Column,
    Golden,
    GoldenRow,
    Manifest,
)
from mojomesh_contracts.definitions import Model, parse_definitions
from mojomesh_contracts.events import Event, Metrics, ModelReady
from mojomesh_registry.app import build
from mojomesh_registry.settings import RegistrySettings

AnyEvent = TypeVar("AnyEvent", bound=Event)

MOJO = Path(__file__).parent / "model.mojo.zip"  # a real one: H2O 3.46.0.11, GBM of three trees on carrier and distance

DEFINITIONS = """
kind: FeatureSet
name: flights
entity: flight_id
features:
  carrier: {type: category}
  distance: {type: number, min: 0}
---
kind: FeatureSet
name: arrivals
entity: flight_id
features:
  late: {type: boolean}
---
kind: Model
name: delay
spine: flights
label: {feature_set: arrivals, column: late, type: binary}
features:
  - {feature_set: flights}
algorithm: {name: gbm, params: {ntrees: 3}}
walk_forward: {n_windows: 2, train: expanding, test: 15d, step: 15d}
gate: {metric: auc, min: 0.6, min_gain_over_champion: 0.0}
"""

START = datetime(2013, 1, 1, tzinfo=UTC)


@dataclass
class Bench:
    """What a test of registry has in its hands: the doors of one running service, and what its neighbours would do."""

    settings: RegistrySettings
    private_key: Path
    folder: Path
    http: httpx.AsyncClient
    environment: dict[str, str]
    start: datetime = START
    _numbers: list[int] = field(default_factory=list)

    @property
    def token(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.settings.token}"}

    async def apply(self, text: str = DEFINITIONS) -> httpx.Response:
        return await self.http.put("/v1/definitions", content=text, headers=self.token)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body, headers=self.token)

    async def model(self, name: str = "delay") -> dict[str, Any]:
        answer = await self.http.get(f"/v1/models/{name}")
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def make_bundle(self, auc: float = 0.7, *, against: dict[str, Any] | None = None, champion_auc: float = 0.65, **changed: Any) -> Path:
        """A signed bundle in a folder; `against` is the champion it was compared with. Each is different by its run."""
        self._numbers.append(len(self._numbers))
        folder = self.folder / f"bundle-{len(self._numbers)}"
        folder.mkdir()
        shutil.copy(MOJO, folder / MOJO_FILE)
        columns = [
            Column(name="carrier", feature_set="flights", feature="carrier", type="category", levels=["AA", "B6", "UA"]),
            Column(name="distance", feature_set="flights", feature="distance", type="number"),
        ]
        schema = changed.pop("schema", BundleSchema(columns=columns, label="late", classes=["0", "1"]))
        (folder / SCHEMA_FILE).write_text(schema.model_dump_json())
        (folder / BASELINE_FILE).write_text(Baseline(window=100, bins=[]).model_dump_json())
        golden = Golden(tolerance=1e-6, rows=[GoldenRow(inputs=[0.0, 500.0], scores=[0.54, 0.46])])
        (folder / GOLDEN_FILE).write_text(golden.model_dump_json())
        (folder / MANIFEST_FILE).write_text(make_manifest(auc, against, champion_auc, **changed).model_dump_json())
        sign_bundle(folder, self.private_key)
        return folder

    async def offer(self, folder: Path, model: str = "delay") -> ModelReady:
        """Store the bundle and announce it, as trainer does."""
        digest = await publish_bundle(open_objects(self.settings.objects), folder)
        manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
        event = ModelReady(event_id=uuid4(), model=model, run_id=manifest.run_id, bundle_digest=digest)
        await self.publish(event)
        return event

    async def publish(self, *events: Event) -> None:
        async with open_publisher(self.settings) as publisher:
            await publisher.publish(events)

    async def version(self, number: int) -> dict[str, Any]:
        """The version, as soon as it is registered."""
        while (answer := await self.http.get(f"/v1/models/delay/versions/{number}")).status_code == 404:
            await asyncio.sleep(0.02)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def heard(self, event: type[AnyEvent], count: int) -> list[AnyEvent]:
        """The first `count` events of a topic, read from its beginning."""
        return [event.model_validate_json(record.value) for record in await read(self.settings.kafka, event.topic.name, count)]

    async def dead_letters(self, event: type[Event], count: int) -> list[Any]:
        """The first records of a topic's dead letters, with their headers."""
        return await read(self.settings.kafka, event.topic.dead_letters.name, count)


async def read(kafka: str, topic: str, count: int) -> list[Any]:
    """The first `count` records of a topic; waits for them."""
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=kafka, auto_offset_reset="earliest")
    await consumer.start()
    try:
        found: list[Any] = []
        while len(found) < count:
            for records in (await consumer.getmany(timeout_ms=100)).values():
                found += records
        return found
    finally:
        await consumer.stop()


def make_manifest(auc: float, against: dict[str, Any] | None = None, champion_auc: float = 0.65, **changed: Any) -> Manifest:
    comparison = against and ChampionComparison(
        champion_version=against["version"],
        champion_digest=against["bundle_digest"],
        champion=Metrics(n_rows=500, auc=champion_auc),
        challenger=Metrics(n_rows=500, auc=auc),
    )
    (definition,) = (found for found in parse_definitions(DEFINITIONS) if isinstance(found, Model))
    given: dict[str, Any] = {
        "model": "delay",
        "run_id": uuid4(),
        "cause": Cause(kind="requested", event_id=uuid4(), reason="a test"),
        "definition": definition,
        "snapshot_time": START + timedelta(days=90),
        "snapshot_digest": "0" * 64,
        "snapshot_path": "snapshots/0",
        "n_rows": 2000,
        "train_from": START,
        "train_to": START + timedelta(days=89),
        "folds": [],
        "metrics": Metrics(n_rows=1000, auc=auc),
        "naive": Metrics(n_rows=1000, auc=0.5),
        "parity": 0.0,
        "comparison": comparison or None,
        "fold_runner": "local",
        "algorithm": "gbm",
        "params": {"ntrees": 3},
        "seed": 1,
        "pins": {"h2o": "3.46.0.11"},
        "created_at": START + timedelta(days=90),
    }
    return Manifest(**(given | changed))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """Private and public key files of the mesh's signer."""
    return make_keys(tmp_path, "signer")


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def environment(postgres: Any, kafka: str, mesh_env: dict[str, str], keys: tuple[Path, Path]) -> dict[str, str]:
    """What a registry is told by its environment."""
    return mesh_env | {"MOJOMESH_KAFKA": kafka, "MOJOMESH_POSTGRES": postgres.url, "MOJOMESH_PUBLIC_KEY": str(keys[1])}


@pytest.fixture
async def bench(environment: dict[str, str], keys: tuple[Path, Path], tmp_path: Path) -> AsyncIterator[Bench]:
    """A running registry with nothing applied."""
    settings = RegistrySettings.model_validate(environment)
    async with running_registry(settings) as http:
        yield Bench(settings, keys[0], tmp_path, http, environment)


@pytest.fixture
async def loop(bench: Bench) -> Bench:
    """The same with the definitions of the model `delay` applied."""
    answer = await bench.apply()
    assert answer.status_code == 200, answer.text
    return bench


@pytest.fixture
async def served(environment: dict[str, str], keys: tuple[Path, Path], tmp_path: Path) -> AsyncIterator[Bench]:
    """The same at a port, for callers outside the test's loop."""
    settings = RegistrySettings.model_validate(environment)
    server = uvicorn.Server(uvicorn.Config(build(settings), log_level="warning", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            assert not serving.done()
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", trust_env=False) as http:
            bench = Bench(settings, keys[0], tmp_path, http, environment)
            assert (await bench.apply()).status_code == 200
            yield bench
        server.should_exit = True
        await serving


@asynccontextmanager
async def running_registry(settings: RegistrySettings) -> AsyncIterator[httpx.AsyncClient]:
    app = build(settings)
    async with AsyncExitStack() as stack:
        state = await stack.enter_async_context(app.router.lifespan_context(app))

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(state or {})}, receive, send)

        transport = httpx.ASGITransport(with_state)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://registry"))


class Process:
    """A registry in a process of its own, which tests kill at named points and start again."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.faults = folder / "faults"
        self.faults.mkdir()
        self.url = f"http://127.0.0.1:{port}"
        self._environment = os.environ | environment | {"REGISTRY_PORT": str(port), "MOJOMESH_FAULT": str(self.faults)}
        self._log = folder / "registry.log"
        self._child: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Ready when this returns."""
        self._child = child = self._spawn()
        async with httpx.AsyncClient(trust_env=False) as client:
            while not await self._ready(client):
                assert child.poll() is None, self._log.read_text()
                await asyncio.sleep(0.05)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "mojomesh_registry"], env=self._environment, stdout=log, stderr=log)

    async def _ready(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.url}/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    def arm(self, point: str) -> None:
        (self.faults / point).touch()

    async def died(self) -> int:
        """How it ended; waits until it has."""
        assert self._child is not None
        return await asyncio.to_thread(self._child.wait)

    async def stop(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            await self.died()


@pytest.fixture
async def process(environment: dict[str, str], tmp_path: Path) -> AsyncIterator[Process]:
    process = Process(environment, tmp_path)
    yield process
    await process.stop()


@pytest.fixture
async def killable(process: Process, environment: dict[str, str], keys: tuple[Path, Path], tmp_path: Path) -> AsyncIterator[Bench]:
    """A bench whose registry is `process`, started, with the model `delay` applied."""
    await process.start()
    async with httpx.AsyncClient(base_url=process.url, trust_env=False) as http:
        bench = Bench(RegistrySettings.model_validate(environment), keys[0], tmp_path, http, environment)
        assert (await bench.apply()).status_code == 200
        yield bench


@pytest.fixture
def other_keys(tmp_path: Path) -> tuple[Path, Path]:
    """The keys of somebody else."""
    return make_keys(tmp_path, "somebody")
