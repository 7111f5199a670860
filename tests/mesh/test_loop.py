"""The loop, end to end, on two months of flights."""

import asyncio
import json
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import numpy as np
import pytest
import tritonclient.grpc.aio as v2_grpc
import tritonclient.http.aio as v2_http

from mojomesh_chassis.objects import open_objects
from mojomesh_contracts.bundles import SIGNATURE_FILE, SIGNED_FILES
from mojomesh_contracts.events import EventReceived, PredictionsMade, ScoreRequested
from mojomesh_flights.dataset import Year
from mojomesh_trainer.runners import API_KEY
from tests.mesh.conftest import MODEL, Client, Json, Ledger, alerts, certificates, settled, told_id

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(900)]


def a_flight(year: Year, place: int = 5_000) -> tuple[str, str]:
    row = year.flights.slice(place, 1).to_pylist()[0]
    return row["entity_id"], datetime.fromtimestamp(row["event_ms"] / 1000).astimezone().isoformat()


async def test_every_event_is_stored_once_or_dead_lettered_with_its_reason(january: Client, ledger: Ledger) -> None:
    stored = await january.stored()
    letters = {told_id(record): record for record in await january.records(EventReceived.topic.dead_letters.name)}

    assert set(stored.values()) == {1}
    assert ledger.told <= stored.keys() | letters.keys()
    assert not stored.keys() & letters.keys()
    assert {None, *ledger.bad} <= letters.keys()
    for event_id, reason in ledger.bad.items():
        assert reason in dict(letters[event_id].headers)["mojomesh-reason"].decode()
    assert letters[None].value == b"not JSON"


async def test_the_first_version_beats_the_naive_model_and_its_mojo_is_the_model(january: Client) -> None:
    manifest = (await january.version(1))["manifest"]

    assert len(manifest["folds"]) == 2
    assert manifest["metrics"]["auc"] > manifest["naive"]["auc"]
    assert manifest["parity"] <= 1e-6
    assert manifest["cause"]["kind"] == "requested"


async def test_mage_and_h2o_know_the_runs_that_the_manifest_names(january: Client) -> None:
    manifest = (await january.version(1))["manifest"]
    env = january.mesh.env
    async with httpx.AsyncClient(base_url=env["MOJOMESH_MAGE"], headers={"X-API-KEY": API_KEY}, trust_env=False) as mage:
        account = {"email": env["MOJOMESH_MAGE_EMAIL"], "password": env["MOJOMESH_MAGE_PASSWORD"]}
        mage.cookies.set("oauth_token", (await mage.post("/api/sessions", json={"session": account})).json()["session"]["token"])
        run = (await mage.get(f"/api/pipeline_runs/{manifest['pipeline_run']}")).json()["pipeline_run"]
        asked = {"pipeline_run_id": manifest["pipeline_run"], "_limit": 100}
        blocks = (await mage.get("/api/block_runs", params=asked)).json()["block_runs"]
    jobs = [(await january.http.get(f"{env['MOJOMESH_H2O']}/3/Jobs/{fold['h2o_job']}")).json()["jobs"][0] for fold in manifest["folds"]]

    assert manifest["fold_runner"] == "mage"
    assert run["status"] == "completed"
    assert {fold["block_run"] for fold in manifest["folds"]} <= {str(block["id"]) for block in blocks if block["status"] == "completed"}
    assert [job["status"] for job in jobs] == ["DONE", "DONE"]


async def test_every_door_gives_one_flight_the_same_score(january: Client, year: Year) -> None:
    entity, at = a_flight(year)
    asked = {"model": MODEL, "rows": [{"entity_id": entity, "event_time": at}]}
    vector = (await january.json("POST", "features", "/v1/features:lookup", asked))["rows"][0]["values"]

    native = await january.json("POST", "scorer", f"/v1/models/{MODEL}:score", {"entity_id": entity, "event_time": at})
    by_values = await january.json("POST", "scorer", f"/v1/models/{MODEL}:score", {"values": vector})
    scores = {native["score"], by_values["score"], await over_v2(january, vector, v2_http), await over_v2(january, vector, v2_grpc)}

    assert len(scores) == 1


