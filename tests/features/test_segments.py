"""Sealing moves history into files: every row into exactly one, whoever seals, is killed, or writes meanwhile."""

import asyncio
import io
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import httpx
import numpy as np
import orjson
import pyarrow
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from adbc_driver_postgresql import dbapi
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from mojomesh_chassis.database import Database, open_database
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import Conflict
from mojomesh_chassis.objects import Objects, open_objects
from mojomesh_contracts.definitions import Model, parse_definition
from mojomesh_contracts.events import FeatureValue
from mojomesh_features.sealing import Due, Sealer
from mojomesh_features.segments import Sent, n_keys
from mojomesh_features.snapshots import Snapshots, label_of
from mojomesh_store import rows as store_rows
from mojomesh_store import segments
from mojomesh_store.segments import Segment
from mojomesh_store.shards import FeatureStore, open_feature_store
from mojomesh_store.tables import FeatureRow
from mojomesh_store.vectors import plan_of
from tests.features.making import NOON, Append, AppendAll, make_event

HOUR = timedelta(hours=1)
NEVER = Due(rows=10**9)


@pytest.fixture
def shard(feature_store: FeatureStore) -> Database:
    return feature_store.shards[0]


@pytest.fixture
async def owner(postgres: Any) -> AsyncIterator[Database]:
    async with open_database(postgres.owner_url) as database:
        yield database


async def some_rows(append_all: AppendAll, n: int = 40, first: int = 0) -> list[FeatureRow]:
    """Flights with weather, crews and labels; some corrected, by the same transaction too."""
    events = []
    for number in range(first, first + n):
        at = NOON + number * HOUR
        events.append(make_event("flights", f"F{number % 7}", at, {"carrier": "UA", "distance": number / 3, "origin": "EWR"}))
        events.append(make_event("weather", "EWR", at, {"temp": number - 5.5, "fog": number % 2 == 0}))
        events.append(make_event("arrivals", f"F{number % 7}", at + HOUR, {"late": number % 3 == 0, "cause": 'a "quote"'}))
        if number % 5 == 0:
            events.append(make_event("weather", "EWR", at, {"temp": 99}))
    return await append_all(events)


async def manifest(shard: Database, feature_set: str) -> list[Segment]:
    async with shard.begin() as db:
        return await segments.segments_of(db, feature_set)


def in_files(objects: Objects, feature_set: str) -> Counter[str]:
    """event_id of every row that a reader of the folder finds."""
    folder = Path(objects.path_of(f"segments/{feature_set}"))
    return Counter(row["event_id"] for file in folder.glob("*") for row in pq.read_table(file, columns=["event_id"]).to_pylist())


def ids(rows: list[FeatureRow], feature_set: str) -> Counter[str]:
    return Counter(str(row.event_id) for row in rows if row.feature_set == feature_set)


async def test_a_segment_holds_its_rows_typed_and_sorted(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, objects: Objects, shard: Database
) -> None:
    rows = await some_rows(append_all)

    await sealer.seal(definitions)

    (segment,) = await manifest(shard, "weather")
    table = pq.read_table(objects.path_of(segment.path))
    keys = ["entity_id", "event_time", "reported_at", "created_at", "seq", "event_id"]
    assert table.schema.names == [*keys, "temp", "fog", "other"]
    assert [str(kind) for kind in table.schema.types[1:4]] == ["timestamp[us, tz=UTC]"] * 3
    found = [(*(row[key] for key in keys), {"temp": row["temp"], "fog": row["fog"]}, row["other"]) for row in table.to_pylist()]
    stored = [row for row in rows if row.feature_set == "weather"]
    expected = [(*row[1:6], str(row.event_id), {"temp": row.values["temp"], "fog": row.values.get("fog")}, None) for row in stored]
    assert found == sorted(expected, key=lambda row: (row[0], row[1], row[3], row[4]))
    assert (segment.n_rows, segment.n_tied) == (48, 8)
    assert (segment.first_event_time, segment.last_event_time) == (NOON, NOON + 39 * HOUR)


