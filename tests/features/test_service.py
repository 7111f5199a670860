"""The whole service in a process of its own, on real Kafka, PostgreSQL and Redis: killed, fed twice, fed garbage."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
import pytest
from aiokafka import AIOKafkaConsumer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mojomesh_chassis.bundles import publish_bundle, sign_bundle
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.objects import Objects, open_objects
from mojomesh_chassis.publishing import Record, open_publisher
from mojomesh_chassis.settings import MeshSettings
from mojomesh_contracts.bundles import (
    BASELINE_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MOJO_FILE,
    SCHEMA_FILE,
    BundleSchema,
    Cause,
    Golden,
    Manifest,
)
from mojomesh_contracts.definitions import FeatureSet, Model, definition_id
from mojomesh_contracts.events import (
    DefinitionApplied,
    DriftDetected,
    Event,
    FeaturesWritten,
    Metrics,
    ModelPromoted,
    PredictionsMade,
)
from mojomesh_features.champions import ChampionBundles
from mojomesh_local import ports
from mojomesh_store import segments
from mojomesh_store.segments import Segment
from mojomesh_store.shards import FeatureStore
from tests.features.making import BASELINE, COLUMNS, NOON, Append, make_block, make_predictions, make_promotion

MOJO = Path(__file__).parents[1] / "registry" / "model.mojo.zip"

AnyEvent = TypeVar("AnyEvent", bound=Event)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "signer.pem", tmp_path / "signer.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
async def bundle_digest(objects: Objects, model: Model, keys: tuple[Path, Path], tmp_path: Path) -> str:
    """A signed bundle in the object store, with the tests' columns and baseline around a real MOJO."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    shutil.copy(MOJO, folder / MOJO_FILE)
    metrics = Metrics(n_rows=1000, auc=0.7)
    manifest = Manifest(
        model="delay",
        run_id=uuid4(),
        cause=Cause(kind="requested", event_id=uuid4(), reason="a test"),
        definition=model,
        snapshot_time=NOON,
        snapshot_digest="0" * 64,
        snapshot_path="snapshots/0",
        n_rows=1000,
        train_from=NOON - timedelta(days=90),
        train_to=NOON,
        folds=[],
        metrics=metrics,
        naive=metrics,
        parity=0.0,
        fold_runner="local",
        algorithm="gbm",
        params={},
        seed=1,
        pins={},
        created_at=NOON,
    )
    parts = {
        SCHEMA_FILE: BundleSchema(columns=COLUMNS, label="late", classes=["0", "1"]),
        BASELINE_FILE: BASELINE,
        GOLDEN_FILE: Golden(tolerance=1e-6, rows=[]),
        MANIFEST_FILE: manifest,
    }
    for name, part in parts.items():
        (folder / name).write_text(part.model_dump_json())
    sign_bundle(folder, keys[0])
    return await publish_bundle(objects, folder)


