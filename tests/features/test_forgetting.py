"""Forgetting an entity: nothing of it is left anywhere, nothing else is touched, and it does not come back."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import duckdb
import httpx
import pytest
from redis.asyncio import Redis
from sqlalchemy import text
from typer.testing import CliRunner

from mojomesh_chassis.database import Database, open_database
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.objects import Objects
from mojomesh_cli.forgetting import Forgotten, Places, forget
from mojomesh_cli.main import app
from mojomesh_contracts.bundles import SnapshotTaken
from mojomesh_contracts.definitions import FeatureSet, Model, definition_id
from mojomesh_contracts.events import DefinitionApplied, EventReceived, PredictionsMade
from mojomesh_features import tables
from mojomesh_features.reading import FeatureReader
from mojomesh_features.sealing import Sealer
from mojomesh_features.snapshots import Snapshots, label_of
from mojomesh_ingest import quarantine
from mojomesh_store import erasure, segments
from mojomesh_store import rows as store_rows
from mojomesh_store.online import OnlineStore, microseconds
from mojomesh_store.shards import FeatureStore, open_feature_store
from mojomesh_store.tables import FeatureRow
from mojomesh_store.vectors import plan_of
from tests.features.making import NOON, Append, AppendAll, make_block, make_event, make_predictions, make_promotion

WHO = "somebody-known"
HOUR = timedelta(hours=1)
TABLES = ("store.feature_rows", "store.moved", "features.predictions", "features.counted", "ingest.quarantine", "ingest.outbox")


@pytest.fixture
async def places(postgres: Any, online: OnlineStore, objects: Objects, tmp_path: Path) -> AsyncIterator[Places]:
    async with open_feature_store([postgres.owner_url]) as store:
        yield Places(store, online, objects, tmp_path / "work")


@pytest.fixture
async def owner(postgres: Any) -> AsyncIterator[Database]:
    async with open_database(postgres.owner_url) as database:
        async with database.begin() as db:  # as while its rows are moved to another shard
            await db.execute(text("INSERT INTO store.moved VALUES (:who, 2)"), {"who": WHO})
        yield database


class History:
    """What the mesh knows of somebody and of others, in every place there is."""

    def __init__(self, feature_store: FeatureStore, append_all: AppendAll, sealer: Sealer, snapshots: Snapshots) -> None:
        self._store, self._append_all, self._sealer, self._snapshots = feature_store, append_all, sealer, snapshots
        self.events: list[EventReceived] = []
        self.rows: list[FeatureRow] = []
        self.block = self._block()

    async def make(self, definitions: Definitions, model: Model, reader: FeatureReader) -> SnapshotTaken:
        """Sealed rows, a tail, a held event and one let go, receipts, an entry in Redis, and a snapshot."""
        for first in (0, 5):
            events = _events(first)
            self.events += events
            self.rows += await self._append_all(events)
            if first == 0:
                await self._sealer.seal(definitions)
        plan = plan_of(model, definitions)
        taken = await self._snapshots.take(plan, label_of(model.label, definitions), self.rows[-1].created_at)
        held = [make_event("flights", WHO, NOON + n * HOUR, {"distance": 9e9}) for n in (20, 21)]
        async with self._store.shards[0].begin() as db:
            await quarantine.hold(db, {store_rows.row_id(event): (event, {"distance": "is odd"}) for event in held})
            await quarantine.release(db, None, [held[0].event_id], 1)
        self.events += held
        async with self._store.shards[0].begin() as db:
            await tables.save_predictions(db, [self.block])
            await db.execute(
                text("""
                    INSERT INTO features.counted SELECT model, coalesce(entity_id, ''), event_time, 1, seq, prediction_id
                    FROM features.predictions
                """)
            )
        for _ in range(2):  # the first read of all makes the generation, what follows is kept
            await reader.at([((name, who), microseconds(NOON)) for name in ("flights", "crews") for who in (WHO, "F1")])
        return taken

    def _block(self) -> PredictionsMade:
        own, used, other = make_predictions(3)
        key = {"feature_set": "crews", "entity_id": WHO, "event_time": NOON, "created_at": NOON, "seq": 1}
        return make_block(
            [
                own.model_copy(update={"entity_id": WHO}),
                type(used).model_validate(used.model_dump() | {"entity_id": "F2", "rows": [key]}),
                other.model_copy(update={"entity_id": "F1"}),
            ]
        )


def _events(first: int) -> list[EventReceived]:
    made = []
    for number in range(first, first + 5):
        at = NOON + number * HOUR
        for who in (WHO, "F1"):
            made.append(make_event("flights", who, at, {"carrier": "UA", "distance": number, "origin": "EWR"}))
            made.append(make_event("arrivals", who, at + HOUR, {"late": number % 2 == 0}))
            made.append(make_event("crews", who, at, {"size": number}))
        made.append(make_event("weather", "EWR", at, {"temp": number}))
    return made


@pytest.fixture
def history(feature_store: FeatureStore, append_all: AppendAll, sealer: Sealer, snapshots: Snapshots) -> History:
    return History(feature_store, append_all, sealer, snapshots)


async def traces(owner: Database, redis: Redis, objects: Objects) -> set[str]:
    """Every table, folder of files, and Redis, where the name is still found."""
    found = set()
    async with owner.begin() as db:
        for table in TABLES:
            if (await db.execute(text(f"SELECT 1 FROM {table} AS t WHERE t::text LIKE '%{WHO}%' LIMIT 1"))).first():
                found.add(table)
    if any([WHO in str(key) or WHO in str(await redis.get(key)) for key in await redis.keys("*")]):
        found.add("redis")
    for path in [*await objects.list("segments"), *await objects.list("snapshots")]:
        with duckdb.connect() as db:
            if db.execute(f"SELECT 1 FROM '{objects.path_of(path)}' WHERE entity_id = '{WHO}' LIMIT 1").fetchone():
                found.add("/".join(path.split("/")[:2]))
    return found


EVERYWHERE = {*TABLES, "redis", "segments/flights", "segments/arrivals", "segments/crews", "snapshots/delay"}


async def forget_all(places: Places, definitions: Definitions) -> Forgotten:
    return await forget(places, definitions, WHO, list(definitions.feature_sets))


async def test_nothing_is_left_of_who_is_forgotten_and_all_of_the_others(
    history: History,
    definitions: Definitions,
    model: Model,
    reader: FeatureReader,
    places: Places,
    owner: Database,
    redis: Redis,
    objects: Objects,
    snapshots: Snapshots,
    sealer: Sealer,
) -> None:
    await history.make(definitions, model, reader)
    assert await traces(owner, redis, objects) == EVERYWHERE  # the control: the search finds what is there

    forgotten = await forget_all(places, definitions)

    assert await traces(owner, redis, objects) == set()
    assert forgotten == Forgotten({"flights": 10, "weather": 0, "crews": 10, "arrivals": 10}, 3, 1, 2, 2)
    others = [row for row in history.rows if row.entity_id != WHO]
    async with owner.begin() as db:
        stored = set((await db.execute(text("SELECT event_id FROM store.feature_rows"))).scalars())
        receipts = (await db.execute(text("SELECT prediction_id FROM features.predictions WHERE forgotten_at IS NULL"))).scalars().all()
    assert stored == {row.event_id for row in others}
    assert receipts == [history.block.predictions[2].prediction_id]
    assert await reader.at([(("flights", WHO), microseconds(NOON))]) == {(("flights", WHO), microseconds(NOON)): None}
    assert (await forget_all(places, definitions)).rows == dict.fromkeys(definitions.feature_sets, 0)

    # What is sealed goes on to be sealed, and read.
    await sealer.seal(definitions)
    taken = await snapshots.take(plan_of(model, definitions), label_of(model.label, definitions), history.rows[-1].created_at)
    assert taken.n_rows == 10


async def test_a_snapshot_says_that_it_has_been_affected(
    history: History,
    definitions: Definitions,
    model: Model,
    reader: FeatureReader,
    places: Places,
    snapshots: Snapshots,
    http: httpx.AsyncClient,
) -> None:
    taken = await history.make(definitions, model, reader)

    async def affected(at: datetime) -> list[Any]:
        query = {"model": model.model_dump(mode="json"), "snapshot_time": at.isoformat()}
        found: list[Any] = (await http.post("/v1/snapshots:erasures", json=query)).json()["erasures"]
        return found

    assert taken.erasures == await affected(taken.snapshot_time) == []
    await forget_all(places, definitions)

    again = await snapshots.take(plan_of(model, definitions), label_of(model.label, definitions), taken.snapshot_time)
    assert again.digest != taken.digest
    assert again.erasures
    assert len(await affected(taken.snapshot_time)) == len(again.erasures)
    assert await affected(history.rows[0].created_at - timedelta(microseconds=1)) == []
    assert await affected(await places.feature_store.pass_snapshot()) == []


class Held(Objects):
    """An object store that replaces no segment until it is let go."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked, self.let_go = asyncio.Event(), asyncio.Event()

    async def put(self, key: str, content: bytes | Path) -> None:
        self.asked.set()
        await self.let_go.wait()
        await super().put(key, content)