async def test_what_has_no_column_is_kept_beside_the_columns(
    sealer: Sealer, append: Append, definitions: Definitions, objects: Objects, shard: Database, snapshots: Snapshots, model: Model
) -> None:
    """A feature that the sealer did not know, and names that differ by case only."""
    crews = parse_definition(
        {"kind": "FeatureSet", "name": "crews", "entity": "flight_id", "features": {"Seq": {"type": "number"}, "a": {"type": "number"}}}
    )
    grown = definitions.feature_set("crews")
    definitions.put(crews, 2)
    await append("flights", "A", NOON, distance=1)
    await append("arrivals", "A", NOON, late=True)
    row = await append("crews", "A", NOON, Seq=1, a=2.5, size=3)
    await sealer.seal(definitions)
    definitions.put(grown, 3)

    (segment,) = await manifest(shard, "crews")
    (found,) = pq.read_table(objects.path_of(segment.path)).to_pylist()
    taken = await take(snapshots, model, definitions, row.created_at)

    assert (found["a"], found["other"]) == (2.5, '{"Seq":1,"size":3}')
    assert pq.read_table(objects.path_of(taken.path))["crews.size"].to_pylist() == [3]


ODD: list[dict[str, FeatureValue]] = [
    {"temp": 1.5, "fog": True},
    {"temp": None, "fog": None},
    {"temp": None, "wind": 7},  # as many keys as columns
    {"temp": 2, "fog": False, "wind": 'at "night": strong'},
    {"fog": True, 'a "key": with "': '": '},
    {"wind": None},
    {"Temp": 3},
    {},
]


def not_missing(values: Mapping[str, FeatureValue]) -> dict[str, FeatureValue]:
    return {name: value for name, value in values.items() if value is not None}


async def test_whatever_a_vector_looks_like_nothing_of_it_is_lost(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, objects: Objects, shard: Database
) -> None:
    await append_all(make_event("weather", "EWR", NOON + n * HOUR, values) for n, values in enumerate(ODD))

    await sealer.seal(definitions)

    (segment,) = await manifest(shard, "weather")
    for values, row in zip(ODD, pq.read_table(objects.path_of(segment.path)).to_pylist(), strict=True):
        found = {"temp": row["temp"], "fog": row["fog"]} | orjson.loads(row["other"] or "{}")
        assert not_missing(found) == not_missing(values)


@pytest.mark.parametrize("longest", [{}, {"a": '":' * 255}, {f"{n}": n for n in range(256)}], ids=["short", "one text", "many keys"])
def test_keys_are_never_counted_too_few(longest: dict[str, Any]) -> None:
    rng = random.Random(0)
    some = ["".join(rng.choices('a":\\ é', k=rng.randrange(8))) for _ in range(500)]
    vectors: list[dict[str, Any]] = [
        longest,
        *(dict(zip(rng.sample(some, n := rng.randrange(4)), rng.sample(some, n), strict=True)) for _ in range(2000)),
    ]
    rng.shuffle(vectors)
    texts = pyarrow.array([json.dumps(vector, ensure_ascii=False) for vector in vectors], pyarrow.string())

    counted = n_keys(pyarrow.ExtensionArray.from_storage(pyarrow.json_(pyarrow.string()), texts)[7:])

    assert all(found >= len(vector) for found, vector in zip(counted, vectors[7:], strict=True))
    assert np.mean([found == len(vector) for found, vector in zip(counted, vectors[7:], strict=True)]) > 0.5


# Longer than one batch of what PostgreSQL sends, whose entities begin with the same text; then such as come before, between and after them.
MANY = """
    INSERT INTO store.feature_rows (feature_set, entity_id, event_time, reported_at, created_at, event_id, "values")
    SELECT 'arrivals',
        CASE WHEN n < 39000 THEN 'flight-' || n % 7000 ELSE (ARRAY['aa', 'flight', 'flight-', 'flight-é', 'flight.', 'é'])[n % 6 + 1] END,
        now() + n % 3 * interval '1 hour', now(), now(), gen_random_uuid(), jsonb_build_object('cause', repeat('x', 1000))
    FROM generate_series(1, 40000) AS n
"""


async def test_entities_lie_in_order_whatever_those_that_came_first_begin_with(
    sealer: Sealer, definitions: Definitions, objects: Objects, owner: Database, shard: Database
) -> None:
    async with owner.begin() as db:
        await db.execute(text(MANY))

    await sealer.seal(definitions)

    (segment,) = await manifest(shard, "arrivals")
    with duckdb.connect() as db_:
        db_.execute(f"SELECT entity_id, epoch_us(event_time), epoch_us(created_at), seq FROM '{objects.path_of(segment.path)}'")
        found = db_.fetchall()
    assert len(found) == 40_000
    assert found == sorted(found)


