"""Challengers score the entities of their buckets and nobody else's; shadows score what the champion answered, and are only counted."""

import asyncio
from collections import Counter
from uuid import uuid4

import httpx
import numpy as np
import pytest
import tritonclient.grpc.aio as triton

from mojomesh_contracts.bundles import BundleSchema, Column, Golden, GoldenRow
from mojomesh_contracts.events import Challenger, PredictionsMade, ScoreRequested, ShadowCompared, TrafficFollowed
from mojomesh_contracts.traffic import bucket_of
from mojomesh_scorer.encoding import recoder
from mojomesh_scorer.errors import SchemaMismatch
from tests.scorer.making import (
    TOLERANCE,
    Registry,
    Scorer,
    StartScorer,
    Trained,
    infer_tensor,
    read_events,
    read_predictions,
    records_of,
)

BUCKETS = list(range(300))


@pytest.fixture
def versions(models: dict[str, Trained]) -> dict[int, Trained]:
    return {1: models["binomial"], 2: models["reversed"]}


@pytest.fixture
async def digests(registry: Registry, versions: dict[int, Trained]) -> dict[int, str]:
    """Version 1 is the champion."""
    digests = {version: await registry.store(trained, "delay") for version, trained in versions.items()}
    await registry.promote("delay", 1, digests[1])
    return digests


def version_of(entity_id: str) -> int:
    return 2 if bucket_of("delay", entity_id) in BUCKETS else 1


async def beside(scorer: Scorer, n_workers: int, versions: list[int], champion: int = 1) -> set[int]:
    """Process ids of the workers, once so many hold these versions beside the champion."""
    while True:
        workers = (await scorer.admin.get("/admin/workers", headers=scorer.authorized)).json()
        held = [(worker["serving"].get("delay"), worker["beside"].get("delay")) for worker in workers if worker["open"]]
        if held == [(champion, versions)] * n_workers:
            return {worker["pid"] for worker in workers}
        await asyncio.sleep(0.02)


async def test_an_entity_has_one_version_on_every_door_of_every_worker_and_its_score_is_that_versions(
    start_scorer: StartScorer, registry: Registry, kafka: str, versions: dict[int, Trained], digests: dict[int, str]
) -> None:
    await registry.set_traffic("delay", 1, Challenger(version=2, bundle_digest=digests[2], buckets=BUCKETS))
    scorer = await start_scorer()
    await beside(scorer, 2, [2])
    entities = [f"entity {number}" for number in range(250)]
    rows = dict(zip(entities, versions[1].rows, strict=False))
    wanted = {entity: versions[version_of(entity)].scores[place][1] for place, entity in enumerate(entities)}
    asked = [ScoreRequested(event_id=uuid4(), model="delay", entity_id=entity, values=rows[entity]) for entity in entities]
    await registry.publisher.publish(asked)
    got: list[tuple[str, int, float]] = []
    workers = set()

    for place, entity in enumerate(entities):
        new_connection = {"Connection": "close"} if place % 5 == 0 else {}  # so that both workers are asked
        native = await scorer.http.post(
            "/v1/models/delay:score", json={"values": rows[entity], "entity_id": entity}, headers=new_connection
        )
        v2 = {"inputs": versions[1].one_row_tensors(rows[entity]), "parameters": {"entity_id": entity}}
        tensors = (await scorer.http.post("/v2/models/delay/infer", json=v2)).json()
        got.append((entity, native.json()["version"], native.json()["score"]))
        got.append((entity, int(tensors["model_version"]), tensors["outputs"][0]["data"][0]))
        workers.add(native.json()["prediction_id"][14:23])  # random, one for each process
    async with triton.InferenceServerClient(f"127.0.0.1:{scorer.grpc_port}") as client:
        for entity in entities:
            inputs = [infer_tensor(name, value) for name, value in rows[entity].items()]
            result = await client.infer("delay", inputs, parameters={"entity_id": entity})
            got.append((entity, int(result.get_response().model_version), float(result.as_numpy("score")[0])))
    batch = (
        await scorer.http.post("/v1/models/delay:score", json={"rows": [{"values": rows[one], "entity_id": one} for one in entities]})
    ).json()
    got += [(entity, one["version"], one["score"]) for entity, one in zip(entities, batch["predictions"], strict=True)]
    receipts = await read_predictions(kafka, [str(event.derive_id("prediction")) for event in asked])
    by_request = {receipt.request_id: receipt for receipt in receipts.values() if receipt.request_id}
    for event in asked:
        receipt = by_request[event.event_id]
        got.append((receipt.entity_id or "", version_of(receipt.entity_id or ""), receipt.scores[1]))

    assert len(got) == 1250
    assert len(workers) == 2
    assert [(entity, version) for entity, version, _ in got if version != version_of(entity)] == []
    assert max(abs(score - wanted[entity]) for entity, _, score in got) <= TOLERANCE
    assert Counter(version for _, version, _ in got)[2] > 200
    assert batch["version"] is None

    # Without an entity the champion answers; a version that is asked for by number does whoever's the entity is.
    row = versions[1].rows[0]
    challenged = next(entity for entity in entities if version_of(entity) == 2)
    assert {(await scorer.score("delay", row))["version"] for _ in range(50)} == {1}
    v2 = {"inputs": versions[1].one_row_tensors(row), "parameters": {"entity_id": challenged}}
    assert {(await scorer.http.post(f"/v2/models/delay/versions/{n}/infer", json=v2)).json()["model_version"] for n in (1, 2)} == {"1", "2"}
    assert (await scorer.http.get("/v2/models/delay")).json()["versions"] == ["1", "2"]
    assert (await scorer.http.post("/v2/models/delay/versions/3/infer", json=v2)).status_code == 404


