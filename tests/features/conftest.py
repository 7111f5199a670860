"""Feature rows on a real PostgreSQL and Redis, and the doors of features on them."""

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.health import Health
from mojomesh_chassis.http import mesh_app
from mojomesh_chassis.objects import Objects, open_objects
from mojomesh_chassis.redis import LineRedis, open_redis
from mojomesh_contracts.definitions import Model, parse_definitions
from mojomesh_contracts.events import EventReceived, FeatureValue
from mojomesh_features import routes
from mojomesh_features.nearest import Neighbours
from mojomesh_features.reading import FeatureReader
from mojomesh_features.retiring import Retired
from mojomesh_features.sealing import Sealer
from mojomesh_features.settings import FeaturesSettings
from mojomesh_features.snapshots import Snapshots
from mojomesh_store import rows
from mojomesh_store.online import OnlineStore
from mojomesh_store.shards import FeatureStore, open_feature_store
from mojomesh_store.tables import FeatureRow
from tests.features.making import DEFINITIONS, NOON, Append, AppendAll, make_event


@pytest.fixture
def definitions() -> Definitions:
    return Definitions(*parse_definitions(DEFINITIONS))


@pytest.fixture
def model(definitions: Definitions) -> Model:
    return definitions.model("delay")


@pytest.fixture
async def feature_store(postgres: Any) -> AsyncIterator[FeatureStore]:
    async with open_feature_store([postgres.url]) as store:
        yield store


@pytest.fixture
async def append_all(feature_store: FeatureStore) -> AppendAll:
    """Stores events as ingest does, in one transaction a shard."""

    async def append(events: Iterable[EventReceived]) -> list[FeatureRow]:
        stored: list[FeatureRow] = []
        for shard, part in feature_store.split(events):
            async with shard.begin() as db:
                stored += await rows.append(db, part)
        return stored

    return append


@pytest.fixture
async def append(append_all: AppendAll) -> Append:
    """`await append("flights", "UA1545", at, distance=1400)` stores one row, in a transaction of its own."""

    async def append_one(feature_set: str, entity_id: str, at: datetime = NOON, **values: FeatureValue) -> FeatureRow:
        return (await append_all([make_event(feature_set, entity_id, at, values)]))[0]

    return append_one


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[LineRedis]:
    async with open_redis(redis_url, timeout_s=10) as client:  # nothing here depends on its patience
        yield client


@pytest.fixture
def online(redis: LineRedis) -> OnlineStore:
    return OnlineStore(redis, chance=lambda: 1.0)


@pytest.fixture
def reader(feature_store: FeatureStore, online: OnlineStore) -> FeatureReader:
    return FeatureReader(feature_store, online, Retired())


@pytest.fixture
def objects(mesh_env: dict[str, str]) -> Objects:
    return open_objects(mesh_env["MOJOMESH_OBJECTS"])


@pytest.fixture
def snapshots(feature_store: FeatureStore, postgres: Any, objects: Objects, tmp_path: Path) -> Snapshots:
    return Snapshots(feature_store, [postgres.url], objects, tmp_path / "work", memory_limit="512MB")


@pytest.fixture
def sealer(feature_store: FeatureStore, postgres: Any, objects: Objects, tmp_path: Path) -> Sealer:
    return Sealer(feature_store, [postgres.url], objects, tmp_path / "work", memory_limit="512MB")


class WithState:
    """What a server does with the state that a lifespan yields: gives it to every request."""

    def __init__(self, app: FastAPI, state: dict[str, Any]) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "state": self._state}, receive, send)


@pytest.fixture
async def http(
    mesh_env: dict[str, str],
    definitions: Definitions,
    feature_store: FeatureStore,
    reader: FeatureReader,
    snapshots: Snapshots,
    sealer: Sealer,
    tmp_path: Path,
) -> AsyncIterator[httpx.AsyncClient]:
    """The HTTP door, without the consumers."""
    settings = FeaturesSettings.model_validate(mesh_env | {"MOJOMESH_PUBLIC_KEY": str(tmp_path / "public.pem")})
    state = {
        "database": feature_store.shards[0],
        "feature_store": feature_store,
        "reader": reader,
        "neighbours": Neighbours(feature_store, Retired()),
        "definitions": definitions,
        "snapshots": snapshots,
        "sealer": sealer,
    }
    async with AsyncExitStack() as stack:
        app = mesh_app("features", settings, Health(), lambda _: stack, routes.router)  # type: ignore[arg-type, return-value]
        transport = httpx.ASGITransport(WithState(app, state))
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://features"))