async def test_a_reading_that_breaks_off_is_not_taken_for_the_end(owner: Database, postgres: Any, shard: Database) -> None:
    async with owner.begin() as db:
        await db.execute(text(MANY))
    with dbapi.connect(postgres.url) as connection, closing(connection.cursor()) as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (process,) = cursor.fetchone()
        cursor.execute("""SELECT entity_id, seq, "values" AS vector FROM store.feature_rows""")
        sent = Sent(cursor.fetch_record_batch())
        async with shard.begin() as db:
            await db.execute(text("SELECT pg_terminate_backend(:process)"), {"process": process})

        with pytest.raises(OSError, match="libpq"):
            list(sent.counted())
    assert sent.n_rows < 40_000


class Lossy(Objects):
    """An object store in which a segment has a row less than was put there."""

    async def create(self, key: str, content: bytes | Path) -> bool:
        assert isinstance(content, Path)
        table = pq.read_table(content)
        pq.write_table(table.slice(1), content)
        return await super().create(key, content)


async def test_a_file_that_lost_a_row_on_the_way_is_not_registered(
    feature_store: FeatureStore, postgres: Any, append_all: AppendAll, definitions: Definitions, shard: Database, tmp_path: Path
) -> None:
    await some_rows(append_all)
    objects = Lossy((tmp_path / "objects").as_uri())

    with pytest.raises(Conflict, match="holds other rows than PostgreSQL"):
        await Sealer(feature_store, [postgres.url], objects, tmp_path / "work", "256MB").seal(definitions)
    assert await manifest(shard, "flights") == []


async def test_segments_follow_each_other_and_hold_every_row_once(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, objects: Objects, shard: Database
) -> None:
    rows = []
    for n in range(3):
        rows += await some_rows(append_all, first=40 * n)
        await sealer.seal(definitions)
    assert await sealer.seal(definitions) == []

    for feature_set in ("flights", "weather", "arrivals"):
        found = await manifest(shard, feature_set)
        assert [segment.follows for segment in found] == [None, *(segment.created_until for segment in found[:-1])]
        assert in_files(objects, feature_set) == ids(rows, feature_set)
    assert await manifest(shard, "crews") == []


async def test_a_long_tail_becomes_several_segments(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, objects: Objects, owner: Database
) -> None:
    rows = await some_rows(append_all)
    async with owner.begin() as db:  # as if they had come in over ten seconds
        await db.execute(text("UPDATE store.feature_rows SET created_at = created_at - (seq % 10) * interval '1 second'"))

    sealed = await sealer.seal(definitions, most_rows=15)

    of_flights = [segment.n_rows for segment in sealed if segment.feature_set == "flights"]
    assert (sum(of_flights), max(of_flights) < 15 + 10, len(of_flights) > 1) == (40, True, True)
    assert in_files(objects, "flights") == ids(rows, "flights")


async def test_what_is_not_due_waits(sealer: Sealer, append_all: AppendAll, definitions: Definitions, owner: Database) -> None:
    await some_rows(append_all)
    assert await sealer.seal(definitions, NEVER) == []
    assert {segment.feature_set for segment in await sealer.seal(definitions, Due(rows=48))} == {"weather"}
    async with owner.begin() as db:
        await db.execute(text("UPDATE store.feature_rows SET created_at = created_at - interval '1 hour' WHERE feature_set = 'flights'"))
    assert {segment.feature_set for segment in await sealer.seal(definitions, Due(10**9, HOUR))} == {"flights"}


async def take(snapshots: Snapshots, model: Model, definitions: Definitions, snapshot_time: datetime) -> Any:
    return await snapshots.take(plan_of(model, definitions), label_of(model.label, definitions), snapshot_time)


async def test_a_snapshot_is_the_same_from_the_tail_from_segments_and_from_both(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, snapshots: Snapshots, model: Model, owner: Database
) -> None:
    first = (await some_rows(append_all))[-1].created_at
    by_row = model.model_copy(update={"known_at": "row"})
    from_tail = [await take(snapshots, model, definitions, first), await take(snapshots, by_row, definitions, first)]
    await sealer.seal(definitions)
    second = (await some_rows(append_all, first=40))[-1].created_at
    all_from_both = await take(snapshots, model, definitions, second)
    await sealer.seal(definitions)
    async with owner.begin() as db:
        await db.execute(text("TRUNCATE store.feature_rows"))  # nothing is left but the segments

    assert [await take(snapshots, model, definitions, first), await take(snapshots, by_row, definitions, first)] == from_tail
    assert await take(snapshots, model, definitions, second) == all_from_both
    assert 0 < from_tail[0].n_rows < all_from_both.n_rows


