"""One whole mesh on real servers, told two months of real flights; each test asks it about one promise.

The tests share its story: January is stored and trained on by hand; February is told while processes are killed, its weather made
warmer than it was, so that the mesh finds drift and retrains itself while more processes are killed.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord

from mojomesh_contracts.events import DriftDetected, EventReceived, ModelDeployed, ScoreRequested
from mojomesh_flights.dataset import Fact, Year, read_year
from mojomesh_local.stack import Mesh, running_stack
from mojomesh_local.state import SERVERS
from tests.mesh.containers import services_in_containers

MODEL = "flight-delay"
FLIGHTS = Path(__file__).parents[2] / "examples" / "flights"
FEBRUARY = datetime(2013, 2, 1, tzinfo=UTC)
MARCH = datetime(2013, 3, 1, tzinfo=UTC)
WARMER = 60.0
N_ASKED = 6_000
N_LINES_SAID = 12
Json = dict[str, Any]

BAD: dict[str, Json] = {
    "is not a feature of": {"values": {"carrier": "UA", "colour": "red"}},
    "must be a number": {"values": {"carrier": "UA", "distance": "far"}},
    "less than the minimum": {"values": {"carrier": "UA", "distance": -1}},
    "no feature set is named 'trains'": {"feature_set": "trains"},
    "is not between 1900 and now": {"event_time": (datetime.now(UTC) + timedelta(days=1)).isoformat()},
}


class Client:
    """What a user of the mesh has: HTTP, a Kafka client, and, for the ledger, a look into the database."""

    def __init__(self, mesh: Mesh, http: httpx.AsyncClient, faults: Path) -> None:
        self.mesh, self.http, self.faults = mesh, http, faults

    async def ask(self, method: str, service: str, path: str, body: object = None, *, token: bool = True) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.mesh.env['MOJOMESH_TOKEN']}"} if token else {}
        url = self.mesh.env["MOJOMESH_SCORER_ADMIN_URL"] if service == "admin" else self.mesh.url(service)
        return await self.http.request(method, f"{url}{path}", json=body, headers=headers)

    async def json(self, method: str, service: str, path: str, body: object = None) -> Json:
        response = await self.ask(method, service, path, body)
        assert response.is_success, f"{method} {path}: {response.status_code} {response.text[:500]}"
        answer: Json = response.json()
        return answer

    async def publish(self, topic: str, records: list[tuple[bytes, bytes]]) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self.mesh.env["MOJOMESH_KAFKA"], acks="all", linger_ms=20) as producer:
            await asyncio.gather(*[await producer.send(topic, value, key=key) for key, value in records])

    async def tell(self, facts: list[Fact]) -> None:
        await self.publish(EventReceived.topic.name, [(fact.entity_id.encode(), fact.json) for fact in facts])

    async def records(self, topic: str) -> list[ConsumerRecord[bytes, bytes]]:
        """Everything in a topic."""
        async with AIOKafkaConsumer(
            topic, bootstrap_servers=self.mesh.env["MOJOMESH_KAFKA"], auto_offset_reset="earliest", enable_auto_commit=False
        ) as consumer:
            ends = await consumer.end_offsets(consumer.assignment())
            found: list[ConsumerRecord[bytes, bytes]] = []
            while any([await consumer.position(partition) < end for partition, end in ends.items()]):
                for records in (await consumer.getmany(timeout_ms=500)).values():
                    found += records
            return found

    async def stored(self) -> dict[UUID, int]:
        """How often each event is in the store; read from the table itself."""
        connection = await asyncpg.connect(self.mesh.env["MOJOMESH_POSTGRES"])
        try:
            rows = await connection.fetch("SELECT event_id, count(*) AS n FROM store.feature_rows GROUP BY event_id")
        finally:
            await connection.close()
        return {row["event_id"]: row["n"] for row in rows}

    async def serving(self) -> int | None:
        """The version that every worker serves, if they agree."""
        workers = (await self.ask("GET", "admin", "/admin/workers")).json()
        versions = {worker["serving"].get(MODEL) for worker in workers}
        return versions.pop() if len(versions) == 1 else None

    async def until(self, holds: Callable[[], Awaitable[object]], within_s: float, what: str) -> None:
        """Wait for something; services may be starting again meanwhile. What they said last is told when it does not come."""
        try:
            async with asyncio.timeout(within_s):
                while not await self._holds(holds):
                    await asyncio.sleep(0.3)
        except TimeoutError:
            said = {name: self.mesh.log(name).read_text(errors="replace").splitlines()[-N_LINES_SAID:] for name in self.mesh.status.parts}
            lines = [f"{name}: {line[:300]}" for name, its_lines in said.items() for line in its_lines]
            pytest.fail("\n".join([f"{what}, in {within_s:g} s", *lines]), pytrace=False)

    @staticmethod
    async def _holds(holds: Callable[[], Awaitable[object]]) -> bool:
        try:
            return bool(await holds())
        except (httpx.TransportError, AssertionError):
            return False

    async def version(self, version: int) -> Json:
        return await self.json("GET", "registry", f"/v1/models/{MODEL}/versions/{version}")

    def arm(self, *points: str) -> None:
        for point in points:
            (self.faults / point).touch()

    def armed(self) -> list[str]:
        return sorted(path.name for path in self.faults.iterdir())


@dataclass
class Ledger:
    """Who was told what: kept by the client alone."""

    told: set[UUID] = field(default_factory=set)
    bad: dict[UUID, str] = field(default_factory=dict)
    asked: dict[UUID, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def year() -> Year:
    return read_year(MARCH)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, faults: Path) -> Iterator[Mesh]:
    """The whole stack, its processes ready to be killed; with `MOJOMESH_TEST_SERVICES=images` the services run in their containers."""
    folder = tmp_path_factory.mktemp("mesh")
    if os.environ.get("MOJOMESH_TEST_SERVICES") == "images":
        with running_stack(folder / "state", only=SERVERS) as mesh, services_in_containers(mesh, folder):
            yield mesh
        return
    env = {"MOJOMESH_FAULT": str(faults), "MOJOMESH_TRACES": str(folder / "traces"), "SCORER_WORKERS": "2"}
    with running_stack(folder / "state", env=env) as mesh:
        yield mesh


@pytest.fixture(scope="module")
async def client(mesh: Mesh, faults: Path) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
        yield Client(mesh, http, faults)


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger()


def definitions() -> list[Json]:
    documents = [document for path in sorted(FLIGHTS.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())]
    model = next(document for document in documents if document["kind"] == "Model")
    model["walk_forward"] |= {"n_windows": 2, "test": "7d", "step": "7d"}
    model["gate"] |= {"min": 0.5, "min_gain_over_champion": -1.0, "max_calibration_error": 1.0}
    model["drift"] |= {"window": 1000, "confirm": 2, "cooldown": "60d"}
    return documents


@pytest.fixture(scope="module")
async def january(client: Client, ledger: Ledger, year: Year) -> Client:
    """January is stored, and a model trained on it serves as version 1."""
    await client.json("PUT", "registry", "/v1/definitions", definitions())
    facts = [fact for fact in year.facts_from(0, year.facts.num_rows) if fact.event_ms < FEBRUARY.timestamp() * 1000]
    await client.tell(facts)
    ledger.told |= {fact.event_id for fact in facts}
    await tell_bad(client, ledger)
    await client.until(lambda: settled(client, ledger), 120, "January is not stored")
    await client.json("POST", "registry", f"/v1/models/{MODEL}:train", {"reason": "the first model"})
    await client.until(lambda: serves(client, 1), 240, "version 1 does not serve")
    return client


@pytest.fixture(scope="module")
async def february(january: Client, ledger: Ledger, year: Year) -> Client:
    """February, warmer than it was, was told and asked about while processes were killed; version 2 serves."""
    client = january
    facts = [warmed(fact) for fact in year.facts_from(0, year.facts.num_rows) if fact.event_ms >= FEBRUARY.timestamp() * 1000]
    ledger.told |= {fact.event_id for fact in facts}
    half = len(facts) // 2
    for point, part in {"ingest.after_handler": facts[:half], "ingest.after_publish": facts[half:]}.items():
        client.arm(point)
        await client.tell(part)
    await client.until(lambda: settled(client, ledger), 180, "February is not stored")

    client.arm("trainer.after_handler", "trainer.fold_training", "trainer.bundle_published", "trainer.before_announcement")
    client.arm("registry.registered", "scorer.after_load")
    asked = [fact for fact in facts if fact.feature_set == "flights"][:N_ASKED]
    requests = [ScoreRequested(event_id=uuid4(), model=MODEL, entity_id=fact.entity_id, event_time=fact.event_time) for fact in asked]
    ledger.asked |= {request.event_id: str(request.entity_id) for request in requests}
    records = [(request.partition_key.encode(), request.model_dump_json().encode()) for request in requests]
    await client.publish(ScoreRequested.topic.name, records)
    await client.until(lambda: serves(client, 2), 420, "version 2 does not serve")
    return client


async def tell_bad(client: Client, ledger: Ledger) -> None:
    """Events that cannot be stored, and a record that is not even one."""
    records = []
    for reason, changes in BAD.items():
        event_id = uuid4()
        event: Json = {
            "event_id": str(event_id),
            "feature_set": "flights",
            "entity_id": "XX1",
            "event_time": "2013-01-05T10:00:00Z",
            "values": {"carrier": "UA"},
        }
        records.append((b"XX1", json.dumps(event | changes).encode()))
        ledger.bad[event_id] = reason
    await client.publish(EventReceived.topic.name, [*records, (b"XX1", b"not JSON")])


async def settled(client: Client, ledger: Ledger) -> bool:
    """Everything told is stored, or lies in the dead-letter topic."""
    unstored = ledger.told - (await client.stored()).keys()
    return not unstored or unstored <= {told_id(record) for record in await client.records(EventReceived.topic.dead_letters.name)}


async def serves(client: Client, version: int) -> bool:
    return await client.serving() == version


def told_id(record: ConsumerRecord[bytes, bytes]) -> UUID | None:
    """The event_id of a dead letter, if it has one."""
    try:
        return UUID(json.loads(record.value or b"")["event_id"])
    except ValueError:
        return None


def warmed(fact: Fact) -> Fact:
    if fact.feature_set != "weather":
        return fact
    values = json.loads(fact.values)
    if values["temp"] is not None:
        values["temp"] += WARMER
    return Fact(fact.feature_set, fact.entity_id, fact.event_ms, fact.event_time, json.dumps(values))


async def alerts(client: Client) -> list[DriftDetected]:
    return [DriftDetected.model_validate_json(record.value or b"") for record in await client.records(DriftDetected.topic.name)]


async def certificates(client: Client) -> list[ModelDeployed]:
    return [ModelDeployed.model_validate_json(record.value or b"") for record in await client.records(ModelDeployed.topic.name)]