async def test_a_snapshot_taken_while_somebody_is_being_forgotten_says_so(
    history: History,
    definitions: Definitions,
    model: Model,
    reader: FeatureReader,
    places: Places,
    snapshots: Snapshots,
    mesh_env: dict[str, str],
) -> None:
    await history.make(definitions, model, reader)
    held = Held(mesh_env["MOJOMESH_OBJECTS"])

    async def take(at: datetime) -> SnapshotTaken:
        return await snapshots.take(plan_of(model, definitions), label_of(model.label, definitions), at)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(forget(replace(places, objects=held), definitions, WHO, ["flights"]))
        await held.asked.wait()
        at = await places.feature_store.pass_snapshot()
        during = await take(at)
        held.let_go.set()
    again = await take(at)

    assert again.digest != during.digest
    (erased_at,), (told_meanwhile,) = again.erasures, during.erasures
    assert at <= told_meanwhile <= erased_at
    assert (await take(await places.feature_store.pass_snapshot())).erasures == []


async def test_what_comes_again_is_not_stored_again_and_what_is_new_is(
    history: History, definitions: Definitions, model: Model, reader: FeatureReader, places: Places, owner: Database, append_all: AppendAll
) -> None:
    await history.make(definitions, model, reader)
    own = [event for event in history.events if event.entity_id == WHO]
    await forget_all(places, definitions)

    assert await append_all(own) == []
    async with owner.begin() as db:
        await tables.save_predictions(db, [history.block])
        await tables.count_predictions(db, make_promotion(), [history.block])
        assert await tables.prediction_of(db, history.block.predictions[0].prediction_id) is not None
    new = make_event("flights", WHO, NOON, {"distance": 1})
    assert [row.event_id for row in await append_all([new])] == [new.event_id]
    async with owner.begin() as db:
        for table in ("predictions", "counted"):
            assert not (await db.execute(text(f"SELECT 1 FROM features.{table} AS t WHERE t::text LIKE '%{WHO}%'"))).first()
    await forget_all(places, definitions)

    async with owner.begin() as db:
        # The control: without the ids that stay, all would come back.
        await db.execute(text("TRUNCATE store.retired_events"))
    assert len(await append_all(own)) == len(own)