async def test_segments_in_a_store_that_is_no_folder_are_read_as_well(
    feature_store: FeatureStore, postgres: Any, append_all: AppendAll, definitions: Definitions, model: Model, tmp_path: Path
) -> None:
    objects = open_objects("memory:///mesh")
    snapshots = Snapshots(feature_store, [postgres.url], objects, tmp_path / "work", "256MB")
    at = (await some_rows(append_all))[-1].created_at
    from_tail = await take(snapshots, model, definitions, at)

    await Sealer(feature_store, [postgres.url], objects, tmp_path / "work", "256MB").seal(definitions)

    assert await objects.list("segments/flights") == ["segments/flights/0-0000000000000000.parquet"]
    assert not await objects.create("segments/flights/0-0000000000000000.parquet", b"another")
    assert await take(snapshots, model, definitions, at) == from_tail


async def test_the_digest_of_a_known_table_is_what_it_always_was(
    snapshots: Snapshots, append_all: AppendAll, definitions: Definitions, model: Model
) -> None:
    """Manifests of bundles keep digests: the way they are made must not change."""
    taken = await take(snapshots, model, definitions, (await some_rows(append_all))[-1].created_at)

    assert taken.digest == "cda979854c7737211cad0941dcb41eb1fb8729ec33e9a3b03316fee502fd4039"


# Writers in flight


async def test_sealing_waits_for_a_slow_writer(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, objects: Objects, shard: Database
) -> None:
    async with shard.begin() as db:
        rows = await store_rows.append(db, [make_event("flights", "slow", NOON, {"distance": 1})])
        rows += await some_rows(append_all)
        task = asyncio.create_task(sealer.seal(definitions))
        await asyncio.sleep(0.1)
        assert not task.done()
    await task

    assert in_files(objects, "flights") == ids(rows, "flights")


async def test_without_the_passage_a_slow_writers_row_is_in_no_segment(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, objects: Objects, shard: Database, feature_store: FeatureStore
) -> None:
    """The control: a watermark that did not wait for those on the way."""
    async with shard.begin() as db:
        rows = await store_rows.append(db, [make_event("flights", "slow", NOON, {"distance": 1})])
        rows += await some_rows(append_all)
        async with shard.begin() as other:
            watermark = await store_rows.snapshot_clock(other)
        await sealer._seal_next(feature_store.shards[0], definitions.feature_set("flights"), watermark, Due(), 10**6)
    await sealer.seal(definitions)

    assert in_files(objects, "flights") != ids(rows, "flights")


# Two sealers, and killed ones


async def test_sealers_at_once_seal_every_row_once(
    feature_store: FeatureStore, postgres: Any, append_all: AppendAll, definitions: Definitions, objects: Objects, tmp_path: Path
) -> None:
    rows = await some_rows(append_all)
    sealers = [Sealer(feature_store, [postgres.url], objects, tmp_path / str(n), "256MB") for n in range(3)]

    await asyncio.gather(*(one.seal(definitions) for one in sealers))

    for feature_set in ("flights", "weather", "arrivals"):
        assert in_files(objects, feature_set) == ids(rows, feature_set)


async def test_no_two_segments_begin_at_the_same_place(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, shard: Database
) -> None:
    await some_rows(append_all)
    (first, *_) = await sealer.seal(definitions)
    rivals = [first._replace(created_until=first.created_until + HOUR), first._replace(follows=NOON)]

    for rival in rivals:
        with pytest.raises(IntegrityError):
            async with shard.begin() as db:
                await segments.register(db, rival)


async def test_a_file_of_another_store_is_not_taken_for_ours_and_keeps_no_other_set_from_being_sealed(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, owner: Database, shard: Database
) -> None:
    await append_all([make_event("flights", "F1", NOON, {"carrier": "UA"})])
    await sealer.seal(definitions)
    async with owner.begin() as db:
        await db.execute(text("TRUNCATE store.segments, store.feature_rows"))
    await some_rows(append_all, n=3)

    with pytest.raises(Conflict, match="belongs to another feature store"):
        await sealer.seal(definitions)
    assert await manifest(shard, "flights") == []
    assert [segment.n_rows for segment in await manifest(shard, "arrivals")] == [3]


async def test_in_s3_segments_and_snapshots_are_what_they_are_in_a_folder(
    snapshots: Snapshots,
    feature_store: FeatureStore,
    postgres: Any,
    append_all: AppendAll,
    definitions: Definitions,
    model: Model,
    s3: str,
    tmp_path: Path,
) -> None:
    rows = await some_rows(append_all)
    before = await take(snapshots, model, definitions, rows[-1].created_at)
    objects = open_objects(s3)

    await Sealer(feature_store, [postgres.url], objects, tmp_path / "work", "256MB").seal(definitions)
    after = await take(
        Snapshots(feature_store, [postgres.url], objects, tmp_path / "work", "256MB"), model, definitions, rows[-1].created_at
    )

    segment = await objects.get("segments/flights/0-0000000000000000.parquet")
    assert Counter(pq.read_table(io.BytesIO(segment))["event_id"].to_pylist()) == ids(rows, "flights")
    assert after == before
    assert await objects.exists(after.path)


