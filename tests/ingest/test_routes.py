"""The HTTP door: all of a request or nothing, the same reasons as on Kafka, and 202 only when Kafka has the events."""

import json
from typing import Any
from uuid import uuid4

import httpx
import pytest

from mojomesh_contracts.events import EventReceived


def as_json(event: EventReceived) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(event.model_dump_json())
    return body


async def test_one_event_is_accepted_when_kafka_has_it_and_ends_up_stored(world: Any, ingest: httpx.AsyncClient) -> None:
    event = world.make_event()

    answer = await ingest.post("/v1/events", json=as_json(event))

    assert (answer.status_code, answer.json()) == (202, {"accepted": 1})
    (record,) = await world.records.read(EventReceived.topic.name)
    assert EventReceived.model_validate_json(record.value) == event
    assert record.key == event.entity_id.encode()
    await world.until_handled()
    assert await world.stored() == [event.event_id]


async def test_many_events_are_accepted_at_once(world: Any, ingest: httpx.AsyncClient) -> None:
    events = world.make_events(2_000)

    answer = await ingest.post("/v1/events", json={"events": [as_json(event) for event in events]})

    assert answer.json() == {"accepted": 2_000}
    await world.until_handled()
    assert set(await world.stored()) == {event.event_id for event in events}


async def test_of_a_batch_with_bad_events_nothing_is_taken_and_each_gets_its_reason(world: Any, ingest: httpx.AsyncClient) -> None:
    good, bad, unknown = world.make_event(), world.make_event(distance=-1), world.make_event().model_copy(update={"feature_set": "trains"})
    sent = [as_json(good), as_json(bad), {"event_id": "nonsense"}, "text", as_json(unknown)]

    answer = await ingest.post("/v1/events", json={"events": sent})

    assert answer.status_code == 422
    error = answer.json()["error"]
    assert error["type"] == "EventsRefused"
    assert error["message"].startswith("4 of 5 events are wrong, so none was taken; event 1: 'distance' is -1")
    assert [(event["index"], event["event_id"]) for event in error["events"]] == [
        (1, str(bad.event_id)),
        (2, "nonsense"),
        (3, None),
        (4, str(unknown.event_id)),
    ]
    assert "feature_set: Field required" in error["events"][1]["reason"]
    assert error["events"][3]["reason"] == "no feature set is named 'trains'; apply its definition first"
    assert await world.records.read(EventReceived.topic.name) == []
    assert await world.buried() == []


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"not json", 422, "the body is not JSON"),
        (b"", 422, "the body is not JSON"),
        (b"\xff", 422, "the body is not JSON"),
        (b"[]", 422, "EventReceived"),
        (b'{"events": []}', 422, "'events' must be a list of at least one event"),
        (b'{"events": 7}', 422, "'events' must be a list"),
        (b'{"events": [' + b",".join([b"1"] * 5_001) + b"]}", 413, "a request may bring 5000 events"),
        (b'{"events": "' + b"x" * (16 * 2**20) + b'"}', 413, "bytes"),
    ],
)
async def test_a_body_that_is_no_event_is_refused(world: Any, ingest: httpx.AsyncClient, body: bytes, status: int, reason: str) -> None:
    answer = await ingest.post("/v1/events", content=body)

    assert answer.status_code == status
    assert reason in answer.json()["error"]["message"]


async def test_an_event_larger_than_its_topic_takes_is_refused_with_its_whole_batch(world: Any, ingest: httpx.AsyncClient) -> None:
    large = world.make_event(carrier="x" * 2**20)

    answer = await ingest.post("/v1/events", json={"events": [as_json(world.make_event()), as_json(large)]})

    assert answer.status_code == 422
    assert f"takes at most {2**20}" in answer.json()["error"]["message"]
    assert await world.records.read(EventReceived.topic.name) == []


async def test_an_event_of_a_set_declared_just_before_it_is_accepted(world: Any, ingest: httpx.AsyncClient) -> None:
    await world.define("arrivals")

    answer = await ingest.post("/v1/events", json=as_json(world.make_event().model_copy(update={"feature_set": "arrivals"})))

    assert answer.status_code == 202


async def test_the_door_says_what_it_takes_and_how_it_feels(ingest: httpx.AsyncClient) -> None:
    schema = (await ingest.get("/openapi.json")).json()
    body = schema["paths"]["/v1/events"]["post"]["requestBody"]["content"]["application/json"]["schema"]

    assert set(body["oneOf"][0]["required"]) == {"event_id", "feature_set", "entity_id", "event_time", "values"}
    assert (await ingest.get("/health/ready")).json() == {"status": "ready", "problems": {}}
    assert (await ingest.get("/health/live")).status_code == 200
    assert "mojomesh_events_consumed_total" in (await ingest.get("/metrics")).text


async def test_a_repeat_over_http_is_stored_once(world: Any, ingest: httpx.AsyncClient) -> None:
    event = as_json(world.make_event()) | {"event_id": str(uuid4())}

    for _ in range(2):
        assert (await ingest.post("/v1/events", json=event)).status_code == 202
    await world.until_handled()

    assert len(await world.stored()) == 1
