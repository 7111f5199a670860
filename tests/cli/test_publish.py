"""`mojomesh publish`: rows of CSV, JSONL and Parquet become the same events, and what cannot be one is named with its line."""

import asyncio
import csv
import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mojomesh_chassis.errors import NotFound, PermanentError
from mojomesh_cli.main import app
from mojomesh_cli.rows import Columns, make_event, read_table, settle_columns
from mojomesh_contracts.definitions import FeatureSet, parse_definition
from mojomesh_contracts.events import DefinitionApplied, EventReceived

DOCUMENT = {
    "kind": "FeatureSet",
    "name": "flights",
    "entity": "flight_id",
    "features": {
        "carrier": {"type": "category"},
        "number": {"type": "category"},
        "distance": {"type": "number", "min": 0},
        "late": {"type": "boolean"},
    },
}
COLUMNS = Columns("flight_id", "event_time", "event_id", "reported_at")
NOON = datetime(2013, 3, 1, 12, tzinfo=UTC)
MISSING = frozenset(("", "NA"))


@pytest.fixture
def flights() -> FeatureSet:
    definition = parse_definition(DOCUMENT)
    assert isinstance(definition, FeatureSet)
    return definition


def events_of(file: Path, feature_set: FeatureSet) -> list[EventReceived]:
    table = read_table(file, MISSING)
    columns = settle_columns(table, COLUMNS, feature_set, file.name)
    return [make_event(row, columns, feature_set) for _, row in table.rows]


ROWS: list[dict[str, Any]] = [
    {"flight_id": "UA1545", "event_time": NOON, "carrier": "UA", "number": 1545, "distance": 1400, "late": True},
    {"flight_id": "B6725", "event_time": NOON, "carrier": "B6", "number": 725, "distance": 1576.5, "late": None},
]
VALUES = [{"carrier": "UA", "number": "1545", "distance": 1400, "late": True}, {"carrier": "B6", "number": "725", "distance": 1576.5}]


def write_csv(file: Path) -> None:
    with file.open("w", encoding="utf-8-sig") as text:
        writer = csv.DictWriter(text, ROWS[0])
        writer.writeheader()
        writer.writerows({**row, "event_time": "2013-03-01 12:00:00", "late": "NA" if row["late"] is None else row["late"]} for row in ROWS)


def write_csv_gz(file: Path) -> None:
    write_csv(file.with_suffix(""))
    file.write_bytes(gzip.compress(file.with_suffix("").read_bytes()))


def write_jsonl(file: Path) -> None:
    file.write_text("\n".join(json.dumps({**row, "event_time": "2013-03-01T13:00:00+01:00"}) for row in ROWS) + "\n\n")


def write_parquet(file: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), file)


@pytest.mark.parametrize(
    ("name", "write"),
    [("flights.csv", write_csv), ("flights.csv.gz", write_csv_gz), ("flights.jsonl", write_jsonl), ("flights.parquet", write_parquet)],
)
def test_every_format_tells_the_same(name: str, write: Callable[[Path], None], tmp_path: Path, flights: FeatureSet) -> None:
    write(tmp_path / name)

    events = events_of(tmp_path / name, flights)

    assert [event.values for event in events] == VALUES
    assert [event.entity_id for event in events] == ["UA1545", "B6725"]
    assert {event.event_time for event in events} == {NOON}


def test_an_id_comes_from_the_content_and_another_content_has_another(tmp_path: Path, flights: FeatureSet) -> None:
    write_csv(tmp_path / "a.csv")
    write_csv(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text((tmp_path / "b.csv").read_text().replace("1400", "1401"))

    first, again, changed = (events_of(tmp_path / name, flights) for name in ("a.csv", "a.csv", "b.csv"))

    assert first == again
    assert first[1] == changed[1]
    assert first[0].event_id != changed[0].event_id


def test_ids_and_report_times_of_the_file_are_kept(tmp_path: Path, flights: FeatureSet) -> None:
    event_id = uuid4()
    row = {
        "flight_id": 7,
        "event_time": "2013-03-01T12:00:00Z",
        "event_id": str(event_id),
        "reported_at": "2013-03-01T12:05:00Z",
        "carrier": "UA",
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))

    (event,) = events_of(tmp_path / "a.jsonl", flights)

    assert event.event_id == event_id
    assert event.reported_at == NOON.replace(minute=5)
    assert event.entity_id == "7"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"distance": "far"}, "'distance' must be a number, is 'far'"),
        ({"distance": Decimal("-1.5")}, "'distance' is -1.5, less than the minimum 0"),
        ({"late": "perhaps"}, "'late' must be true or false, is 'perhaps'"),
        ({"event_time": "yesterday"}, "'event_time' must be a time like 2013-01-31T17:05:00Z, is 'yesterday'"),
        ({"event_time": None}, "'event_time' must be a time, is None"),
        ({"event_time": "1066-10-14"}, "is not between 1900 and now"),
        ({"flight_id": None}, "entity_id: String should have at least 1 character"),
    ],
)
def test_a_row_that_cannot_be_an_event_says_why(change: dict[str, Any], reason: str, flights: FeatureSet) -> None:
    with pytest.raises(PermanentError, match=reason.replace("(", r"\(")):
        make_event({**ROWS[0], **change}, Columns("flight_id", "event_time", None, None), flights)