SEALS = """
import asyncio, sys
from pathlib import Path
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.faults import arm_faults
from mojomesh_chassis.objects import open_objects
from mojomesh_contracts.definitions import parse_definitions
from mojomesh_features.sealing import Sealer
from mojomesh_store.shards import open_feature_store
from tests.features.making import DEFINITIONS

url, objects, folder = sys.argv[1:4]
arm_faults(Path(folder))

async def main():
    async with open_feature_store([url]) as store:
        await Sealer(store, [url], open_objects(objects), Path(folder), "256MB").seal(Definitions(*parse_definitions(DEFINITIONS)))

asyncio.run(main())
"""


@pytest.mark.parametrize("point", ["before_upload", "before_register", "after_register"])
async def test_a_sealer_killed_anywhere_loses_and_doubles_nothing(
    point: str,
    sealer: Sealer,
    append_all: AppendAll,
    definitions: Definitions,
    objects: Objects,
    postgres: Any,
    mesh_env: dict[str, str],
    tmp_path: Path,
) -> None:
    rows = await some_rows(append_all)
    (tmp_path / f"features.{point}").touch()
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        SEALS,
        postgres.url,
        mesh_env["MOJOMESH_OBJECTS"],
        str(tmp_path),
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    assert await child.wait() == -signal.SIGKILL
    rows += await some_rows(append_all, first=40)

    await sealer.seal(definitions)

    for feature_set in ("flights", "weather", "arrivals"):
        assert in_files(objects, feature_set) == ids(rows, feature_set)


# What others see


async def test_other_tools_open_the_folder_as_a_table(
    sealer: Sealer, append_all: AppendAll, definitions: Definitions, objects: Objects
) -> None:
    rows = await some_rows(append_all)
    await sealer.seal(definitions)
    rows += await some_rows(append_all, first=40)
    await sealer.seal(definitions)
    folder = objects.path_of("segments/flights")

    assert pyarrow.dataset.dataset(folder, format="parquet").count_rows() == ids(rows, "flights").total()
    with duckdb.connect() as db:
        db.execute(f"SELECT count(*), count(DISTINCT distance) FROM read_parquet('{folder}/*.parquet', union_by_name = true)")
        assert db.fetchall() == [(80, 80)]


async def test_the_door_seals_what_is_known(
    http: httpx.AsyncClient, append_all: AppendAll, mesh_env: dict[str, str], shard: Database
) -> None:
    await some_rows(append_all)

    assert (await http.post("/v1/segments:seal")).status_code == 401
    reply = await http.post("/v1/segments:seal", headers={"Authorization": f"Bearer {mesh_env['MOJOMESH_TOKEN']}"})

    assert [(new["feature_set"], new["n_rows"]) for new in reply.json()["segments"]] == [("flights", 40), ("weather", 48), ("arrivals", 40)]
    assert [segment.path for segment in await manifest(shard, "flights")] == [reply.json()["segments"][0]["path"]]


async def test_rows_of_every_shard_are_sealed_and_read(
    new_postgres: Any, definitions: Definitions, objects: Objects, model: Model, tmp_path: Path
) -> None:
    urls = [new_postgres().url, new_postgres().url]
    async with open_feature_store(urls) as store:
        facts = [make_event("flights", f"F{n}", NOON, {"distance": n}) for n in range(30)]
        facts += [make_event("arrivals", f"F{n}", NOON + HOUR, {"late": n % 2 == 0}) for n in range(30)]
        for shard, part in store.split(facts):
            async with shard.begin() as db:
                await store_rows.append(db, part)
        snapshots = Snapshots(store, urls, objects, tmp_path / "work", "256MB")
        at = await store.pass_snapshot()
        from_tail = await take(snapshots, model, definitions, at)

        sealed = await Sealer(store, urls, objects, tmp_path / "work", "256MB").seal(definitions)

        assert sum(segment.n_rows for segment in sealed) == 60
        assert len({segment.path for segment in sealed}) == 4
        assert await take(snapshots, model, definitions, at) == from_tail
        assert from_tail.n_rows == 30