async def test_a_replaced_worker_has_the_challengers_stale_settings_change_nothing_and_a_bad_challenger_is_left_out(
    start_scorer: StartScorer, registry: Registry, kafka: str, versions: dict[int, Trained], digests: dict[int, str]
) -> None:
    scorer = await start_scorer()
    challenger = Challenger(version=2, bundle_digest=digests[2], buckets=BUCKETS)
    challenged = next(entity for entity in map(str, range(1000)) if version_of(entity) == 2)
    row = versions[1].rows[0]
    bad_golden = Golden(tolerance=TOLERANCE, rows=[GoldenRow(inputs=[None] * 6, scores=[0.5, 0.5])])
    bad = Challenger(version=3, bundle_digest=await registry.store(versions[1], "delay", bad_golden), buckets=list(range(300, 600)))

    async def serving(entity_id: str) -> set[int]:
        async with httpx.AsyncClient(base_url=scorer.http.base_url, trust_env=False) as client:  # its connection is to no killed worker
            asked = {"values": row, "entity_id": entity_id}
            return {(await client.post("/v1/models/delay:score", json=asked)).json()["version"] for _ in range(20)}

    await registry.set_traffic("delay", 2, challenger)
    killed = await beside(scorer, 2, [2])
    assert await serving(challenged) == {2}
    await registry.set_traffic("delay", 1)
    for worker in scorer.workers():
        worker.kill()
    while killed & await beside(scorer, 2, [2]):
        await asyncio.sleep(0.02)
    assert await serving(challenged) == {2}

    await registry.set_traffic("delay", 3, bad, challenger)
    followed = await read_events(kafka, TrafficFollowed, 2)
    assert {event.setting: [one.version for one in event.left_out] for event in followed} == {2: [], 3: [3]}
    assert "golden rows" in next(event.left_out[0].reason for event in followed if event.left_out)
    await beside(scorer, 2, [2])
    assert "traffic_stale" in scorer.log
    theirs = next(entity for entity in map(str, range(1000)) if bucket_of("delay", entity) in bad.buckets)
    assert await serving(theirs) == {1}
    assert await serving(challenged) == {2}

    # A challenger that is promoted serves everybody, and goes on when it leaves the traffic.
    await registry.promote("delay", 2, digests[2])
    await registry.set_traffic("delay", 4)
    await beside(scorer, 2, [], champion=2)
    assert await serving(theirs) == {2}
    assert await serving(challenged) == {2}


async def last_words(kafka: str, n_rows: int) -> list[ShadowCompared]:
    """The last event of each worker, once they have counted so many rows together, dropped ones included."""
    last: dict[object, ShadowCompared] = {}
    async with records_of(kafka, ShadowCompared.topic.name) as records:
        while sum(event.n_rows + event.n_dropped for event in last.values()) < n_rows:
            event = ShadowCompared.model_validate_json((await records.getone()).value)
            last[event.counter] = event
    return list(last.values())


