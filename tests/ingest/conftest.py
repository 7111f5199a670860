"""A running ingest, in this process or as a process of its own, and what its clients can see."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from subprocess import Popen
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import make_url, text
from starlette.types import Receive, Scope, Send

from mojomesh_chassis.database import Database, open_database
from mojomesh_contracts.events import DefinitionApplied, EventReceived, FeaturesWritten, FeatureValue
from mojomesh_ingest.app import build
from mojomesh_ingest.settings import Settings

FEATURES = {
    "carrier": {"type": "category"},
    "distance": {"type": "number", "unit": "mile", "min": 0, "max": 10_000},
    "late": {"type": "boolean"},
    "tail": {"type": "number"},
    "route": {"type": "vector(2)"},
}
RECEIVED = EventReceived.topic.name
GROUP = f"ingest.{RECEIVED}"


class Gate:
    """A way to a server that can be shut: what was connected is cut off, who knocks is refused."""

    def __init__(self, host: str, port: int) -> None:
        self._to = host, port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._let_through, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()
        self._open.clear()

    async def _let_through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._to)
        self._open |= {writer, back}
        await asyncio.gather(_pump(reader, back), _pump(there, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass
class World:
    """The servers of one test, with the feature set `flights` declared, and what ingest has left there."""

    records: Any
    postgres: Any
    settings: Settings
    env: dict[str, str]

    def make_event(self, entity_id: str = "UA1545", at: datetime | None = None, **values: FeatureValue) -> EventReceived:
        return EventReceived(
            event_id=uuid4(),
            feature_set="flights",
            entity_id=entity_id,
            event_time=at or datetime(2013, 3, 1, 12, tzinfo=UTC),
            values=values or {"carrier": "UA", "distance": 1400},
        )

    def make_events(self, n: int) -> list[EventReceived]:
        return [self.make_event(f"entity-{number % 97}", distance=number) for number in range(n)]

    async def define(self, name: str) -> None:
        document = {"kind": "FeatureSet", "name": name, "entity": "flight_id", "features": FEATURES}
        await self.records.publish(DefinitionApplied(event_id=uuid4(), definition_id=f"FeatureSet/{name}", version=1, definition=document))

    async def until_handled(self) -> None:
        await self.records.until_handled(GROUP, RECEIVED)

    async def stored(self) -> list[UUID]:
        """event_id of every feature row, in the order of their writing."""
        async with open_database(self.postgres.owner_url) as database, database.begin() as db:
            return list((await db.execute(text("SELECT event_id FROM store.feature_rows ORDER BY seq"))).scalars())

    async def announced(self) -> list[FeaturesWritten]:
        return [FeaturesWritten.model_validate_json(record.value) for record in await self.records.read(FeaturesWritten.topic.name)]

    async def buried(self) -> list[tuple[bytes, str]]:
        """Value and reason of every dead letter."""
        letters = await self.records.read(EventReceived.topic.dead_letters.name)
        return [(letter.value, (dict(letter.headers)["mojomesh-reason"] or b"").decode()) for letter in letters]

    async def count(self, shard: Database) -> int:
        async with shard.begin() as db:
            return int((await db.execute(text("SELECT count(*) FROM store.feature_rows"))).scalar_one())

    async def execute(self, statement: str) -> None:
        """As the owner."""
        async with open_database(self.postgres.owner_url) as database, database.begin() as db:
            await db.execute(text(statement))

    def serving(self, postgres: str) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        """Ingest on other databases than this world's own."""
        return serving(self.settings.model_copy(update={"postgres": postgres}))

    @asynccontextmanager
    async def gate(self) -> AsyncIterator[tuple[Gate, str]]:
        """A gate before the database, and the database's URL through it."""
        url = make_url(self.postgres.url)
        gate = Gate(url.host or "", url.port or 0)
        await gate.open()
        try:
            yield gate, url.set(host="127.0.0.1", port=gate.port).render_as_string(hide_password=False)
        finally:
            await gate.shut()


@pytest.fixture
async def world(mesh_env: dict[str, str], kafka: str, postgres: Any, records: Any, tmp_path: Path) -> World:
    faults = tmp_path / "faults"
    faults.mkdir()
    env = {**mesh_env, "MOJOMESH_KAFKA": kafka, "MOJOMESH_POSTGRES": postgres.url, "MOJOMESH_FAULT": str(faults)}
    world = World(records, postgres, Settings(**env), env)
    await world.define("flights")
    return world


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """Ingest in this process, consuming; a client of its HTTP door."""
    app = build(settings)
    async with app.router.lifespan_context(app) as state:

        async def with_state(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope, "state": dict(state or {})}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_state), base_url="http://ingest") as client:
            yield client


@pytest.fixture
async def ingest(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(world.settings) as client:
        yield client


class Process:
    """A Python process that may be killed at a fault point."""

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path) -> None:
        self._output = log.open("ab")
        self._popen = Popen([sys.executable, *arguments], env={**os.environ, **env}, stdout=self._output, stderr=self._output)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def wait_for_kill(self) -> None:
        assert self._popen.wait(timeout=120) == -signal.SIGKILL

    def stop(self) -> int:
        """Ask it to end, and its exit status."""
        if self._popen.poll() is None:
            self._popen.terminate()
        self._output.close()
        return self._popen.wait(timeout=40)


@pytest.fixture
def start(world: World, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts `python …` with the environment of the world, and more; whatever still runs at the end is stopped."""
    started: list[Process] = []

    def start_process(*arguments: str, **env: str) -> Process:
        process = Process([*arguments], {**world.env, "INGEST_PORT": "0", **env}, tmp_path / "process.log")
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.stop()
