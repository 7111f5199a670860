from typing import Any

import pytest

from mojomesh_contracts.events import DefinitionApplied, TrainingRequested

FLIGHTS = """
kind: FeatureSet
name: flights
entity: flight_id
features:
  carrier: {type: category}
  distance: {type: number, min: 0}
"""
WIDER = FLIGHTS + "  origin: {type: category}\n"
NARROWER = "kind: FeatureSet\nname: flights\nentity: flight_id\nfeatures:\n  carrier: {type: category}\n"


async def test_definitions_are_applied_announced_and_shown(bench: Any) -> None:
    answer = await bench.apply()

    assert [(one["definition_id"], one["version"], one["outcome"]) for one in answer.json()["applied"]] == [
        ("FeatureSet/flights", 1, "created"),
        ("FeatureSet/arrivals", 1, "created"),
        ("Model/delay", 1, "created"),
    ]
    announced = await bench.heard(DefinitionApplied, 3)
    assert [event.definition_id for event in announced] == ["FeatureSet/flights", "FeatureSet/arrivals", "Model/delay"]
    shown = (await bench.http.get("/v1/definitions/FeatureSet/flights")).json()
    assert shown["definition"]["features"]["distance"] == {"type": "number", "min": 0.0}
    assert shown["definition"] == announced[0].definition
    assert len((await bench.http.get("/v1/definitions")).json()["definitions"]) == 3


async def test_an_unchanged_definition_makes_no_new_version_and_is_announced_again(bench: Any) -> None:
    await bench.apply(FLIGHTS)
    first = await bench.heard(DefinitionApplied, 1)

    answer = await bench.apply(FLIGHTS)

    assert answer.json()["applied"] == [{"definition_id": "FeatureSet/flights", "version": 1, "outcome": "unchanged"}]
    assert await bench.heard(DefinitionApplied, 2) == first * 2


async def test_a_changed_definition_is_the_next_version(bench: Any) -> None:
    await bench.apply(FLIGHTS)

    answer = await bench.apply(WIDER)

    assert answer.json()["applied"] == [{"definition_id": "FeatureSet/flights", "version": 2, "outcome": "changed"}]
    assert [event.version for event in await bench.heard(DefinitionApplied, 2)] == [1, 2]
    assert "origin" in (await bench.http.get("/v1/definitions/FeatureSet/flights")).json()["definition"]["features"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NARROWER, "feature 'distance' is gone; features are only added"),
        (FLIGHTS.replace("number, min: 0", "category"), "'distance' changes its type"),
        (FLIGHTS + "---\n" + FLIGHTS, "FeatureSet/flights comes more than once"),
        (FLIGHTS.replace("kind: FeatureSet", "kind: Featureset"), "definition flights is wrong"),
        (FLIGHTS.replace("entity:", "entty:"), "entty"),
        ("kind: [", "not YAML"),
        ("# nothing\n", "the body holds no document"),
    ],
)
async def test_what_is_wrong_is_refused_in_words(bench: Any, text: str, expected: str) -> None:
    await bench.apply(FLIGHTS)

    answer = await bench.apply(text)

    assert answer.status_code == 422
    assert expected in answer.json()["error"]["message"]
    assert (await bench.http.get("/v1/definitions/FeatureSet/flights")).json()["version"] == 1


async def test_of_many_documents_all_are_applied_or_none(bench: Any) -> None:
    model = (
        "---\nkind: Model\nname: delay\nspine: flights\nlabel: {feature_set: arrivals, column: late, type: binary}\n"
        "features: [{feature_set: flights}]\nalgorithm: {name: gbm}\n"
        "walk_forward: {n_windows: 2, train: expanding, test: 15d, step: 15d}\n"
    )

    answer = await bench.apply(FLIGHTS + model)

    assert answer.status_code == 422
    assert "model 'delay' names the feature set 'arrivals', which is not defined" in answer.json()["error"]["message"]
    assert (await bench.http.get("/v1/definitions")).json() == {"definitions": []}


async def test_json_is_taken_too_one_document_or_many(bench: Any) -> None:
    document = {"kind": "FeatureSet", "name": "weather", "entity": "airport", "features": {"temp": {"type": "number"}}}
    for body in (document, [document, {**document, "name": "wind"}]):
        answer = await bench.http.put("/v1/definitions", json=body, headers=bench.token)
        assert answer.status_code == 200, answer.text
    assert [one["definition_id"] for one in answer.json()["applied"]] == ["FeatureSet/weather", "FeatureSet/wind"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer guessed"}, {"Authorization": "Basic abc"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/definitions"),
        ("POST", "/v1/models/delay:train"),
        ("POST", "/v1/models/delay/versions/1:promote"),
        ("POST", "/v1/models/delay:rollback"),
    ],
)
async def test_what_changes_something_needs_the_token(loop: Any, method: str, path: str, headers: dict[str, str]) -> None:
    answer = await loop.http.request(method, path, json={}, headers=headers)
    assert answer.status_code == 401
    assert "MOJOMESH_TOKEN" in answer.json()["error"]["message"]


async def test_training_is_requested_with_its_reason(loop: Any) -> None:
    answer = await loop.post("/v1/models/delay:train", reason="a look at June", snapshot_time="2013-06-01T00:00:00Z")

    assert answer.status_code == 202
    (event,) = await loop.heard(TrainingRequested, 1)
    assert str(event.event_id) == answer.json()["event_id"]
    assert (event.model, event.reason, event.snapshot_time.isoformat()) == ("delay", "a look at June", "2013-06-01T00:00:00+00:00")


async def test_training_of_an_unknown_model_names_those_there_are(loop: Any) -> None:
    answer = await loop.post("/v1/models/delays:train", reason="oops")
    assert answer.status_code == 404
    assert "there are: delay" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/v1/models/%00", "path.model: Value error, contains a NUL character"),
        ("/v1/models/delay/versions/100000000000000000000", "path.version"),
    ],
)
async def test_what_no_model_can_be_called_is_refused(bench: Any, path: str, words: str) -> None:
    answer = await bench.http.get(path)
    assert answer.status_code == 422
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("asked", [{"reason": "a\0"}, {"snapshot_time": "0001-01-01T00:00:00+05:00"}])
async def test_training_is_refused_for_what_cannot_be_stored(loop: Any, asked: dict[str, str]) -> None:
    answer = await loop.post("/v1/models/delay:train", **asked)
    assert answer.status_code == 422
    assert f"body.{next(iter(asked))}: Value error" in answer.json()["error"]["message"]


async def test_an_unknown_definition_names_those_there_are(loop: Any) -> None:
    answer = await loop.http.get("/v1/definitions/FeatureSet/nothing")
    assert answer.status_code == 404
    assert "FeatureSet/flights" in answer.json()["error"]["message"]