async def over_v2(client: Client, vector: Json, v2: Any) -> float:
    """The score that an unmodified Open Inference client gets."""
    address = client.mesh.env["MOJOMESH_SCORER_GRPC"] if v2 is v2_grpc else client.mesh.url("scorer").removeprefix("http://")
    async with v2.InferenceServerClient(address) as server:
        inputs = []
        for name, value in vector.items():
            text = isinstance(value, str)
            tensor = v2.InferInput(name, [1], "BYTES" if text else "FP64")
            cell = value.encode() if text else np.nan if value is None else float(value)
            tensor.set_data_from_numpy(np.array([cell], dtype=object if text else np.float64))
            inputs.append(tensor)
        answer = await server.infer(MODEL, inputs)
        return float(answer.as_numpy("score").ravel()[0])


async def test_a_prediction_leads_back_to_its_rows_and_is_recomputed_bit_for_bit(january: Client, year: Year) -> None:
    entity, at = a_flight(year)
    made = await january.json("POST", "scorer", f"/v1/models/{MODEL}:score?durable=true", {"entity_id": entity, "event_time": at})
    receipts: list[Json] = []

    async def arrived() -> bool:
        receipts.append(await january.json("GET", "features", f"/v1/predictions/{made['prediction_id']}"))
        return True

    await january.until(arrived, 30, "no receipt")
    receipt = receipts[-1]
    replayed = await january.json(
        "POST", "admin", "/admin/replay", {"bundle_digest": receipt["bundle_digest"], "inputs": receipt["inputs"]}
    )

    assert {row["feature_set"] for row in receipt["rows"]} == {"flights", "weather", "planes"}
    assert replayed["scores"] == receipt["scores"] == list(made["scores"].values())
    assert (await january.version(receipt["version"]))["manifest"]["snapshot_digest"]


async def test_the_same_event_twice_is_stored_once(january: Client, ledger: Ledger) -> None:
    noon = datetime.fromisoformat("2013-01-20T12:00:00+00:00")
    event = EventReceived(event_id=uuid4(), feature_set="flights", entity_id="TWICE1", event_time=noon, values={})
    body = event.model_dump(mode="json")
    for _ in range(2):
        await january.json("POST", "ingest", "/v1/events", body)
    await january.publish(EventReceived.topic.name, [(b"TWICE1", event.model_dump_json().encode())])
    ledger.told.add(event.event_id)
    await january.until(lambda: settled(january, ledger), 30, "not stored")

    assert (await january.stored())[event.event_id] == 1


async def test_late_corrections_leave_a_snapshot_as_it_was(january: Client, ledger: Ledger, year: Year) -> None:
    version = (await january.version(1))["manifest"]
    query = {"model": version["definition"], "snapshot_time": version["snapshot_time"]}
    entity, at = a_flight(year)
    correction = {"event_id": str(uuid4()), "feature_set": "flights", "entity_id": entity, "event_time": at, "values": {"carrier": "ZZ"}}
    await january.json("POST", "ingest", "/v1/events", correction)
    ledger.told.add(UUID(correction["event_id"]))  # type: ignore[arg-type]
    await january.until(lambda: settled(january, ledger), 30, "not stored")

    again = await january.json("POST", "features", "/v1/snapshots", query)
    connection_now = await january.json("GET", "features", f"/v1/features/flights/{entity}?at={at.replace('+', '%2B')}")
    later = {**query, "snapshot_time": connection_now["created_at"]}
    corrected = await january.json("POST", "features", "/v1/snapshots", later)

    assert again["digest"] == version["snapshot_digest"]
    assert connection_now["values"] == {"carrier": "ZZ"}
    assert corrected["digest"] != version["snapshot_digest"]  # the control: a snapshot that sees the correction is another


async def test_without_redis_answers_are_the_same(january: Client, year: Year) -> None:
    rows = [{"entity_id": entity, "event_time": at} for entity, at in (a_flight(year, place) for place in range(6_000, 6_200))]
    asked = {"model": MODEL, "rows": rows}
    before = await january.json("POST", "features", "/v1/features:lookup", asked)

    with january.mesh.without("redis"):
        without = await january.json("POST", "features", "/v1/features:lookup", asked)
        score = await january.ask("POST", "scorer", f"/v1/models/{MODEL}:score", rows[0])

    assert without == before
    assert score.status_code == 200