class Service:
    """Features in a process of its own, and what its neighbours do."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        port = ports.choose()
        self.faults = folder / "faults"
        self.faults.mkdir()
        self.url = f"http://127.0.0.1:{port}"
        self.settings = MeshSettings.model_validate(environment)
        own = {"FEATURES_PORT": str(port), "FEATURES_WORK_FOLDER": str(folder / "work"), "MOJOMESH_FAULT": str(self.faults)}
        self._environment = os.environ | environment | own
        self._log = folder / "features.log"
        self._child: subprocess.Popen[bytes] | None = None

    async def start(self, **settings: str) -> None:
        """Ready when this returns."""
        self._environment |= settings
        self._child = child = self._spawn()
        while not await self._is_ready():
            assert child.poll() is None, self._log.read_text()
            await asyncio.sleep(0.05)

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen([sys.executable, "-m", "mojomesh_features"], env=self._environment, stdout=log, stderr=log)

    async def _is_ready(self) -> bool:
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(f"{self.url}/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def died(self) -> int:
        """How it ended; waits until it has."""
        assert self._child is not None
        return await asyncio.to_thread(self._child.wait)

    async def stop(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            await self.died()

    async def seal(self) -> None:
        """Seal what is known now."""
        token = {"Authorization": f"Bearer {self.settings.token}"}
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            (await client.post(self.url + "/v1/segments:seal", headers=token)).raise_for_status()

    async def get(self, path: str) -> Any:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            reply = await client.get(self.url + path)
            assert reply.status_code in (200, 404), reply.text
            return reply.json()

    async def publish(self, *events: Event) -> None:
        async with open_publisher(self.settings) as publisher:
            await publisher.publish(events)

    async def predictions(self, n: int) -> list[dict[str, Any]]:
        """The receipts, as soon as there are `n`."""
        while len(found := (await self.get("/v1/predictions?model=delay&limit=10000"))["predictions"]) < n:
            await asyncio.sleep(0.1)
        rows: list[dict[str, Any]] = found
        return rows


@pytest.fixture
async def service(
    mesh_env: dict[str, str],
    kafka: str,
    postgres: Any,
    redis_url: str,
    keys: tuple[Path, Path],
    tmp_path: Path,
    model: Model,
    definitions: Definitions,
) -> AsyncIterator[Service]:
    """Running, with the definitions applied."""
    own = {
        "MOJOMESH_KAFKA": kafka,
        "MOJOMESH_POSTGRES": postgres.url,
        "MOJOMESH_REDIS": redis_url,
        "MOJOMESH_PUBLIC_KEY": str(keys[1]),
    }
    service = Service(mesh_env | own, tmp_path)
    declared: list[FeatureSet | Model] = [*definitions.feature_sets.values(), model]
    applied = [
        DefinitionApplied(
            event_id=uuid4(), definition_id=definition_id(definition), version=1, definition=definition.model_dump(mode="json")
        )
        for definition in declared
    ]
    await service.publish(*applied)
    await service.start()
    yield service
    await service.stop()


async def heard(kafka: str, topic: str, count: int) -> list[Any]:
    """The first `count` records of a topic."""
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


@pytest.mark.parametrize("point", ["features.after_handler", "features.after_publish"])
async def test_killed_anywhere_every_receipt_is_kept_and_counted_once_and_drift_announced(
    service: Service, kafka: str, bundle_digest: str, point: str
) -> None:
    """350 predictions in blocks of 50, all drifted: 3 windows of 100, the second one confirms."""
    await service.publish(make_promotion(digest=bundle_digest))
    predictions = make_predictions(350, drift=1.0)
    blocks = [make_block(predictions[begin : begin + 50], digest=bundle_digest) for begin in range(0, 350, 50)]
    await service.publish(*blocks[:1])
    await service.predictions(50)
    (service.faults / point).touch()

    await service.publish(*blocks[1:])
    assert await service.died() == -9
    await service.start()
    await service.publish(*blocks)  # as after a producer's crash

    stored = await service.predictions(350)
    assert {row["prediction_id"] for row in stored} == {str(made.prediction_id) for made in predictions}
    assert len(stored) == 350
    report = await service.get("/v1/drift/delay")
    assert [(window["number"], window["n_rows"]) for window in report["windows"]] == [(0, 100), (1, 100), (2, 100)]
    assert len(report["alerts"]) == 1
    announced = [DriftDetected.model_validate_json(record.value) for record in await heard(kafka, DriftDetected.topic.name, 1)]
    assert {str(alert.event_id) for alert in announced} == {report["alerts"][0]["event_id"]}


async def test_garbage_is_dead_lettered_and_stops_nothing(service: Service, kafka: str) -> None:
    async with open_publisher(service.settings) as publisher:
        for topic in (PredictionsMade.topic.name, FeaturesWritten.topic.name):
            await publisher.send([Record(topic, b"key", value, []) for value in (b"not JSON", b'{"event_id": 7}')])
    await service.publish(make_block(make_predictions(10)))

    assert len(await service.predictions(10)) == 10
    for event in (PredictionsMade, FeaturesWritten):
        letters = await heard(kafka, event.topic.dead_letters.name, 2)
        assert {letter.value for letter in letters} == {b"not JSON", b'{"event_id": 7}'}


async def test_receipts_that_cannot_be_stored_are_dead_lettered_without_the_others_of_their_block(service: Service, kafka: str) -> None:
    good = make_predictions(10)
    with_nul = good[0].model_copy(update={"prediction_id": uuid4(), "entity_id": "a\0"})
    too_early = good[0].model_copy(update={"prediction_id": uuid4(), "event_time": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5)))})

    await service.publish(make_block([*good[:5], with_nul, too_early, *good[5:]]), make_block([with_nul]))

    stored = await service.predictions(10)
    assert [row["prediction_id"] for row in stored] == [str(made.prediction_id) for made in good]
    letters = await heard(kafka, PredictionsMade.topic.dead_letters.name, 2)
    buried = [PredictionsMade.model_validate_json(letter.value).predictions for letter in letters]
    assert sorted(buried, key=len) == [[with_nul], [with_nul, too_early]]
    assert {dict(letter.headers)["mojomesh-reason"].partition(b",")[0] for letter in letters} == {b"entity_id contains a NUL character"}


async def test_a_row_is_read_as_soon_as_it_is_announced(service: Service, append: Append) -> None:
    for n in range(3):
        row = await append("flights", "UA1545", NOON + timedelta(hours=n), distance=n)
        await service.publish(FeaturesWritten(**row._asdict()))

        while (await service.get("/v1/features/flights/UA1545"))["values"]["distance"] != n:
            await asyncio.sleep(0.02)


async def test_only_bundles_that_hold_are_measured_against(
    mesh_env: dict[str, str], bundle_digest: str, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    objects = open_objects(mesh_env["MOJOMESH_OBJECTS"])
    promoted = make_promotion(digest=bundle_digest)

    async def bundle(clock: float, promoted: ModelPromoted = promoted, folder: str = "a") -> Any:
        return await ChampionBundles(objects, tmp_path / folder, keys[1], clock=lambda: clock).of(promoted)

    found = await bundle(0.0)
    assert (found.digest, found.baseline) == (bundle_digest, BASELINE)
    assert await bundle(0.0, make_promotion(digest="0" * 64)) is None
    await objects.put(f"bundles/{bundle_digest}/{BASELINE_FILE}", BASELINE.model_copy(update={"window": 7}).model_dump_json().encode())
    assert await bundle(0.0, folder="b") is None


async def test_a_bundle_that_comes_later_is_asked_for_again(
    objects: Objects, bundle_digest: str, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    now = 100.0
    bundles = ChampionBundles(objects, tmp_path / "work", keys[1], clock=lambda: now)
    manifest = await objects.get(f"bundles/{bundle_digest}/{MANIFEST_FILE}")
    await objects.put(f"bundles/{bundle_digest}/{MANIFEST_FILE}", b"{}")
    promoted = make_promotion(digest=bundle_digest)
    assert await bundles.of(promoted) is None

    await objects.put(f"bundles/{bundle_digest}/{MANIFEST_FILE}", manifest)
    assert await bundles.of(promoted) is None  # not at every block of predictions
    now += 60
    assert await bundles.of(promoted) is not None


async def test_what_is_due_is_sealed_by_itself(service: Service, append: Append, feature_store: FeatureStore, objects: Objects) -> None:
    row = await append("flights", "UA1545", distance=1400)
    await service.stop()
    await service.start(FEATURES_SEAL_ROWS="1")

    found: list[Segment] = []
    while not found:
        await asyncio.sleep(0.05)
        async with feature_store.shards[0].begin() as db:
            found = await segments.segments_of(db, "flights")

    assert [(segment.n_rows, segment.sum_of_seqs) for segment in found] == [(1, row.seq)]
    assert await objects.list("segments") == [found[0].path]


async def test_what_a_killed_process_was_at_is_removed_when_it_starts_again(service: Service, append: Append, tmp_path: Path) -> None:
    await append("flights", "UA1545", distance=1400)
    (service.faults / "features.before_upload").touch()
    with pytest.raises(httpx.TransportError):
        await service.seal()
    assert await service.died() == -9
    assert len(list((tmp_path / "work").rglob("*.parquet"))) == 1

    await service.start()

    assert list((tmp_path / "work").rglob("*.parquet")) == []
    await service.seal()