async def test_who_was_counted_again_after_being_forgotten_can_be_forgotten_again(
    history: History,
    definitions: Definitions,
    model: Model,
    reader: FeatureReader,
    places: Places,
    owner: Database,
    redis: Redis,
    objects: Objects,
) -> None:
    await history.make(definitions, model, reader)
    await forget_all(places, definitions)
    (forgotten, *_) = history.block.predictions
    again = "INSERT INTO features.counted VALUES ('delay', :who, :event_time, 1, 100, :prediction_id)"
    async with owner.begin() as db:  # as it was before forgotten predictions were left out
        await db.execute(text(again), {"who": WHO, "event_time": forgotten.event_time, "prediction_id": forgotten.prediction_id})

    await forget_all(places, definitions)

    assert await traces(owner, redis, objects) == set()


@pytest.mark.parametrize("registered", [True, False])
async def test_after_a_file_that_held_nobody_else_sealing_goes_on(
    registered: bool, append: Append, sealer: Sealer, definitions: Definitions, places: Places, owner: Database, objects: Objects
) -> None:
    await append("flights", WHO, distance=1)
    (before,) = await sealer.seal(definitions)
    if not registered:  # as a sealer leaves it that is killed before
        async with owner.begin() as db:
            await db.execute(text("TRUNCATE store.segments"))

    await forget_all(places, definitions)
    assert await objects.exists(before.path) == registered  # what the manifest names must be there

    row = await append("flights", "F1", distance=1)
    (sealed,) = await sealer.seal(definitions)
    assert (sealed.path == before.path) != registered
    assert (sealed.n_rows, sealed.sum_of_seqs) == (1, row.seq)


async def test_a_load_that_was_on_its_way_is_not_kept(
    history: History, definitions: Definitions, model: Model, reader: FeatureReader, places: Places, online: OnlineStore
) -> None:
    await history.make(definitions, model, reader)
    (window,) = await online.windows([("flights", WHO)])
    lease = await online.lease([("flights", WHO)])
    assert window is not None

    await forget_all(places, definitions)
    await online.keep(lease, {("flights", WHO): window}, 1.0)

    assert await online.windows([("flights", WHO)]) == [None]
    await online.keep(await online.lease([("flights", WHO)]), {("flights", WHO): window}, 1.0)
    assert await online.windows([("flights", WHO)]) == [window]  # the control: a load of now is


async def test_the_service_role_cannot_erase(history: History, feature_store: FeatureStore) -> None:
    with pytest.raises(TransientError, match="privilege"):
        async with feature_store.shards[0].begin() as db:
            await erasure.forget_rows(db, "flights", WHO)


