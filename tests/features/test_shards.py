"""A shard that is away takes its own entities with it and no others, and says so."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from mojomesh_chassis.database import open_database
from mojomesh_contracts.definitions import Model
from mojomesh_store.shards import FeatureStore, open_feature_store
from tests.features.making import NOON, Append

FLIGHTS = [f"UA{number}" for number in range(20)]


@pytest.fixture
def databases(new_postgres: Callable[[], Any]) -> list[Any]:
    return [new_postgres() for _ in range(3)]


@pytest.fixture
async def feature_store(databases: list[Any]) -> AsyncIterator[FeatureStore]:
    async with open_feature_store([database.url for database in databases]) as store:
        yield store


async def look_up(http: httpx.AsyncClient, model: Model, entity_ids: list[str]) -> list[dict[str, Any]]:
    rows = [{"entity_id": entity_id, "event_time": NOON.isoformat()} for entity_id in entity_ids]
    reply = await http.post("/v1/features:lookup", json={"model": model.name, "rows": rows})
    assert reply.status_code == 200
    found: list[dict[str, Any]] = reply.json()["rows"]
    return found


async def test_reads_of_other_entities_go_on_and_its_own_are_refused_with_a_reason(
    http: httpx.AsyncClient, feature_store: FeatureStore, databases: list[Any], append: Append, model: Model
) -> None:
    for entity_id in FLIGHTS:
        await append("flights", entity_id, NOON, carrier="UA")
    async with open_database(databases[1].owner_url) as owner, owner.begin() as db:
        await db.execute(text("ALTER SCHEMA store RENAME TO away"))
    gone = [entity_id for entity_id in FLIGHTS if feature_store.shard_of(entity_id).number == 1]
    there = [entity_id for entity_id in FLIGHTS if entity_id not in gone]

    answers = dict(zip(FLIGHTS, await look_up(http, model, FLIGHTS), strict=True))

    assert gone and there
    assert all("shard 1 of 3" in answers[entity_id]["away"] for entity_id in gone)
    assert all(answers[entity_id]["values"]["carrier"] == "UA" for entity_id in there)
    rows = await http.post("/v1/features/flights:batch", json={"rows": [{"entity_id": entity_id} for entity_id in there]})
    assert [row["entity_id"] for row in rows.json()["rows"]] == there
    refused = await http.get(f"/v1/features/flights/{gone[0]}")
    assert refused.status_code == 503
    assert "shard 1 of 3" in refused.text
    snapshot = await http.post("/v1/snapshots", json={"model": model.model_dump(mode="json"), "snapshot_time": NOON.isoformat()})
    assert snapshot.status_code == 503
    assert "shard 1 of 3" in snapshot.text
