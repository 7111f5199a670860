import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_chassis.redis import LineRedis, open_redis
from mojomesh_contracts.definitions import parse_definitions
from mojomesh_scorer.errors import FeaturesFailed
from mojomesh_scorer.lookups import FEW_ROWS, EntityAt, FeatureLookup, Found
from mojomesh_store.online import ROWS_KEPT, Entity, OnlineRow, OnlineStore, Window, microseconds

AT = datetime(2013, 5, 1, tzinfo=UTC)


class Features:
    """Stands in for the features service: answers when it is let, and counts the rows of each call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.let = asyncio.Event()
        self.status = 200
        self.refused = self.away = ""
        self.refusal = 422

    async def answer(self, request: httpx.Request) -> httpx.Response:
        rows = [row["entity_id"] for row in json.loads(request.content)["rows"]]
        self.calls.append(rows)
        await self.let.wait()
        if self.status != 200 or self.refused in rows:
            return httpx.Response(self.status if self.status != 200 else self.refusal)
        away = {"away": "shard 1 of 3 is away"}
        return httpx.Response(200, json={"rows": [away if name == self.away else {"values": {"carrier": name}} for name in rows]})

    def lookup(self, online: OnlineStore | None = None, definitions: Definitions | None = None) -> FeatureLookup:
        client = httpx.AsyncClient(transport=httpx.MockTransport(self.answer))
        nowhere = OnlineStore(LineRedis("redis://127.0.0.1:9/0", timeout_s=1))
        return FeatureLookup(client, "http://features", online or nowhere, definitions or Definitions())


async def ask(lookup: FeatureLookup, *entity_ids: str) -> list[str]:
    found: list[Found] = await lookup.vectors("flight-delay", [EntityAt(entity_id, AT) for entity_id in entity_ids])
    return [str(row.values["carrier"]) for row in found]


async def until(features: Features, n_calls: int) -> None:
    while len(features.calls) < n_calls:
        await asyncio.sleep(0)


async def test_what_is_asked_while_a_call_is_under_way_goes_together_in_the_next() -> None:
    features = Features()
    lookup = features.lookup()
    first = asyncio.create_task(ask(lookup, "a"))
    await until(features, 1)

    later = [asyncio.create_task(ask(lookup, *names)) for names in ("b", "cd", "e")]
    await asyncio.sleep(0.01)
    features.let.set()

    assert [await task for task in (first, *later)] == [["a"], ["b"], ["c", "d"], ["e"]]
    assert features.calls == [["a"], ["b", "c", "d", "e"]]


async def test_one_that_goes_away_does_not_take_the_answer_of_the_others_with_it() -> None:
    features = Features()
    lookup = features.lookup()
    gone, stays = asyncio.create_task(ask(lookup, "a")), asyncio.create_task(ask(lookup, "b"))
    await until(features, 1)

    gone.cancel()
    features.let.set()

    assert await stays == ["b"]


async def test_a_silent_service_is_told_to_everybody_who_asked() -> None:
    features = Features()
    features.status = 503
    features.let.set()
    lookup = features.lookup()

    answers = await asyncio.gather(ask(lookup, "a"), ask(lookup, "b"), return_exceptions=True)

    assert [type(answer) for answer in answers] == [TransientError, TransientError]


@pytest.mark.parametrize(("status", "error"), [(422, PermanentError), (500, FeaturesFailed)])
async def test_a_row_that_is_refused_is_refused_to_its_own_caller_only(status: int, error: type[Exception]) -> None:
    features = Features()
    features.refused, features.refusal = "bad", status
    features.let.set()
    lookup = features.lookup()

    answers = await asyncio.gather(ask(lookup, "a"), ask(lookup, "bad"), ask(lookup, "c"), return_exceptions=True)

    assert answers[0] == ["a"]
    assert isinstance(answers[1], error)
    assert answers[2] == ["c"]


async def test_an_entity_on_a_shard_that_is_away_is_refused_to_its_own_caller_only_who_may_ask_again() -> None:
    features = Features()
    features.away = "gone"
    lookup = features.lookup()
    first = asyncio.create_task(ask(lookup, "a"))
    await until(features, 1)
    together = asyncio.gather(ask(lookup, "b"), ask(lookup, "gone", "c"), ask(lookup, "d"), return_exceptions=True)
    await asyncio.sleep(0.01)
    features.let.set()

    answers = await together

    assert features.calls == [["a"], ["b", "gone", "c", "d"]]
    assert [await first, answers[0], answers[2]] == [["a"], ["b"], ["d"]]
    assert isinstance(answers[1], TransientError) and answers[1].status == 503
    assert "shard 1 of 3 is away" in str(answers[1])
    with pytest.raises(TransientError, match="shard 1 of 3 is away"):
        await ask(lookup, "gone", *(f"b{n}" for n in range(FEW_ROWS)))


async def test_a_large_block_does_not_wait_for_others() -> None:
    features = Features()
    lookup = features.lookup()
    first = asyncio.create_task(ask(lookup, "a"))
    await until(features, 1)

    block = asyncio.create_task(ask(lookup, *(f"b{n}" for n in range(FEW_ROWS + 1))))
    await until(features, 2)
    features.let.set()

    assert len(await block) == FEW_ROWS + 1
    assert await first == ["a"]


async def test_a_service_that_does_not_answer_is_left_alone_for_a_while() -> None:
    features = Features()
    features.let.set()
    features.status = 503
    lookup = features.lookup()
    lookup._client = httpx.AsyncClient(transport=httpx.MockTransport(_no_answer))

    for _ in range(3):
        with pytest.raises(TransientError, match="does not answer"):
            await ask(lookup, "a")

    with pytest.raises(TransientError, match="did not answer; it is asked again within 2 s"):
        await ask(lookup, "a")


def _no_answer(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


DEFINITIONS = """
kind: FeatureSet
name: flights
entity: flight_id
features: {carrier: {type: category}, origin: {type: category}}
---
kind: FeatureSet
name: weather
entity: airport
features: {temp: {type: number}}
---
kind: FeatureSet
name: arrivals
entity: flight_id
features: {late: {type: boolean}}
---
kind: Model
name: flight-delay
spine: flights
label: {feature_set: arrivals, column: late, type: binary}
features: [{feature_set: flights, columns: [carrier]}, {feature_set: weather, join: origin, max_age: 3h}]
algorithm: {name: gbm}
walk_forward: {n_windows: 2, train: expanding, test: 15d, step: 15d}
stale: STALE
"""


@pytest.fixture
async def online(redis_url: str) -> AsyncIterator[OnlineStore]:
    async with open_redis(redis_url, timeout_s=10) as client:
        yield OnlineStore(client, chance=lambda: 1.0)


def declared(stale: str = "missing") -> Definitions:
    return Definitions(*parse_definitions(DEFINITIONS.replace("STALE", stale)))


async def keep(online: OnlineStore, entity: Entity, event_time: datetime, values: str) -> None:
    lease = await online.lease([entity])
    row = OnlineRow(microseconds(event_time), 100, 1, 100, values.encode())
    await online.keep(lease, {entity: Window.of([row], ROWS_KEPT)}, 1.0)


async def n_round_trips(online: OnlineStore) -> int:
    stats = await online.redis.info("commandstats")
    return int(stats.get("cmdstat_mget", {"calls": 0})["calls"])


async def test_many_entities_take_two_round_trips_to_redis_and_none_to_the_service(online: OnlineStore) -> None:
    features = Features()
    for number in range(10):
        await keep(online, ("flights", f"F{number}"), AT, f'{{"carrier":"C{number}","origin":"JFK"}}')
    await keep(online, ("weather", "JFK"), AT - timedelta(hours=2), '{"temp":12.5}')
    before = await n_round_trips(online)

    found = await features.lookup(online, declared()).vectors("flight-delay", [EntityAt(f"F{number}", AT) for number in range(10)])

    assert [one.values for one in found] == [{"carrier": f"C{number}", "weather.temp": 12.5} for number in range(10)]
    assert found[0].ages_ms == {"flights": 0, "weather": 2 * 3600 * 1000}
    assert [key.feature_set for key in found[0].used] == ["flights", "weather"]
    assert await n_round_trips(online) - before == 2
    assert features.calls == []


async def test_what_redis_does_not_know_for_certain_is_asked_of_the_service(online: OnlineStore) -> None:
    features = Features()
    features.let.set()
    await keep(online, ("flights", "known"), AT, '{"carrier":"UA","origin":null}')
    await keep(online, ("flights", "no-weather"), AT, '{"carrier":"UA","origin":"EWR"}')

    answers = await ask(features.lookup(online, declared()), "known", "unknown", "no-weather")

    assert answers == ["UA", "unknown", "no-weather"]
    assert features.calls == [["unknown", "no-weather"]]


async def test_an_entity_without_rows_is_known_to_have_none(online: OnlineStore) -> None:
    lease = await online.lease([("flights", "nobody")])
    await online.keep(lease, {("flights", "nobody"): Window.of([], ROWS_KEPT)}, 1.0)

    (found,) = await Features().lookup(online, declared()).vectors("flight-delay", [EntityAt("nobody", AT)])

    assert found.error is not None
    assert "'flights' has no row of 'nobody'" in found.error


@pytest.mark.parametrize("stale", ["missing", "serve", "refuse"])
async def test_a_row_older_than_it_may_be_is_used_as_the_model_says(online: OnlineStore, stale: str) -> None:
    await keep(online, ("flights", "F1"), AT, '{"carrier":"UA","origin":"JFK"}')
    await keep(online, ("weather", "JFK"), AT - timedelta(hours=4), '{"temp":12.5}')

    (found,) = await Features().lookup(online, declared(stale)).vectors("flight-delay", [EntityAt("F1", AT)])

    if stale == "refuse":
        assert found.refused == "'weather' of 'JFK' is 4:00:00 old, and may be 3:00:00"
    else:
        assert found.values == {"carrier": "UA", "weather.temp": 12.5 if stale == "serve" else None}
        assert found.ages_ms.get("weather") == (4 * 3600 * 1000 if stale == "serve" else None)


HOURLY = """
    {carrier: {type: category}, origin: {type: category}}
computed: {hour: hour(event_time), early: hour(event_time) < 6}
"""
BUSY = "\naggregates: {reports: {function: count, of: weather, by: {airport: origin}, window: 3h}}\n"


async def test_computed_columns_are_computed_here_and_aggregates_by_the_service(online: OnlineStore) -> None:
    features = Features()
    features.let.set()
    await keep(online, ("flights", "F1"), AT, '{"carrier":"UA","origin":null}')
    computing = DEFINITIONS.replace("STALE", "missing").replace(" {carrier: {type: category}, origin: {type: category}}\n", HOURLY)
    computing = computing.replace("columns: [carrier]", "columns: [carrier, hour, early]")
    aggregating = computing.replace("computed:", f"{BUSY}computed:").replace("hour, early", "reports")

    (computed,) = await features.lookup(online, Definitions(*parse_definitions(computing))).vectors(
        "flight-delay", [EntityAt("F1", AT + timedelta(hours=5, minutes=59))]
    )
    assert computed.values == {"carrier": "UA", "hour": 5.0, "early": True, "weather.temp": None}
    assert features.calls == []

    await ask(features.lookup(online, Definitions(*parse_definitions(aggregating))), "F1")
    assert features.calls == [["F1"]]
