"""What is not as a definition expects: held back until it is let go, or stored and counted; never lost, never counted twice."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest

from mojomesh_chassis.database import open_database
from mojomesh_contracts.events import DefinitionApplied, EventReceived
from mojomesh_ingest import quarantine
from mojomesh_store import erasure, tallies
from mojomesh_store.rows import row_id
from mojomesh_store.tallies import Tally
from tests.ingest.conftest import FEATURES

QUALITY = {
    "features": {
        "distance": {"max": 3_000, "otherwise": "hold"},
        "carrier": {"one_of": ["UA", "AA"]},
        "tail": {"missing": 0.5},
    }
}
EVER = datetime(1970, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
async def expecting(world: Any) -> Any:
    """The world, with something expected of `flights`."""
    await apply(world, QUALITY)
    return world


async def apply(world: Any, quality: dict[str, Any] | None) -> None:
    document = {"kind": "FeatureSet", "name": "flights", "entity": "flight_id", "features": FEATURES, "quality": quality}
    await world.records.publish(DefinitionApplied(event_id=uuid4(), definition_id="FeatureSet/flights", version=2, definition=document))


async def held(ingest: httpx.AsyncClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await ingest.get("/v1/quarantine")).json()["events"]
    return found


async def release(world: Any, ingest: httpx.AsyncClient, **asked: Any) -> list[str]:
    answer = await ingest.post("/v1/quarantine:release", json=asked, headers={"Authorization": f"Bearer {world.settings.token}"})
    assert answer.status_code == 200, answer.text
    released: list[str] = answer.json()["released"]
    return released


async def until_stored(world: Any, n: int) -> None:
    while len(await world.stored()) < n:
        await world.until_handled()


async def counted(world: Any) -> Tally:
    async with open_database(world.postgres.url) as shard, shard.begin() as db:
        return await tallies.counted(db, "flights", *EVER)


async def test_a_row_to_be_held_is_stored_only_when_it_is_let_go(expecting: Any, ingest: httpx.AsyncClient) -> None:
    good, bad = expecting.make_event(distance=100, tail=1), expecting.make_event(distance=9_000, late=True)
    await expecting.records.publish(good, bad)
    await expecting.until_handled()

    assert await expecting.stored() == [good.event_id]
    (found,) = await held(ingest)
    assert found["problems"] == {"distance": "is 9000, expected at most 3000"}
    assert EventReceived.model_validate({name: found[name] for name in EventReceived.model_fields}) == bad
    assert [row.values for row in await expecting.announced()] == [good.values]

    assert await release(expecting, ingest, event_ids=[str(bad.event_id)]) == [str(bad.event_id)]
    await until_stored(expecting, 2)

    assert await expecting.stored() == [good.event_id, bad.event_id]
    assert await held(ingest) == []
    assert [row.values for row in await expecting.announced()] == [good.values, bad.values]
    assert await release(expecting, ingest) == []


async def test_without_the_expectation_it_is_stored_at_once(world: Any, ingest: httpx.AsyncClient) -> None:
    """The control."""
    await apply(world, None)
    await world.records.publish(world.make_event(distance=9_000))
    await world.until_handled()

    assert len(await world.stored()) == 1
    assert await held(ingest) == []


async def test_an_odd_row_is_stored_and_counted_once_however_often_it_comes(expecting: Any, ingest: httpx.AsyncClient) -> None:
    odd, held_back = expecting.make_event(carrier="XX", tail=1), expecting.make_event(distance=9_000, carrier="UA")
    plain = expecting.make_event(carrier="UA", distance=1)
    for _ in range(2):
        await expecting.records.publish(odd, odd, plain, held_back)
        await expecting.until_handled()

    assert set(await expecting.stored()) == {odd.event_id, plain.event_id}
    tally = await counted(expecting)
    assert (tally.n_rows, tally.n_held, tally.missing) == (2, 1, {"tail": 1})
    assert {name: (found.n, found.event_ids) for name, found in tally.odd.items()} == {
        "carrier": (1, [str(odd.event_id)]),
        "distance": (1, [str(held_back.event_id)]),
    }
    assert tally.odd["carrier"].reason == "'carrier' is 'XX', expected UA, AA"
    assert len(await expecting.announced()) == 6


async def test_what_was_stored_before_something_was_expected_is_not_held(world: Any, ingest: httpx.AsyncClient) -> None:
    event = world.make_event(distance=9_000)
    await world.records.publish(event)
    await world.until_handled()
    await apply(world, QUALITY)
    await world.records.publish(world.make_event().model_copy(update={"feature_set": "another"}))  # makes ingest look at definitions
    await world.until_handled()

    await world.records.publish(event)
    await world.until_handled()

    assert await held(ingest) == []
    assert len(await world.announced()) == 2


async def test_facts_that_share_an_event_id_are_all_let_go(expecting: Any, ingest: httpx.AsyncClient) -> None:
    event = expecting.make_event(distance=9_000)
    other = event.model_copy(update={"event_time": datetime(2013, 4, 1, tzinfo=UTC)})
    await expecting.records.publish(event, other)
    await expecting.until_handled()

    await release(expecting, ingest, feature_set="flights")
    await until_stored(expecting, 2)


async def test_a_held_event_that_was_forgotten_is_not_held_again(expecting: Any, ingest: httpx.AsyncClient) -> None:
    event = expecting.make_event(distance=9_000)
    async with open_database(expecting.postgres.owner_url) as database, database.begin() as db:
        await erasure.forget_events(db, [row_id(event)])

    await expecting.records.publish(event)
    await expecting.until_handled()

    assert await held(ingest) == []
    assert await expecting.stored() == []


async def test_a_name_that_no_feature_set_can_have_is_refused(world: Any, ingest: httpx.AsyncClient) -> None:
    headers = {"Authorization": f"Bearer {world.settings.token}"}

    asked = await ingest.get("/v1/quarantine?feature_set=%00")
    let_go = await ingest.post("/v1/quarantine:release", json={"feature_set": "a\0"}, headers=headers)

    for reply in (asked, let_go):
        assert reply.status_code == 422
        assert "feature_set: Value error, contains a NUL character" in reply.json()["error"]["message"]


async def test_letting_go_needs_the_token(expecting: Any, ingest: httpx.AsyncClient) -> None:
    assert (await ingest.post("/v1/quarantine:release", json={})).status_code == 401


@pytest.mark.parametrize("point", ["ingest.after_handler", "ingest.after_relay"])
async def test_killed_anywhere_nothing_is_lost_or_counted_twice(point: str, expecting: Any, start: Callable[..., Any]) -> None:
    good = [expecting.make_event(distance=n, carrier="UA") for n in range(50)]
    bad = [expecting.make_event(distance=9_000 + n) for n in range(20)]
    (expecting.settings.fault / point).touch()
    await expecting.records.publish(*good, *bad)
    process = start("-m", "mojomesh_ingest")
    if point == "ingest.after_handler":
        process.wait_for_kill()
        process = start("-m", "mojomesh_ingest")
    await expecting.until_handled()
    assert set(await expecting.stored()) == {event.event_id for event in good}

    # Let go by another replica of the service, which does not consume: the process relays.
    async with open_database(expecting.postgres.url) as database, database.begin() as db:
        assert len(await quarantine.release(db, None, None, 100)) == 20
    if point == "ingest.after_relay":
        process.wait_for_kill()
        process = start("-m", "mojomesh_ingest")
    await until_stored(expecting, 70)

    assert sorted(await expecting.stored()) == sorted(event.event_id for event in good + bad)
    tally = await counted(expecting)
    assert (tally.n_rows, tally.n_held, tally.odd["distance"].n) == (70, 20, 20)
    assert await expecting.buried() == []
