"""One scorer, asked through every door."""

import asyncio
import json
import math
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from mojomesh_chassis.dead_letters import read_dead_letters
from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.publishing import Publisher, Record
from mojomesh_contracts.events import ScoreRequested
from mojomesh_local import ports
from tests.scorer.making import (
    Features,
    Keys,
    Registry,
    Row,
    Scorer,
    Trained,
    read_predictions,
    running_scorer,
    serving_features,
    with_topics,
)

TOO_EARLY = "0001-01-01T00:00:00+05:00"  # in UTC it is of the year 0


@dataclass
class Mesh:
    """A scorer with a champion of each model, and all around it."""

    scorer: Scorer
    features: Features
    publisher: Publisher
    kafka: str
    digests: dict[str, str]


@pytest.fixture(scope="module")
async def mesh(kafka_server: str, models: dict[str, Trained], keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("doors")
    features_port = ports.choose()
    env = {
        "MOJOMESH_KAFKA": kafka_server,
        "MOJOMESH_POSTGRES": "postgresql://nobody@127.0.0.1:9/nothing",
        "MOJOMESH_OBJECTS": (folder / "objects").as_uri(),
        "MOJOMESH_TOKEN": "a-token-of-the-tests",
        "MOJOMESH_FEATURES_URL": f"http://127.0.0.1:{features_port}",
    }
    publisher = Publisher(kafka_server)
    registry = Registry(open_objects(env["MOJOMESH_OBJECTS"]), publisher, keys, folder / "bundles")
    async with with_topics(kafka_server), serving_features(features_port) as features:
        digests = {name: await registry.store(trained, name) for name, trained in models.items()}
        for name, digest in digests.items():
            await registry.promote(name, 1, digest)
        async with running_scorer(env, keys, folder) as scorer:
            assert len((await scorer.http.get("/v1/models")).json()) == len(models), scorer.log
            yield Mesh(scorer, features, publisher, kafka_server, digests)
        await publisher.close()


@pytest.fixture
def scorer(mesh: Mesh) -> Scorer:
    return mesh.scorer


def by_column(trained: Trained, n_rows: int) -> dict[str, list[Any]]:
    return {column.name: [row[column.name] for row in trained.rows[:n_rows]] for column in trained.schema.columns}


def triton_inputs(client: Any, trained: Trained, n_rows: int, **options: Any) -> list[Any]:
    """One tensor a column, as a user of tritonclient makes them; every second one of shape [n, 1]."""
    inputs = []
    for number, column in enumerate(trained.schema.columns):
        values = by_column(trained, n_rows)[column.name]
        if column.type == "category":
            array, datatype = np.array([value or "" for value in values], dtype=np.object_), "BYTES"
        else:
            array, datatype = np.array([np.nan if value is None else value for value in values], dtype=np.float64), "FP64"
        array = array.reshape(-1, 1) if number % 2 else array
        tensor = client.InferInput(column.name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array, **options)
        inputs.append(tensor)
    return inputs


@pytest.mark.parametrize("name", ["binomial", "multinomial", "regression", "xgboost"])
async def test_scores_are_those_of_h2o_with_missing_values_and_unseen_levels(scorer: Scorer, models: dict[str, Trained], name: str) -> None:
    trained = models[name]
    assert any(value is None for row in trained.rows for value in row.values())
    assert any(row["carrier"] == "ZZ" for row in trained.rows)

    reply = await scorer.http.post(f"/v1/models/{name}:score", json={"rows": [{"values": row} for row in trained.rows]})

    classes = trained.schema.classes
    scores = [[one["scores"][level] for level in classes] if classes else [one["score"]] for one in reply.json()["predictions"]]
    assert np.abs(np.array(scores) - np.array(trained.scores)).max() <= 1e-6


async def test_one_row_and_many_rows_get_the_same_scores_to_the_last_bit(scorer: Scorer, models: dict[str, Trained]) -> None:
    rows = models["binomial"].rows[:100]

    many = (await scorer.http.post("/v1/models/binomial:score", json={"rows": [{"values": row} for row in rows]})).json()
    one_by_one = [await scorer.score("binomial", row) for row in rows]

    assert [one["score"] for one in many["predictions"]] == [one["score"] for one in one_by_one]
    assert one_by_one[0]["score"] == one_by_one[0]["scores"]["1"]
    assert len({one["prediction_id"] for one in one_by_one}) == 100


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


async def test_a_score_comes_with_its_reasons_when_they_are_asked_for(scorer: Scorer, models: dict[str, Trained]) -> None:
    rows = [{"values": row} for row in models["binomial"].rows[:20]]

    reply = await scorer.http.post("/v1/models/binomial:score?explain=true", json={"rows": rows})

    for one in reply.json()["predictions"]:
        assert list(one["contributions"]) == [column.name for column in models["binomial"].schema.columns]
        assert abs(sum(one["contributions"].values()) + one["bias"] - logit(one["score"])) <= 1e-6
    assert "contributions" not in await scorer.score("binomial", models["binomial"].rows[0])


@pytest.mark.parametrize(
    ("name", "n_rows", "status", "complaint"),
    [
        ("multinomial", 1, 422, "a gbm model of category Multinomial has no contributions"),
        ("regression", 1, 422, "a glm model of category Regression has no contributions"),
        ("binomial", 101, 413, "101 rows; at most 100 a request are explained"),
    ],
)
async def test_what_cannot_be_explained_is_refused(scorer: Scorer, name: str, n_rows: int, status: int, complaint: str) -> None:
    reply = await scorer.http.post(f"/v1/models/{name}:score?explain=true", json={"rows": [{"values": {}}] * n_rows})

    assert reply.status_code == status
    assert complaint in reply.text


@pytest.mark.parametrize(
    ("body", "status", "complaint"),
    [
        ({"values": {"carier": "AA"}}, 422, "no column 'carier'"),
        ({"values": {"distance": "far"}}, 422, "'distance' must be a finite number, is 'far'"),
        ({"event_time": "2013-01-01T00:00:00Z"}, 422, "a row needs values, or an entity_id"),
        ({"values": {}, "rows": [{"values": {}}]}, 422, "not both"),
        ({"vals": {}}, 422, "vals"),
        ({"entity_id": "nobody"}, 404, "nobody: no row of 'flights'"),
        ({"entity_id": "a\0"}, 422, "entity_id: Value error, contains a NUL character"),
        ({"values": {}, "entity_id": "a\0"}, 422, "entity_id: Value error, contains a NUL character"),
        ({"rows": [{"values": {}, "event_time": TOO_EARLY}]}, 422, "rows.0.event_time: Value error, lies outside the years 1 to 9999"),
    ],
)
async def test_a_bad_request_is_told_what_is_wrong(scorer: Scorer, body: Row, status: int, complaint: str) -> None:
    reply = await scorer.http.post("/v1/models/binomial:score", json=body)

    assert reply.status_code == status
    assert complaint in reply.json()["error"]["message"]


async def test_a_model_that_nobody_promoted_is_not_found(scorer: Scorer) -> None:
    reply = await scorer.http.post("/v1/models/nothing:score", json={"values": {}})

    assert reply.status_code == 404
    assert "no version of model 'nothing' is served" in reply.json()["error"]["message"]


async def test_missing_values_and_unknown_levels_are_counted_over_all_workers(scorer: Scorer) -> None:
    async def counted() -> tuple[float, float]:
        samples = [
            sample for family in text_string_to_metric_families((await scorer.admin.get("/metrics")).text) for sample in family.samples
        ]
        values = {
            (sample.name, sample.labels["model"], sample.labels["column"]): sample.value for sample in samples if "column" in sample.labels
        }
        missing = values.get(("mojomesh_scorer_missing_values_total", "regression", "hour"), 0)
        return missing, values.get(("mojomesh_scorer_unknown_levels_total", "regression", "carrier"), 0)

    before = await counted()
    for _ in range(20):  # each over a connection of its own, so that both workers get some
        async with httpx.AsyncClient(base_url=scorer.http.base_url, trust_env=False) as client:
            await client.post("/v1/models/regression:score", json={"values": {"carrier": "??"}})

    async with asyncio.timeout(10):  # workers add up their counts a little later
        while (after := await counted()) != (before[0] + 20, before[1] + 20):
            assert after[0] <= before[0] + 20 and after[1] <= before[1] + 20
            await asyncio.sleep(0.02)


LONG_WAY = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
"""A request with a trace passes through the whole application; one without takes the fast lane, all but one in a thousand."""


@pytest.mark.parametrize("name", ["binomial", "multinomial", "regression"])
async def test_the_fast_lane_and_the_application_give_the_same_answers(scorer: Scorer, models: dict[str, Trained], name: str) -> None:
    for row in models[name].rows[:50]:
        path = f"/v1/models/{name}:score"
        asked: dict[str, Any] = {"values": row}
        fast, full = [(await scorer.http.post(path, json=asked, headers=headers)).json() for headers in ({}, LONG_WAY)]
        assert {**fast, "prediction_id": "", "event_time": ""} == {**full, "prediction_id": "", "event_time": ""}
        assert UUID(fast["prediction_id"]).version == 7

        path = f"/v2/models/{name}/infer"
        for options in ({"id": 'm"i%(score)bne'}, {"outputs": [{"name": "prediction_id"}, {"name": "score"}]}):
            asked = {"inputs": models[name].one_row_tensors(row), **options}
            fast, full = [(await scorer.http.post(path, json=asked, headers=headers)).json() for headers in ({}, LONG_WAY)]
            for answer in (fast, full):
                (ids,) = [output for output in answer["outputs"] if output["name"] == "prediction_id"]
                assert UUID(ids.pop("data")[0]).version == 7
            assert fast == full


N_CONNECTIONS = 8  # among them some to each worker


@contextmanager
def connected(scorer: Scorer) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", scorer.http_port), timeout=10) as connection:
        yield connection


def body_of(models: dict[str, Trained], place: int = 0) -> bytes:
    return json.dumps({"id": f"{place:04}", "inputs": models["regression"].one_row_tensors(models["regression"].rows[place])}).encode()


def head_of(body: bytes) -> bytes:
    return f"POST /v2/models/regression/infer HTTP/1.1\r\nHost: mesh\r\nContent-Length: {len(body)}\r\n\r\n".encode()


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer."""
    with connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers = dict(line.rstrip().lower().split(b": ", 1) for line in iter(stream.readline, b"\r\n"))
        return status, stream.read(int(headers[b"content-length"]))


def test_requests_that_begin_alike_get_answers_of_their_own(scorer: Scorer, models: dict[str, Trained]) -> None:
    with connected(scorer) as connection:
        for place in range(20):
            body = body_of(models, place)
            connection.sendall(head_of(body) + body)
            status, answer = read_answer(connection)

            assert (status, json.loads(answer)["id"]) == (200, f"{place:04}")
            assert abs(json.loads(answer)["outputs"][0]["data"][0] - models["regression"].scores[place][0]) <= 1e-6


@pytest.mark.parametrize("first", [b"GET /v2/health/live HTTP/1.1\r\n", b"POST /v2/models/regression/infer HTTP/1.1\r\n"])
def test_the_end_of_a_head_is_not_taken_for_a_head(scorer: Scorer, models: dict[str, Trained], first: bytes) -> None:
    """Else whoever sends a head in two pieces could teach the lane requests that do not say what they ask for."""
    body = body_of(models)
    rest = b"Content-Length: %d\r\n\r\n" % len(body) + body
    for _ in range(N_CONNECTIONS):
        with connected(scorer) as connection:
            connection.sendall(first + b"Host: mesh\r\n")
            time.sleep(0.05)  # so that the rest arrives by itself
            connection.sendall(rest)
            assert read_answer(connection)[0] == 200
    for _ in range(N_CONNECTIONS):
        with connected(scorer) as connection:
            connection.sendall(head_of(body) + body)
            assert read_answer(connection)[0] == 200
            connection.sendall(rest)

            assert read_answer(connection)[0] == 400


@pytest.mark.parametrize(
    "asked",
    [
        {"inputs": []},
        {"inputs": [{"name": "nobody", "shape": [1], "datatype": "FP64", "data": [1]}]},
        {"inputs": [{"name": "hour", "shape": [1], "datatype": "FP64", "data": [1]}] * 2},
        {"inputs": [{"name": "hour", "shape": [1], "datatype": "FP64", "data": [True]}]},
        {"inputs": [{"name": "hour", "shape": [2], "datatype": "FP64", "data": [1]}]},
        {"inputs": [{"name": "hour", "shape": [1], "datatype": "FP32", "data": [1e300]}]},
        {"inputs": [{"name": "carrier", "shape": [1], "datatype": "BYTES", "data": [1]}]},
        {"inputs": [{"name": "carrier", "shape": [1], "datatype": "BYTES", "data": [[""]]}], "id": 3},
        {"inputs": [{"name": "hour", "shape": [1, 1], "datatype": "INT32", "data": [[5]]}], "parameters": {}},
        {"inputs": [{"name": "hour", "shape": [1], "datatype": "FP64", "data": [1]}], "outputs": [{"name": "nobody"}]},
        {"inputs": [{"name": "hour", "shape": [1], "datatype": "FP64", "data": [10**400]}]},
        {"inputs": [{"name": "hour", "shape": [1], "datatype": "FP64", "data": [1]}], "parameters": {"entity_id": "a\0"}},
        [],
    ],
)
async def test_what_is_odd_is_answered_as_the_application_does(scorer: Scorer, asked: object) -> None:
    fast, full = [await scorer.http.post("/v2/models/regression/infer", json=asked, headers=headers) for headers in ({}, LONG_WAY)]

    assert fast.status_code == full.status_code
    if fast.status_code != 200:
        assert fast.json() == full.json()


async def test_a_body_over_the_limit_is_refused(scorer: Scorer) -> None:
    reply = await scorer.http.post("/v2/models/regression/infer", content=b" " * (2**20 + 1))
    native = await scorer.http.post("/v1/models/regression:score", content=b" " * (2**20 + 1))

    assert reply.status_code == native.status_code == 413
    assert "1048576 bytes" in reply.json()["error"]


async def test_an_entity_is_scored_by_its_features_and_the_receipt_names_their_rows(mesh: Mesh, models: dict[str, Trained]) -> None:
    trained = models["binomial"]
    mesh.features.vectors["UA1545"] = {**trained.rows[3], "added_later": 1}
    asked = {"entity_id": "UA1545", "event_time": "2013-05-01T12:30:00Z"}

    reply = await mesh.scorer.http.post("/v1/models/binomial:score?durable=true", json=asked)

    answer = reply.json()
    assert abs(answer["score"] - trained.scores[3][1]) <= 1e-6
    assert answer["feature_age_ms"] == {"flights": 1500}
    assert mesh.features.asked[-1] == {"model": "binomial", "rows": [{"entity_id": "UA1545", "event_time": "2013-05-01T12:30:00+00:00"}]}
    receipt = (await read_predictions(mesh.kafka, [answer["prediction_id"]]))[answer["prediction_id"]]
    assert receipt.entity_id == "UA1545"
    assert receipt.inputs == trained.encode(trained.rows[3])
    assert receipt.scores == [answer["scores"]["0"], answer["scores"]["1"]]
    assert [row.seq for row in receipt.rows] == [7]


async def test_every_prediction_gets_a_receipt_without_being_asked_for(mesh: Mesh, models: dict[str, Trained]) -> None:
    ids = {(await mesh.scorer.score("binomial", row))["prediction_id"] for row in models["binomial"].rows[:30]}

    await read_predictions(mesh.kafka, ids)


async def test_a_prediction_is_replayed_bit_for_bit(mesh: Mesh, models: dict[str, Trained]) -> None:
    answer = await mesh.scorer.score("multinomial", models["multinomial"].rows[0])
    receipt = (await read_predictions(mesh.kafka, [answer["prediction_id"]]))[answer["prediction_id"]]
    body = {"bundle_digest": answer["bundle_digest"], "inputs": receipt.inputs}

    reply = await mesh.scorer.admin.post("/admin/replay", json=body, headers=mesh.scorer.authorized)

    assert reply.json() == {"scores": list(answer["scores"].values())}


@pytest.mark.parametrize("call", ["reload-model", "replay", "workers"])
async def test_admin_calls_need_the_token(scorer: Scorer, call: str) -> None:
    method = "GET" if call == "workers" else "POST"
    for headers in ({}, {"Authorization": "Bearer guessed"}):
        assert (await scorer.admin.request(method, f"/admin/{call}", json={}, headers=headers)).status_code == 401


async def test_requests_on_kafka_are_answered_once_however_often_they_come(mesh: Mesh, models: dict[str, Trained]) -> None:
    rows = models["binomial"].rows[:40]
    requests = [ScoreRequested(event_id=uuid4(), model="binomial", entity_id=f"F{n}", values=row) for n, row in enumerate(rows)]

    await mesh.publisher.publish(requests)
    await mesh.publisher.publish(requests)

    wanted = {str(request.derive_id("prediction")) for request in requests}
    known = await read_predictions(mesh.kafka, wanted)
    answered = {receipt.request_id: receipt for receipt in known.values() if receipt.request_id}
    assert {request.event_id for request in requests} <= answered.keys()
    for request, scores in zip(requests, models["binomial"].scores, strict=False):
        assert abs(answered[request.event_id].scores[1] - scores[1]) <= 1e-6


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"values": {"carier": "AA"}}, "no column 'carier'"),
        ({"entity_id": "a\0"}, "contains a NUL character"),
        ({"entity_id": "a\0", "values": {}}, "contains a NUL character"),
        ({"entity_id": "early", "event_time": TOO_EARLY}, "lies outside the years 1 to 9999"),
        ({"entity_id": "x" * 600}, "at most 512 characters"),
        ({}, "a row needs values, or an entity_id"),
        ({"entity_id": "gone"}, "answered 410"),
        ({"entity_id": "a bug"}, "answered 500"),
    ],
)
async def test_a_bad_request_on_kafka_is_dead_lettered_alone(mesh: Mesh, models: dict[str, Trained], asked: Row, complaint: str) -> None:
    rows = models["binomial"].rows
    mesh.features.vectors["UA7"] = rows[0]
    mesh.features.refusing = {"a\0": 500, "early": 500, "x" * 600: 422, "": 422, "gone": 410, "a bug": 500}
    by_entity: list[Row] = [{"entity_id": "UA7"}] * 5
    good = [ScoreRequested(event_id=uuid4(), model="binomial", **one) for one in [*by_entity, *({"values": row} for row in rows[:5])]]
    bad = ScoreRequested(event_id=uuid4(), model="binomial", **asked)
    topic, events = ScoreRequested.topic.name, [*good[:3], bad, *good[3:]]

    await mesh.publisher.send([Record(topic, b"of one partition", event.model_dump_json().encode(), []) for event in events])

    await read_predictions(mesh.kafka, {str(request.derive_id("prediction")) for request in good})
    ids = {str(event.event_id) for event in events}
    buried: dict[str, str] = {}
    while not buried:
        letters = await read_dead_letters(mesh.kafka, [ScoreRequested.topic])
        buried = {sent: letter.reason for letter in letters if (sent := json.loads(letter.value or b"{}")["event_id"]) in ids}
    assert buried.keys() == {str(bad.event_id)}
    assert complaint in buried[str(bad.event_id)]


@pytest.fixture
def over_http(scorer: Scorer) -> Iterator[Any]:
    with triton_http.InferenceServerClient(f"127.0.0.1:{scorer.http_port}") as client:
        yield client


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_infers_over_http(over_http: Any, models: dict[str, Trained], binary: bool) -> None:
    trained = models["binomial"]
    inputs = triton_inputs(triton_http, trained, 200, binary_data=binary)
    outputs = [triton_http.InferRequestedOutput(name, binary_data=binary) for name in ("probabilities", "prediction_id")]

    result = over_http.infer("binomial", inputs, request_id="mine", outputs=outputs)

    assert np.abs(result.as_numpy("probabilities") - np.array(trained.scores[:200])).max() <= 1e-6
    assert len(set(result.as_numpy("prediction_id").tolist())) == 200
    response = result.get_response()
    assert (response["id"], response["model_version"]) == ("mine", "1")
    assert [output["name"] for output in response["outputs"]] == ["probabilities", "prediction_id"]


def test_tritonclient_gets_all_outputs_when_it_names_none(over_http: Any, models: dict[str, Trained]) -> None:
    trained = models["regression"]

    result = over_http.infer("regression", triton_inputs(triton_http, trained, 5), model_version="1")

    assert np.abs(result.as_numpy("score") - np.array(trained.scores[:5])[:, 0]).max() <= 1e-6
    assert result.as_numpy("probabilities") is None


def test_tritonclient_learns_over_http_what_is_served(over_http: Any) -> None:
    assert over_http.is_server_live() and over_http.is_server_ready() and over_http.is_model_ready("binomial")
    assert not over_http.is_model_ready("nothing")
    assert over_http.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = over_http.get_model_metadata("binomial")
    assert metadata["versions"] == ["1"]
    assert {"name": "weather.wind", "datatype": "FP64", "shape": [-1]} in metadata["inputs"]
    assert {"name": "probabilities", "datatype": "FP64", "shape": [-1, 2]} in metadata["outputs"]


def test_tritonclient_is_told_over_http_what_is_wrong(over_http: Any, models: dict[str, Trained]) -> None:
    inputs = triton_inputs(triton_http, models["binomial"], 1)
    with pytest.raises(InferenceServerException, match="version 9 of model 'binomial' is not served; version 1 is"):
        over_http.infer("binomial", inputs, model_version="9")
    tensor = triton_http.InferInput("carier", [1], "BYTES")
    tensor.set_data_from_numpy(np.array(["AA"], dtype=np.object_))
    with pytest.raises(InferenceServerException, match="no column 'carier'"):
        over_http.infer("binomial", [tensor])


@pytest.fixture
def over_grpc(scorer: Scorer) -> Iterator[Any]:
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{scorer.grpc_port}") as client:
        yield client


def test_tritonclient_infers_over_grpc(over_grpc: Any, models: dict[str, Trained]) -> None:
    trained = models["multinomial"]

    result = over_grpc.infer("multinomial", triton_inputs(triton_grpc, trained, 300), request_id="mine")

    probabilities = result.as_numpy("probabilities")
    assert np.abs(probabilities - np.array(trained.scores[:300])).max() <= 1e-6
    assert (result.as_numpy("score") == probabilities.max(axis=1)).all()
    assert len(set(result.as_numpy("prediction_id").tolist())) == 300
    assert (result.get_response().id, result.get_response().model_version) == ("mine", "1")


@pytest.mark.parametrize("name", ["binomial", "multinomial", "regression"])
def test_a_short_answer_over_grpc_is_the_long_one(over_grpc: Any, models: dict[str, Trained], name: str) -> None:
    inputs = triton_inputs(triton_grpc, models[name], 1)
    for wanted in ([], ["score"], ["prediction_id", "score"]):
        outputs = [triton_grpc.InferRequestedOutput(output) for output in wanted]
        short, long = [over_grpc.infer(name, inputs, outputs=outputs, request_id="mine", headers=headers) for headers in ({}, LONG_WAY)]
        described = [
            [(output["name"], output["datatype"], output["shape"]) for output in result.get_response(as_json=True)["outputs"]]
            for result in (short, long)
        ]
        assert described[0] == described[1]
        for output, _, _ in described[0]:
            assert output == "prediction_id" or (short.as_numpy(output) == long.as_numpy(output)).all()
        assert (short.get_response().id, short.get_response().model_version) == ("mine", "1")


def test_tritonclient_learns_over_grpc_what_is_served(over_grpc: Any) -> None:
    assert over_grpc.is_server_live() and over_grpc.is_server_ready() and over_grpc.is_model_ready("binomial")
    assert not over_grpc.is_model_ready("nothing")
    assert over_grpc.get_server_metadata().name == "mojomesh-scorer"
    assert [tensor.name for tensor in over_grpc.get_model_metadata("regression").outputs] == ["score", "prediction_id"]


def test_tritonclient_is_told_over_grpc_what_is_wrong(over_grpc: Any, models: dict[str, Trained]) -> None:
    with pytest.raises(InferenceServerException, match=r"NOT_FOUND.*no version of model 'nothing'"):
        over_grpc.infer("nothing", triton_inputs(triton_grpc, models["binomial"], 1))
    tensor = triton_grpc.InferInput("distance", [1], "BYTES")
    tensor.set_data_from_numpy(np.array(["far"], dtype=np.object_))
    with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*'distance' is a number"):
        over_grpc.infer("binomial", [tensor])
    with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*entity_id: Value error, contains a NUL character"):
        over_grpc.infer("binomial", triton_inputs(triton_grpc, models["binomial"], 1), parameters={"entity_id": "a\0"})


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_over_grpc(mesh: Mesh, value: float) -> None:
    tensor = triton_grpc.InferInput("hour", [1], "FP64")
    tensor.set_data_from_numpy(np.array([value]))
    with (
        triton_grpc.InferenceServerClient(f"127.0.0.1:{mesh.scorer.grpc_port}") as client,
        pytest.raises(InferenceServerException, match="column 'hour' must be finite"),
    ):
        client.infer("regression", [tensor])


async def test_grpc_has_health_and_reflection(scorer: Scorer) -> None:
    service = "inference.GRPCInferenceService"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{scorer.grpc_port}") as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]))
        listed = [one.name async for answer in answers for one in answer.list_services_response.service]
    assert service in listed


async def test_a_bare_nan_in_json_is_missing(scorer: Scorer, models: dict[str, Trained]) -> None:
    inputs = [{"name": "distance", "shape": [1], "datatype": "FP64", "data": [float("nan")]}]
    text = json.dumps({"inputs": inputs})
    assert "NaN" in text

    reply = await scorer.http.post("/v2/models/binomial/infer", content=text)

    assert reply.json()["outputs"][0]["data"] == [(await scorer.score("binomial", {}))["score"]]


def of_entity(entity_id: str) -> str:
    return f'{{"parameters": {{"entity_id": {entity_id}}}, "inputs": [{{"name": "hour", "shape": [1], "datatype": "FP64", "data": [1]}}]}}'


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("{", "not JSON"),
        ('{"inputs": []}', "no inputs"),
        ('{"inputs": [{"name": "hour"}]}', "not an inference request"),
        ('{"inputs": [{"name": "hour", "shape": [2], "datatype": "FP64", "data": [1]}]}', "has 1 elements, its shape says 2"),
        ('{"inputs": [{"name": "hour", "shape": [1, 2], "datatype": "FP64", "data": [1, 2]}]}', "shape [n] or [n, 1]"),
        ('{"inputs": [{"name": "hour", "shape": [1], "datatype": "FP63", "data": [1]}]}', "'FP63'"),
        ('{"inputs": [{"name": "hour", "shape": [1], "datatype": "FP64", "parameters": {"binary_data_size": 9}}]}', "binary_data_size 9"),
        (of_entity('"a\\u0000"'), "parameter entity_id: Value error, contains a NUL character"),
        (of_entity('"\\ud800"'), "parameter entity_id: Input should be a valid string"),
        (of_entity(f'"{"x" * 513}"'), "parameter entity_id: String should have at most 512 characters"),
        (of_entity("7"), "parameter entity_id: Input should be a valid string"),
    ],
)
async def test_what_is_no_inference_request_is_refused_as_the_protocol_says(scorer: Scorer, body: str, complaint: str) -> None:
    reply = await scorer.http.post("/v2/models/binomial/infer", content=body)

    assert reply.status_code == 400
    assert complaint in reply.json()["error"]


async def test_a_request_is_given_up_when_its_time_is_over(mesh: Mesh, models: dict[str, Trained]) -> None:
    mesh.features.vectors["UA2"] = models["binomial"].rows[0]
    mesh.features.gate.clear()
    try:
        late = await mesh.scorer.http.post("/v1/models/binomial:score?timeout_ms=50", json={"entity_id": "UA2"})
    finally:
        mesh.features.gate.set()

    assert late.status_code == 504
    assert "not answered within 0.05 s" in late.json()["error"]["message"]
    in_time = await mesh.scorer.http.post("/v1/models/binomial:score?timeout_ms=20000", json={"entity_id": "UA2"})
    assert in_time.status_code == 200
    odd = {"parameters": {"timeout": "soon"}, "inputs": models["binomial"].one_row_tensors(models["binomial"].rows[0])}
    assert (await mesh.scorer.http.post("/v2/models/binomial/infer", json=odd)).status_code == 400


async def test_a_worker_refuses_early_what_is_too_much(
    kafka_server: str, mesh: Mesh, models: dict[str, Trained], keys: Keys, tmp_path: Path
) -> None:
    mesh.features.vectors["UA1"] = models["binomial"].rows[0]
    # Each worker takes one request at a time, and the look-up does not come back.
    env = {**mesh.scorer.child.command.env, "SCORER_WORKERS": "1", "SCORER_MAX_IN_FLIGHT": "1", "MOJOMESH_REPLICA": "1"}
    async with running_scorer(env, keys, tmp_path) as scorer:
        mesh.features.gate.clear()
        n_asked = len(mesh.features.asked)
        waiting = asyncio.create_task(scorer.http.post("/v1/models/binomial:score", json={"entity_id": "UA1"}))
        while len(mesh.features.asked) == n_asked:
            await asyncio.sleep(0.01)

        refused = await scorer.http.post("/v1/models/binomial:score", json={"entity_id": "UA1"})
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{scorer.grpc_port}") as client:
            inputs = triton_inputs(triton_grpc, models["binomial"], 2)  # a plain row by value is answered at once, whatever else waits
            with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
                await asyncio.to_thread(client.infer, "binomial", inputs)
        mesh.features.gate.set()

        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert (await waiting).status_code == 200
        await scorer.score("binomial", {})


@pytest.mark.parametrize("asking", [{"outputs": ["contributions", "score"]}, {"parameters": {"explain": True}}])
def test_tritonclient_gets_reasons_when_it_asks_for_them(over_http: Any, over_grpc: Any, models: dict[str, Trained], asking: Row) -> None:
    trained = models["binomial"]
    for client, library in ((over_http, triton_http), (over_grpc, triton_grpc)):
        outputs = [library.InferRequestedOutput(name) for name in asking.get("outputs", [])]
        options = {"outputs": outputs} if outputs else asking

        result = client.infer("binomial", triton_inputs(library, trained, 20), **options)

        contributions, scores = result.as_numpy("contributions"), result.as_numpy("score")
        assert contributions.shape == (20, len(trained.schema.columns) + 1)
        np.testing.assert_allclose(contributions.sum(axis=1), np.log(scores / (1 - scores)), rtol=0, atol=1e-6)
        assert client.infer("binomial", triton_inputs(library, trained, 1)).as_numpy("contributions") is None
