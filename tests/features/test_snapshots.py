"""A snapshot holds what its definition says, from what was known at its time, and stays the same for ever."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import PermanentError
from mojomesh_chassis.objects import Objects
from mojomesh_contracts.bundles import SnapshotTaken
from mojomesh_contracts.definitions import Model
from mojomesh_contracts.events import EventReceived
from mojomesh_features import joining
from mojomesh_features.reading import FeatureReader
from mojomesh_features.snapshots import Snapshots, label_of
from mojomesh_store import rows as store_rows
from mojomesh_store.errors import UnusableDefinition
from mojomesh_store.shards import FeatureStore, open_feature_store
from mojomesh_store.vectors import Vector, plan_of
from tests.features.definition import TrainingRow, as_learned
from tests.features.making import NOON, Append, AppendAll, make_event

HOUR = timedelta(hours=1)


async def take(snapshots: Snapshots, model: Model, definitions: Definitions, snapshot_time: datetime) -> SnapshotTaken:
    return await snapshots.take(plan_of(model, definitions), label_of(model.label, definitions), snapshot_time)


def rows_of(objects: Objects, taken: SnapshotTaken) -> list[TrainingRow]:
    rows: list[TrainingRow] = pq.read_table(objects.path_of(taken.path)).to_pylist()
    assert len(rows) == taken.n_rows
    return rows


async def some_history(append_all: AppendAll) -> datetime:
    events = [make_event("flights", f"F{n}", NOON + n * HOUR, {"carrier": "UA", "distance": n, "origin": "EWR"}) for n in range(20)]
    events += [make_event("weather", "EWR", NOON + n * HOUR, {"temp": n / 2}) for n in range(20)]
    events += [make_event("arrivals", f"F{n}", NOON + (n + 2) * HOUR, {"late": n % 3 == 0}) for n in range(15)]
    return (await append_all(events))[0].created_at


async def test_taken_again_it_is_the_same_whatever_became_known_since(
    snapshots: Snapshots, append_all: AppendAll, model: Model, definitions: Definitions
) -> None:
    snapshot_time = await some_history(append_all)
    first = await take(snapshots, model, definitions, snapshot_time)

    corrections = [make_event("flights", "F1", NOON + HOUR, {"carrier": "DL", "distance": 9}), make_event("arrivals", "F18", NOON, {})]
    late_label = make_event("arrivals", "F18", NOON + 30 * HOUR, {"late": True})
    corrected_at = (await append_all([*corrections, late_label]))[0].created_at
    second = await take(snapshots, model, definitions, snapshot_time)
    after = await take(snapshots, model, definitions, corrected_at)

    assert second == first
    assert first.n_rows == 15
    assert (after.n_rows, after.digest == first.digest, after.path == first.path) == (16, False, False)


async def test_the_digest_is_of_rows_not_of_bytes(
    snapshots: Snapshots, append_all: AppendAll, model: Model, definitions: Definitions, new_postgres: Any, objects: Objects, tmp_path: Path
) -> None:
    """The same facts, on two shards, known in another order."""
    snapshot_time = await some_history(append_all)
    taken = await take(snapshots, model, definitions, snapshot_time)
    urls = [new_postgres().url, new_postgres().url]
    async with open_feature_store(urls) as sharded:
        facts = [make_event("arrivals", f"F{n}", NOON + (n + 2) * HOUR, {"late": n % 3 == 0}) for n in range(15)]
        facts += [make_event("weather", "EWR", NOON + n * HOUR, {"temp": n / 2}) for n in range(20)]
        facts += [make_event("flights", f"F{n}", NOON + n * HOUR, {"origin": "EWR", "distance": n, "carrier": "UA"}) for n in range(20)]
        await _append(sharded, facts)

        again = await take(
            Snapshots(sharded, urls, objects, tmp_path / "work", "512MB"), model, definitions, datetime.now(UTC) - timedelta(milliseconds=1)
        )

    assert (again.digest, again.path) == (taken.digest, taken.path)


async def test_many_slices_make_one_snapshot(
    snapshots: Snapshots, append_all: AppendAll, model: Model, definitions: Definitions, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_time = await some_history(append_all)
    for known_at in ("snapshot", "row"):
        asked = model.model_copy(update={"known_at": known_at})
        in_one = await take(snapshots, asked, definitions, snapshot_time)
        with monkeypatch.context() as patch:
            patch.setattr(joining, "_VALUES", 3 * (3 + len(in_one.columns)))  # three rows
            assert await take(snapshots, asked, definitions, snapshot_time) == in_one


def in_order(n: int) -> pa.Table:
    """Rows in batches as they come from several readers."""
    numbers = pa.array(np.arange(n, n + 400_000))
    return pa.Table.from_batches([pa.record_batch({"n": numbers.slice(begin, 70_000)}) for begin in range(0, len(numbers), 70_000)])


@pytest.mark.parametrize("kept", [True, False])
def test_many_rows_are_written_in_the_order_in_which_they_were_asked_for(tmp_path: Path, kept: bool) -> None:
    """A snapshot is sorted once, when its rows are asked for: slices, filters and writers leave them so. Control: DuckDB may not."""
    with duckdb.connect(config={"threads": 4, "preserve_insertion_order": kept}) as db:
        db.register("first", in_order(0))
        db.execute("CREATE TEMP TABLE others AS FROM first LIMIT 0")
        for n in (400_000, 800_000):
            db.register("slice", in_order(n))
            db.execute("INSERT INTO others FROM slice")
        db.execute(f"COPY (SELECT n FROM {joining._FOUND} WHERE n % 7 > 0) TO '{tmp_path / 'rows.parquet'}' (FORMAT parquet)")

    written = np.asarray(pq.read_table(tmp_path / "rows.parquet")["n"])
    asked = np.arange(1_200_000)
    assert np.array_equal(written, asked[asked % 7 > 0]) is kept


async def _append(store: FeatureStore, facts: Sequence[EventReceived]) -> None:
    for shard, part in store.split(facts):
        async with shard.begin() as db:
            await store_rows.append(db, part)


async def test_training_sees_what_scoring_saw(
    snapshots: Snapshots, objects: Objects, reader: FeatureReader, append_all: AppendAll, model: Model, definitions: Definitions
) -> None:
    """Online against offline: for rows known in time, the same vector."""
    snapshot_time = await some_history(append_all)
    rows = rows_of(objects, await take(snapshots, model, definitions, snapshot_time))

    pairs = [(str(row["entity_id"]), int(str(row["event_time"])) * 1000) for row in rows]
    vectors = await reader.vectors(plan_of(model, definitions), pairs)

    online = [{name: as_learned(value) for name, value in vector.values.items()} for vector in vectors if isinstance(vector, Vector)]
    assert online == [{name: row[name] for name in vector} for row, vector in zip(rows, online, strict=True)]


async def test_the_columns_are_named_in_order_and_typed(
    snapshots: Snapshots, objects: Objects, append_all: AppendAll, model: Model, definitions: Definitions
) -> None:
    taken = await take(snapshots, model, definitions, await some_history(append_all))

    schema = pq.read_schema(objects.path_of(taken.path))
    assert [column.name for column in taken.columns] == [
        "carrier",
        "distance",
        "international",
        "weather.temp",
        "weather.fog",
        "crews.size",
    ]
    assert schema.names == ["entity_id", "event_time", "label_time", "label", *(column.name for column in taken.columns)]
    assert [str(kind) for kind in schema.types] == [
        "string",
        *["int64"] * 2,
        "int32",
        "string",
        "double",
        "int32",
        "double",
        "int32",
        "double",
    ]


async def test_no_rows_make_an_empty_snapshot(snapshots: Snapshots, objects: Objects, model: Model, definitions: Definitions) -> None:
    taken = await take(snapshots, model, definitions, datetime.now(UTC) - HOUR)

    assert rows_of(objects, taken) == []


async def test_a_binary_label_may_be_a_number_but_only_0_or_1(
    snapshots: Snapshots, objects: Objects, append: Append, model: Model, definitions: Definitions
) -> None:
    delayed = model.model_copy(update={"label": model.label.model_copy(update={"column": "delay"})})
    await append("flights", "A", NOON)
    row = await append("arrivals", "A", NOON + HOUR, delay=1)
    assert rows_of(objects, await take(snapshots, delayed, definitions, row.created_at))[0]["label"] == 1

    row = await append("arrivals", "A", NOON + HOUR, delay=17.5)
    with pytest.raises(UnusableDefinition, match=r"'A' is 17\.5"):
        await take(snapshots, delayed, definitions, row.created_at)


async def test_labels_of_other_types_keep_their_values(
    snapshots: Snapshots, objects: Objects, append: Append, model: Model, definitions: Definitions
) -> None:
    await append("flights", "A", NOON)
    row = await append("arrivals", "A", NOON + HOUR, delay=17.5, cause="weather")

    for label_type, column, value in (("number", "delay", 17.5), ("multiclass", "cause", "weather")):
        label = model.label.model_copy(update={"column": column, "type": label_type})
        taken = await take(snapshots, model.model_copy(update={"label": label}), definitions, row.created_at)
        assert rows_of(objects, taken)[0]["label"] == value


async def test_a_snapshot_of_the_future_is_refused(snapshots: Snapshots, model: Model, definitions: Definitions) -> None:
    with pytest.raises(PermanentError, match="not possible yet"):
        await take(snapshots, model, definitions, datetime.now(UTC) + HOUR)


def changed(model: Model, **parts: Any) -> dict[str, Any]:
    document = model.model_dump(mode="json", exclude_none=True)
    for path, value in parts.items():
        *parents, last = path.split("__")
        at: Any = document
        for parent in parents:
            at = at[int(parent)] if isinstance(at, list) else at[parent]
        at[last] = value
    return document


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"spine": "flihgts"}, 404, "no feature set 'flihgts'; there are: arrivals"),
        ({"label__feature_set": "arivals"}, 404, "no feature set 'arivals'"),
        ({"label__column": "lateness"}, 422, "'lateness', which is not a feature of 'arrivals'"),
        ({"label__column": "cause"}, 422, "a binary label is a boolean or a number"),
        ({"features__1__join": "airport"}, 422, "joins 'weather' by 'airport', which 'flights' has not"),
        ({"features__1__join": "distance"}, 422, "joins 'weather' by 'distance', a number"),
        ({"features__1__columns": ["temperature"]}, 422, "'temperature' of 'weather', which has temp, fog"),
        ({"features": []}, 422, "features"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
async def test_a_bad_query_is_told_what_is_wrong(
    http: httpx.AsyncClient, model: Model, change: dict[str, Any], status: int, words: str
) -> None:
    query = {"model": changed(model, **change), "snapshot_time": NOON.isoformat()}

    reply = await http.post("/v1/snapshots", json=query)

    assert reply.status_code == status
    assert words in reply.json()["error"]["message"]


async def test_columns_that_a_file_cannot_tell_apart_are_refused(snapshots: Snapshots, model: Model, definitions: Definitions) -> None:
    flights = definitions.feature_set("flights")
    clashing = dict.fromkeys(("Label", "origin"), flights.features["carrier"])
    definitions.put(flights.model_copy(update={"features": flights.features | clashing}), 2)
    all_columns = [source.model_copy(update={"columns": None}) for source in model.features]

    with pytest.raises(UnusableDefinition, match="are taken: label, Label"):
        await take(snapshots, model.model_copy(update={"features": all_columns}), definitions, NOON)


async def test_the_door_takes_a_snapshot(http: httpx.AsyncClient, append_all: AppendAll, model: Model, objects: Objects) -> None:
    snapshot_time = await some_history(append_all)
    query = {"model": model.model_dump(mode="json"), "snapshot_time": snapshot_time.isoformat()}

    reply = await http.post("/v1/snapshots", json=query)

    assert reply.status_code == 200, reply.text
    assert len(rows_of(objects, SnapshotTaken.model_validate_json(reply.content))) == 15