def test_a_file_without_what_is_needed_says_what_it_has(tmp_path: Path, flights: FeatureSet) -> None:
    (tmp_path / "a.csv").write_text("flight,time_hour,carrier\n1,2013-01-01,UA\n")
    (tmp_path / "b.csv").write_text("flight_id,event_time,wings\n1,2013-01-01,2\n")

    with pytest.raises(
        PermanentError, match=r"no column 'flight_id'; name the right one by --entity-column\. It has: flight, time_hour, carrier"
    ):
        events_of(tmp_path / "a.csv", flights)
    with pytest.raises(PermanentError, match=r"b\.csv has no feature of 'flights'"):
        events_of(tmp_path / "b.csv", flights)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content, reason in [
        ("a.xlsx", "x", "is not a .csv"),
        ("a.parquet", "x", "is not Parquet"),
        ("a.jsonl", '{"a": 1}\n[1]', "line 2 is not a JSON object"),
        ("b.jsonl", '{"a": 1', "line 1 is not JSON"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(PermanentError, match=reason):
            read_table(tmp_path / name, MISSING)


@pytest.fixture
async def mesh(records: Any, kafka: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("MOJOMESH_KAFKA", kafka)
    monkeypatch.setenv("MOJOMESH_STATE", str(tmp_path / "state"))
    await records.publish(DefinitionApplied(event_id=uuid4(), definition_id="FeatureSet/flights", version=1, definition=DOCUMENT))
    return records


async def run(*arguments: str) -> int:
    """Run the command as a shell would; its exit status. What is told to a person is raised."""

    def call() -> int:
        return int(app(arguments, standalone_mode=False) or 0)

    return await asyncio.to_thread(call)


async def test_a_file_is_published_and_its_bad_rows_are_told(mesh: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "flights.csv"
    lines = [f"UA{number},2013-03-01T12:00:00Z,UA,{number},x" for number in range(6_000)]
    file.write_text("flight_id,event_time,carrier,distance,wings\n" + "\n".join(lines) + "\nUA,2013-03-01T12:00:00Z,UA,-1,x\n")

    status = await run("publish", str(file), "--feature-set", "flights", "--json")

    assert status == 1
    assert json.loads(capsys.readouterr().out) == {
        "published": 6_000,
        "refused": 1,
        "reasons": ["line 6002: 'distance' is -1, less than the minimum 0"],
        "ignored_columns": ["wings"],
        "missing_features": ["number", "late"],
    }
    published = [EventReceived.model_validate_json(record.value) for record in await mesh.read(EventReceived.topic.name)]
    assert {event.entity_id for event in published} == {f"UA{number}" for number in range(6_000)}
    for record in await mesh.read(EventReceived.topic.name):
        assert record.key == json.loads(record.value)["entity_id"].encode()


async def test_a_file_published_twice_gives_the_same_ids(mesh: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "flights.csv")

    for _ in range(2):
        assert await run("publish", str(tmp_path / "flights.csv"), "-f", "flights") == 0

    ids = [UUID(json.loads(record.value)["event_id"]) for record in await mesh.read(EventReceived.topic.name)]
    assert (len(ids), len(set(ids))) == (4, 2)
    assert "2 events published" in capsys.readouterr().out


async def test_a_feature_set_that_nobody_declared_is_told_with_those_there_are(mesh: Any, tmp_path: Path) -> None:
    write_csv(tmp_path / "flights.csv")

    with pytest.raises(NotFound, match="no feature set 'trains'; there are: flights"):
        await run("publish", str(tmp_path / "flights.csv"), "-f", "trains")


def test_a_vector_is_a_list_or_its_json() -> None:
    declared = {"words": {"type": "number"}, "embedding": {"type": "vector(2)"}}
    articles = parse_definition({"kind": "FeatureSet", "name": "articles", "entity": "article", "features": declared})
    assert isinstance(articles, FeatureSet)
    columns = Columns("article", "at", None, None)
    row = {"article": "a", "at": "2013-03-01T12:00:00Z", "words": 3}

    events = [make_event(row | {"embedding": embedding}, columns, articles) for embedding in ("[0.5, 1]", [0.5, 1])]

    assert [event.vectors for event in events] == [{"embedding": [0.5, 1]}] * 2
    assert make_event(row, columns, articles).vectors == {}
    with pytest.raises(PermanentError, match=r"'embedding' must be a list of numbers, as in \[0.1, 0.2\], is 'far'"):
        make_event(row | {"embedding": "far"}, columns, articles)
    with pytest.raises(PermanentError, match="'embedding' must have 2 dimensions, has 1"):
        make_event(row | {"embedding": [1.0]}, columns, articles)
