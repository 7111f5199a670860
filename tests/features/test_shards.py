"""A shard that is away takes its own entities with it and no others, and says so."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
import httpx
import pytest
from adbc_driver_postgresql import dbapi
from sqlalchemy import text

from mojomesh_chassis.database import open_database
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.objects import Objects
from mojomesh_contracts.definitions import Model
from mojomesh_features.erasing import Eraser
from mojomesh_features.known import KnownRows
from mojomesh_features.sealing import Sealer
from mojomesh_features.segments import rows_of_entity
from mojomesh_features.snapshots import Snapshots, label_of
from mojomesh_store import rows
from mojomesh_store.rebalancing import claim, rebalance
from mojomesh_store.segments import Segment
from mojomesh_store.shards import FeatureStore, ShardRouter, open_feature_store
from mojomesh_store.vectors import plan_of
from tests.features.definition import HOUR
from tests.features.making import NOON, Append, make_event

FLIGHTS = [f"UA{number}" for number in range(20)]


@pytest.fixture
def databases(new_postgres: Callable[[], Any]) -> list[Any]:
    return [new_postgres() for _ in range(3)]


@pytest.fixture
async def feature_store(databases: list[Any]) -> AsyncIterator[FeatureStore]:
    async with open_feature_store([database.url for database in databases]) as store:
        yield store


async def look_up(http: httpx.AsyncClient, model: Model, entity_ids: list[str]) -> list[dict[str, Any]]:
    rows = [{"entity_id": entity_id, "event_time": NOON.isoformat()} for entity_id in entity_ids]
    reply = await http.post("/v1/features:lookup", json={"model": model.name, "rows": rows})
    assert reply.status_code == 200
    found: list[dict[str, Any]] = reply.json()["rows"]
    return found


async def test_reads_of_other_entities_go_on_and_its_own_are_refused_with_a_reason(
    http: httpx.AsyncClient, feature_store: FeatureStore, databases: list[Any], append: Append, model: Model
) -> None:
    for entity_id in FLIGHTS:
        await append("flights", entity_id, NOON, carrier="UA")
    async with open_database(databases[1].owner_url) as owner, owner.begin() as db:
        await db.execute(text("ALTER SCHEMA store RENAME TO away"))
    gone = [entity_id for entity_id in FLIGHTS if feature_store.shard_of(entity_id).number == 1]
    there = [entity_id for entity_id in FLIGHTS if entity_id not in gone]

    answers = dict(zip(FLIGHTS, await look_up(http, model, FLIGHTS), strict=True))

    assert gone and there
    assert all("shard 1 of 3" in answers[entity_id]["away"] for entity_id in gone)
    assert all(answers[entity_id]["values"]["carrier"] == "UA" for entity_id in there)
    found = await http.post("/v1/features/flights:batch", json={"rows": [{"entity_id": entity_id} for entity_id in there]})
    assert [row["entity_id"] for row in found.json()["rows"]] == there
    refused = await http.get(f"/v1/features/flights/{gone[0]}")
    assert refused.status_code == 503
    assert "shard 1 of 3" in refused.text
    snapshot = await http.post("/v1/snapshots", json={"model": model.model_dump(mode="json"), "snapshot_time": NOON.isoformat()})
    assert snapshot.status_code == 503
    assert "shard 1 of 3" in snapshot.text


@pytest.mark.parametrize("point", ["before it is read", "while it is read", "between rows"])
async def test_a_shard_that_dies_between_a_snapshots_passage_and_its_reading_is_named(
    point: str,
    http: httpx.AsyncClient,
    snapshots: Snapshots,
    postgres_cluster: Any,
    databases: list[Any],
    append: Append,
    model: Model,
    feature_store: FeatureStore,
) -> None:
    database = feature_store.shards[1].engine.url.database
    assert database is not None

    one_at_a_time = Lock()

    def die() -> None:
        with one_at_a_time:  # feature sets are read side by side
            postgres_cluster.execute(f'ALTER DATABASE "{database}" CONNECTION LIMIT 0')
            postgres_cluster.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'")

    class Dying(KnownRows):
        def read_tails(self, shards: Sequence[dbapi.Connection], db: duckdb.DuckDBPyConnection) -> None:
            if point == "before it is read":
                die()
            super().read_tails(shards, db)

        def _sealed(self, cursor: dbapi.Cursor) -> list[Segment]:
            if point == "while it is read":
                die()
            return super()._sealed(cursor)

        def _read_after(self, sealed: datetime | None, cursor: dbapi.Cursor, db: duckdb.DuckDBPyConnection) -> None:
            if point == "between rows":
                die()
            super()._read_after(sealed, cursor, db)

    snapshots.rows = Dying
    now = (await append("flights", "UA1", NOON, carrier="UA")).created_at

    refused = await http.post("/v1/snapshots", json={"model": model.model_dump(mode="json"), "snapshot_time": now.isoformat()})

    assert refused.status_code == 503
    assert "shard 1 of 3" in refused.text
    assert "away, and with it the entities it holds" in refused.text


@pytest.mark.parametrize(("copies_count", "factor"), [(False, 1), (True, 2)])
async def test_rows_that_moved_are_in_snapshots_as_before_and_in_segments_once(
    copies_count: bool,
    factor: int,
    databases: list[Any],
    definitions: Definitions,
    model: Model,
    objects: Objects,
    tmp_path: Path,
) -> None:
    """The control: copies that count are sealed where they were stored and where they went."""
    urls = [database.url for database in databases[:2]]
    moving = [entity_id for entity_id in FLIGHTS if ShardRouter(2).place(entity_id) == 1]
    async with AsyncExitStack() as stack:
        owners = await stack.enter_async_context(open_feature_store([database.owner_url for database in databases[:2]]))
        await claim(FeatureStore(owners.shards[:1]))
        await claim(owners)
        store = await stack.enter_async_context(open_feature_store(urls))
        async with store.shards[0].begin() as db:
            for entity_id in moving:
                await rows.append(db, [make_event("flights", entity_id, NOON, {"distance": 1})])
                await rows.append(db, [make_event("arrivals", entity_id, NOON + HOUR, {"late": True})])
        at = await store.pass_snapshot()
        snapshots = Snapshots(store, urls, objects, tmp_path / "work", "256MB")
        plan, label = plan_of(model, definitions), label_of(model.label, definitions)
        before = await snapshots.take(plan, label, at)

        moved = await rebalance(owners)
        assert moved.copied == 2 * len(moving)
        assert (await snapshots.take(plan, label, at)).digest == before.digest
        if copies_count:
            async with owners.shards[1].begin() as db:
                await db.execute(text("UPDATE store.shard SET counts_after = '-infinity'"))
        sealed = await Sealer(store, urls, objects, tmp_path / "work", "256MB").seal(definitions)

        assert sum(segment.n_rows for segment in sealed) == factor * 2 * len(moving)
        assert before.n_rows == len(moving)
        assert copies_count or (await snapshots.take(plan, label, at)).digest == before.digest


@pytest.mark.parametrize("sealed", [False, True])
async def test_an_entity_that_moved_is_forgotten_where_it_was_and_where_it_went(
    sealed: bool, databases: list[Any], definitions: Definitions, objects: Objects, tmp_path: Path
) -> None:
    """Sealed, its rows have left the shard they were copied from; unsealed, they are on both."""
    urls = [database.url for database in databases[:2]]
    who, other = [entity_id for entity_id in FLIGHTS if ShardRouter(2).place(entity_id) == 1][:2]
    events = [make_event("flights", entity_id, NOON, {"distance": 1}) for entity_id in (who, other)]
    async with AsyncExitStack() as stack:
        owners = await stack.enter_async_context(open_feature_store([database.owner_url for database in databases[:2]]))
        await claim(FeatureStore(owners.shards[:1]))
        await claim(owners)
        async with owners.shards[0].begin() as db:
            await rows.append(db, events)
        store = await stack.enter_async_context(open_feature_store(urls))
        if sealed:
            await Sealer(store, urls, objects, tmp_path, "256MB").seal(definitions)
        assert (await rebalance(owners)).left == (0 if sealed else 2)

        assert await Eraser(owners, objects, tmp_path, "256MB").forget("flights", who) == (1 if sealed else 2, int(sealed))
        async with store.shards[1].begin() as db:
            await rows.append(db, events)  # a replay

        for shard in owners.shards:
            async with shard.begin() as db:
                stored = set(await db.scalars(text("SELECT entity_id FROM store.feature_rows")))
                moved = set(await db.scalars(text("SELECT entity_id FROM store.moved")))
            assert stored == ({other} if shard.number == 1 or not sealed else set())
            assert who not in moved
        for path in await objects.list("segments"):
            assert rows_of_entity(await objects.fetch(path, tmp_path), who) == []
