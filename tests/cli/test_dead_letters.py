"""`mojomesh dlt`: what could not be handled is listed once, shown as it came, and sent again byte for byte."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiokafka import ConsumerRecord

from mojomesh_chassis.dead_letters import MAX_VALUE_BYTES, dead_letter
from mojomesh_chassis.errors import NotFound, PermanentError
from mojomesh_chassis.publishing import Publisher
from mojomesh_cli.main import app
from mojomesh_contracts.events import EventReceived, ScoreRequested

RECEIVED, REQUESTED = EventReceived.topic.name, ScoreRequested.topic.name
HEADERS = [("traceparent", b"00-1"), ("odd", None), ("bytes", b"\xff")]


@pytest.fixture
async def graveyard(records: Any, kafka: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Two records that could not be handled, one of them buried twice, and one of another topic."""
    monkeypatch.setenv("MOJOMESH_KAFKA", kafka)
    monkeypatch.setenv("MOJOMESH_STATE", str(tmp_path / "state"))
    await records.send(RECEIVED, b'{"values": 1}', b"\xff\x00", key=b"k", headers=HEADERS)
    await records.send(REQUESTED, b"x" * (MAX_VALUE_BYTES + 1), key=b"k", compression_type="gzip", max_batch_size=2**23)
    json_one, bytes_one = await records.read(RECEIVED)
    (large,) = await records.read(REQUESTED)
    await bury(kafka, json_one, "first try")
    await bury(kafka, bytes_one, "no JSON")
    await bury(kafka, json_one, "not an EventReceived: feature_set: Field required")
    await bury(kafka, large, "too large")
    return records


async def bury(kafka: str, record: ConsumerRecord, reason: str) -> None:
    publisher = Publisher(kafka)
    await publisher.send([dead_letter(record, "ingest", reason)])
    await publisher.close()


async def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    await asyncio.to_thread(app, ("dlt", *arguments, "--json"), standalone_mode=False)
    return json.loads(capsys.readouterr().out)


async def letter_ids(records: Any) -> list[str]:
    return [f"{RECEIVED}/{record.partition}/{record.offset}" for record in await records.read(RECEIVED)]


async def test_each_letter_is_listed_once_with_its_last_reason(graveyard: Any, capsys: pytest.CaptureFixture[str]) -> None:
    json_id, bytes_id = await letter_ids(graveyard)

    letters = await run(capsys, "list")
    of_topic = await run(capsys, "list", "--topic", RECEIVED)

    assert len(letters) == 3
    assert {letter["id"]: letter["reason"] for letter in of_topic} == {
        json_id: "not an EventReceived: feature_set: Field required",
        bytes_id: "no JSON",
    }
    assert await run(capsys, "list", "--limit", "1") == letters[-1:]


async def test_a_letter_is_shown_as_it_came(graveyard: Any, capsys: pytest.CaptureFixture[str]) -> None:
    json_id, bytes_id = await letter_ids(graveyard)

    shown, in_bytes = await run(capsys, "show", json_id), await run(capsys, "show", bytes_id)

    assert (shown["key"], shown["value"], shown["service"]) == ("k", {"values": 1}, "ingest")
    assert shown["headers"] == {"traceparent": "00-1", "odd": None, "bytes": "b'\\xff'"}
    assert in_bytes["value"] == "b'\\xff\\x00'"


async def test_a_replay_sends_the_original_to_where_it_came_from(graveyard: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = await graveyard.read(RECEIVED)

    replayed = await run(capsys, "replay", "--topic", RECEIVED)

    after = await graveyard.read(RECEIVED)
    assert len(replayed) == 2
    assert len(after) == 4
    assert sorted((record.value, record.key) for record in after[2:]) == sorted((record.value, record.key) for record in before)
    assert {record.partition for record in after} == {before[0].partition}
    assert all(list(record.headers) == HEADERS for record in after)
    assert await run(capsys, "list", "--topic", RECEIVED) == []
    assert len(await run(capsys, "list", "--topic", RECEIVED, "--replayed")) == 2
    assert await run(capsys, "replay", "--topic", RECEIVED) == []


async def test_one_letter_is_replayed_by_its_id(graveyard: Any, capsys: pytest.CaptureFixture[str]) -> None:
    json_id, bytes_id = await letter_ids(graveyard)

    assert await run(capsys, "replay", json_id) == [json_id]

    assert [letter["id"] for letter in await run(capsys, "list", "--topic", RECEIVED)] == [bytes_id]


async def test_a_letter_of_which_only_a_part_is_left_is_not_replayed(graveyard: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PermanentError, match="too large to be kept whole"):
        await run(capsys, "replay", "--all")

    assert len(await graveyard.read(RECEIVED)) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        (("replay",), PermanentError, "name the letters to replay"),
        (("show", f"{RECEIVED}/0/99"), NotFound, "`mojomesh dlt list` shows those there are"),
        (("list", "--topic", "trains"), NotFound, "no topic 'trains'"),
    ],
)
async def test_a_wrong_call_says_what_to_do(
    graveyard: Any, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        await run(capsys, *arguments)