async def test_what_a_shadow_counted_is_what_the_receipts_say(
    start_scorer: StartScorer, registry: Registry, kafka: str, versions: dict[int, Trained], digests: dict[int, str]
) -> None:
    await registry.set_traffic("delay", 1, Challenger(version=2, bundle_digest=digests[2], buckets=[]))
    scorer = await start_scorer(SCORER_SHADOWS_EVERY_S="0.3")

    answers = [await scorer.score("delay", row) for row in versions[1].rows[:300]]
    more = await scorer.http.post("/v1/models/delay:score", json={"rows": [{"values": row} for row in versions[1].rows[:200]]})
    told = await last_words(kafka, 500)

    assert {answer["version"] for answer in answers} == {1}
    receipts = await read_predictions(kafka, [one["prediction_id"] for one in [*answers, *more.json()["predictions"]]])
    place_of = {tuple(versions[1].encode(row)): place for place, row in enumerate(versions[1].rows)}
    champion = np.array([receipt.scores for receipt in receipts.values()])
    shadow = np.array([versions[2].scores[place_of[tuple(receipt.inputs)]] for receipt in receipts.values()])
    assert len(receipts) == sum(event.n_rows for event in told) == 500
    assert sum(event.n_dropped for event in told) == 0
    assert {(event.version, event.shadow_version) for event in told} == {(1, 2)}
    for scores, counts in ((champion, [event.counts for event in told]), (shadow, [event.shadow_counts for event in told])):
        by_hand = np.histogram(scores[:, 1], bins=[-1, *told[0].edges, 2])[0]
        assert np.array(counts).sum(axis=0).tolist() == [*by_hand, 0]
    differences = np.abs(champion - shadow)[:, 1].sum()
    assert sum(event.sum_of_differences for event in told) == pytest.approx(differences, abs=500 * TOLERANCE)
    assert sum(event.n_agreed or 0 for event in told) == ((champion[:, 1] > 0.5) == (shadow[:, 1] > 0.5)).sum()
    async with records_of(kafka, PredictionsMade.topic.name) as records:
        block = PredictionsMade.model_validate_json((await records.getone()).value)
    assert block.version == 1


async def test_rows_that_a_shadow_has_no_room_for_are_dropped_and_counted_and_answered_all_the_same(
    start_scorer: StartScorer,
    registry: Registry,
    kafka: str,
    versions: dict[int, Trained],
    digests: dict[int, str],
) -> None:
    """The control is the test above: where there is room for all, none is dropped."""
    await registry.set_traffic("delay", 1, Challenger(version=2, bundle_digest=digests[2], buckets=[]))
    scorer = await start_scorer(SCORER_WORKERS="1", SCORER_SHADOWS_EVERY_S="0.3", SCORER_SHADOWS_WAITING="50")

    reply = await scorer.http.post("/v1/models/delay:score", json={"rows": [{"values": row} for row in versions[1].rows[:200]]})
    await scorer.score("delay", versions[1].rows[0])

    assert len(reply.json()["predictions"]) == 200
    (told,) = await last_words(kafka, 201)
    assert (told.n_dropped, told.n_rows) == (200, 1)


def column(name: str, levels: list[str] | None = None) -> Column:
    return Column(name=name, feature_set="flights", feature=name, type="category" if levels else "number", levels=levels)


def test_rows_are_encoded_anew_for_a_shadow_by_names_of_columns_and_levels() -> None:
    champion = BundleSchema(columns=[column("hour"), column("carrier", ["AA", "B6", "UA"]), column("wind")], label="late", classes=None)
    shadow = BundleSchema(columns=[column("carrier", ["B6", "DL", "AA"]), column("hour")], label="late", classes=None)

    recoded = recoder(champion, shadow)(np.array([[7, 0, 1], [8, 1, 2], [9, 2, 3], [np.nan, np.nan, 4]]))

    assert np.array_equal(recoded, np.array([[2, 7], [0, 8], [np.nan, 9], [np.nan, np.nan]]), equal_nan=True)
    with pytest.raises(SchemaMismatch, match="does not have the shadow's column 'wind'"):
        recoder(shadow, champion)