async def test_a_bad_bundle_never_serves(january: Client) -> None:
    champion = (await january.json("GET", "registry", f"/v1/models/{MODEL}"))["champion"]
    objects = open_objects(january.mesh.env["MOJOMESH_OBJECTS"])
    bad = "f" * 64
    for name in (*SIGNED_FILES, SIGNATURE_FILE):
        content = await objects.get(f"bundles/{champion['bundle_digest']}/{name}")
        await objects.put(f"bundles/{bad}/{name}", content.replace(b'"tolerance"', b'"tolerance" ') if name == "golden.json" else content)
    answer = await january.ask("POST", "admin", "/admin/reload-model", {"model": MODEL, "version": 99, "bundle_digest": bad})

    assert answer.status_code == 409, answer.text
    assert not answer.json()["succeeded"]
    assert bad in answer.json()["reason"]
    assert await january.serving() == champion["version"]


@pytest.mark.parametrize(
    ("method", "service", "path"),
    [
        ("PUT", "registry", "/v1/definitions"),
        ("POST", "registry", f"/v1/models/{MODEL}:train"),
        ("POST", "registry", f"/v1/models/{MODEL}/versions/1:promote"),
        ("POST", "registry", f"/v1/models/{MODEL}:rollback"),
        ("POST", "admin", "/admin/reload-model"),
        ("POST", "admin", "/admin/replay"),
    ],
)
async def test_control_needs_the_token(client: Client, method: str, service: str, path: str) -> None:
    assert (await client.ask(method, service, path, {}, token=False)).status_code == 401


async def test_drift_retrains_the_model_by_itself_while_processes_are_killed(february: Client) -> None:
    alert = (await alerts(february))[0]
    second = await february.version(2)

    assert february.armed() == []  # every point was reached, and its process killed there
    assert alert.feature in ("weather.temp", "weather.dewp", "score")
    cause = second["manifest"]["cause"]
    assert (cause["kind"], cause["event_id"]) == ("drift", str(alert.event_id))
    assert len((await february.json("GET", "registry", f"/v1/models/{MODEL}"))["versions"]) == 2
    assert {(certificate.version, certificate.succeeded) for certificate in await certificates(february)} >= {(1, True), (2, True)}


async def test_nothing_is_lost_or_doubled_by_the_kills(february: Client, ledger: Ledger) -> None:
    stored = await february.stored()
    letters = {told_id(record) for record in await february.records(EventReceived.topic.dead_letters.name)}

    assert set(stored.values()) == {1}
    assert ledger.told - stored.keys() <= letters
    assert stored.keys() <= ledger.told


async def test_every_question_on_kafka_has_one_prediction(february: Client, ledger: Ledger) -> None:
    receipts: dict[UUID, set[UUID]] = {}

    async def answered() -> bool:
        for record in await february.records(PredictionsMade.topic.name):
            for prediction in PredictionsMade.model_validate_json(record.value or b"").predictions:
                if prediction.request_id is not None:
                    receipts.setdefault(prediction.request_id, set()).add(prediction.prediction_id)
        return receipts.keys() >= ledger.asked.keys()

    await february.until(answered, 60, "questions without an answer")

    assert Counter(len(ids) for ids in receipts.values()) == {1: len(ledger.asked)}
    assert not await february.records(ScoreRequested.topic.dead_letters.name)


async def test_the_trace_of_a_fact_crosses_every_service(february: Client) -> None:
    await asyncio.sleep(1)  # spans are written every half second
    folder = Path(february.mesh.env["MOJOMESH_TRACES"])
    seen: set[tuple[str, str]] = set()
    services: dict[str, str] = {}
    spans = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    for span in spans:
        services[span["context"]["span_id"]] = span["resource"]["attributes"]["service.name"]
    for span in spans:
        causes = [span["parent_id"], *(link["context"]["span_id"] for link in span["links"])]
        seen |= {(services[cause], services[span["context"]["span_id"]]) for cause in causes if cause in services}

    expected = {
        ("ingest", "features"),
        ("registry", "trainer"),
        ("trainer", "features"),
        ("trainer", "registry"),
        ("registry", "scorer"),
        ("scorer", "features"),
        ("features", "trainer"),
        ("scorer", "registry"),
    }
    assert expected <= seen, expected - seen