FORGETS = """
import asyncio, sys
from pathlib import Path
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.faults import arm_faults
from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.redis import open_redis
from mojomesh_cli.forgetting import Places, forget
from mojomesh_contracts.definitions import parse_definitions
from mojomesh_store.online import OnlineStore
from mojomesh_store.shards import open_feature_store
from tests.features.making import DEFINITIONS

owner, redis, objects, folder, who = sys.argv[1:]
arm_faults(Path(folder))
definitions = Definitions(*parse_definitions(DEFINITIONS))

async def main():
    async with open_feature_store([owner]) as store, open_redis(redis) as client:
        places = Places(store, OnlineStore(client), open_objects(objects), Path(folder) / "work")
        await forget(places, definitions, who, list(definitions.feature_sets))

asyncio.run(main())
"""


@pytest.mark.parametrize("point", ["erasure_recorded", "segment_erased", "before_erasure", "after_erasure"])
async def test_killed_anywhere_the_next_call_finishes_it(
    point: str,
    history: History,
    definitions: Definitions,
    model: Model,
    reader: FeatureReader,
    places: Places,
    owner: Database,
    redis: Redis,
    redis_url: str,
    objects: Objects,
    postgres: Any,
    mesh_env: dict[str, str],
    tmp_path: Path,
    snapshots: Snapshots,
    sealer: Sealer,
) -> None:
    taken = await history.make(definitions, model, reader)
    async with owner.begin() as db:  # rows that are nowhere but in segments
        await db.execute(text("DELETE FROM store.feature_rows WHERE seq <= :seq"), {"seq": history.rows[34].seq})
    (tmp_path / f"store.{point}").touch()
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FORGETS, postgres.owner_url, redis_url, mesh_env["MOJOMESH_OBJECTS"], str(tmp_path), WHO),
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert await child.wait() == -signal.SIGKILL
    assert await traces(owner, redis, objects) > {"snapshots/delay", "features.predictions"}  # the control: it was not done
    plan = plan_of(model, definitions)
    meanwhile = await places.feature_store.pass_snapshot()
    assert await snapshots.erasures(plan, meanwhile) != []
    assert len(list(places.work_folder.iterdir())) == 1

    await forget_all(places, definitions)

    assert list(places.work_folder.iterdir()) == []
    assert await snapshots.erasures(plan, meanwhile) != []
    assert await snapshots.erasures(plan, await places.feature_store.pass_snapshot()) == []
    assert await traces(owner, redis, objects) == set()
    async with owner.begin() as db:
        named = {segment.path: segment for name in definitions.feature_sets for segment in await segments.segments_of(db, name)}
    for path, segment in named.items():
        with duckdb.connect() as files:
            assert files.execute(f"SELECT count(*), sum(seq)::BIGINT FROM '{objects.path_of(path)}'").fetchone() == segment[5:8:2]
    again = await snapshots.take(plan, label_of(model.label, definitions), taken.snapshot_time)
    assert again.erasures
    assert again.n_rows == 10


async def test_the_command_asks_and_forgets(
    history: History,
    definitions: Definitions,
    model: Model,
    reader: FeatureReader,
    owner: Database,
    redis: Redis,
    redis_url: str,
    objects: Objects,
    postgres: Any,
    mesh_env: dict[str, str],
    kafka: str,
    records: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    await history.make(definitions, model, reader)
    declared: list[FeatureSet | Model] = [*definitions.feature_sets.values(), model]
    for document in declared:
        applied = {"definition_id": definition_id(document), "version": 1, "definition": document.model_dump(mode="json")}
        await records.publish(DefinitionApplied(event_id=uuid4(), **applied))
    own = {"MOJOMESH_KAFKA": kafka, "MOJOMESH_REDIS": redis_url, "MOJOMESH_POSTGRES_OWNER": postgres.owner_url}
    folders = {"MOJOMESH_STATE": str(tmp_path / "state"), "FEATURES_WORK_FOLDER": str(tmp_path / "work")}
    for name, value in (mesh_env | own | folders).items():
        monkeypatch.setenv(name, value)

    refused = await asyncio.to_thread(CliRunner().invoke, app, ["store", "forget", WHO], "n\n")
    assert (refused.exit_code, await traces(owner, redis, objects)) == (1, EVERYWHERE)
    one_set = await asyncio.to_thread(CliRunner().invoke, app, ["store", "forget", WHO, "--yes", "--json", "--feature-set", "crews"])
    assert json.loads(one_set.stdout)["rows"] == {"crews": 10}
    done = await asyncio.to_thread(CliRunner().invoke, app, ["store", "forget", WHO, "--yes"])

    assert "Erased rows: 10 of flights, 10 of arrivals. Held events: 2." in done.stdout
    assert await traces(owner, redis, objects) == set()
