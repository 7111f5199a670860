"""The service's doors over real sockets: what takes the fast lane, and that its answers are those of the application."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import httpx
import pytest
from redis.asyncio import Redis

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.fast_lane import Answer, Headers, Lane
from mojomesh_chassis.health import Health
from mojomesh_chassis.http import mesh_app
from mojomesh_contracts.definitions import parse_definitions
from mojomesh_contracts.events import FeatureValue
from mojomesh_features import routes
from mojomesh_features.reading import FeatureReader
from mojomesh_features.retiring import Retired
from mojomesh_features.settings import FeaturesSettings
from mojomesh_features.short_answers import MOST_ROWS, ShortAnswers
from mojomesh_store.online import GENERATION, OnlineStore
from mojomesh_store.retirement import Retirement
from mojomesh_store.shards import FeatureStore
from tests.features.making import DEFINITIONS, NOON, AppendAll, make_event
from tests.serving import serving

LONG_WAY = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
MORE = """
kind: Model
name: refusing
spine: flights
label: {feature_set: arrivals, column: late, type: binary}
features: [{feature_set: flights}, {feature_set: weather, join: origin, max_age: 3h}]
stale: refuse
algorithm: {name: gbm}
walk_forward: {n_windows: 2, train: expanding, test: 15d, step: 15d}
---
kind: FeatureSet
name: trips
entity: flight_id
features: {distance: {type: number}, place: {type: category}}
aggregates: {n_before: {function: count, of: crews, by: [flight_id], window: 2h}}
computed: {half: distance / 2, hour: hour(event_time)}
---
kind: Model
name: counting
spine: trips
label: {feature_set: arrivals, column: late, type: binary}
features: [{feature_set: trips}]
algorithm: {name: gbm}
walk_forward: {n_windows: 2, train: expanding, test: 15d, step: 15d}
---
kind: Model
name: computing
spine: trips
label: {feature_set: arrivals, column: late, type: binary}
features: [{feature_set: trips, columns: [distance, half, hour]}]
algorithm: {name: gbm}
walk_forward: {n_windows: 2, train: expanding, test: 15d, step: 15d}
"""
AT = (NOON + timedelta(hours=5)).isoformat()


class Noting(Lane):
    """A lane that knows how many requests it had an answer for."""

    def __init__(self, answers: ShortAnswers) -> None:
        super().__init__(self._noting)
        self._answers = answers
        self.n_short = 0

    def _noting(self, url: bytes, headers: Headers) -> Answer | None:
        answer = self._answers.route(url, headers)

        def noted(body: bytes) -> Any:
            found = answer(body) if answer else None
            if isinstance(found, asyncio.Future):
                found.add_done_callback(self._note)
            return found

        return noted

    def _note(self, answer: "asyncio.Future[bytes | None]") -> None:
        self.n_short += not answer.cancelled() and answer.result() is not None


@dataclass
class Doors:
    """The service's, and how to ask both ways."""

    http: httpx.AsyncClient
    lane: Noting
    online: OnlineStore
    retired: Retired

    async def both_ways(self, path: str, body: object) -> tuple[httpx.Response, bool]:
        """The application's answer, and whether the lane had one of its own, which then is the same."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        before = self.lane.n_short
        headers = {"Content-Type": "application/json"}
        short = await self.http.post(path, content=content, headers=headers)
        was_short = self.lane.n_short > before
        long = await self.http.post(path, content=content, headers=headers | LONG_WAY)
        assert (short.status_code, short.content) == (long.status_code, long.content)
        assert short.headers["content-type"] == long.headers["content-type"]
        return long, was_short


@pytest.fixture
async def doors(
    mesh_env: dict[str, str],
    definitions: Definitions,
    feature_store: FeatureStore,
    online: OnlineStore,
    redis: Redis,
    append_all: AppendAll,
) -> AsyncIterator[Doors]:
    """With rows of three flights, which Redis knows, and F4, which it does not."""
    for definition in parse_definitions(MORE):
        definitions.put(definition, 1)
    events = [
        make_event("flights", f"F{n + 1}", NOON + timedelta(hours=hour), {"distance": 100 * n + hour, "origin": "EWR" if n else None})
        for n in range(4)
        for hour in range(10)  # more than are kept
    ]
    corrected: dict[str, FeatureValue] = {"distance": -1.5, "origin": "JFK", "carrier": 'A\u00e9"\\ %s'}
    events += [
        make_event("flights", "F2", NOON + timedelta(hours=4), corrected),
        make_event("weather", "EWR", NOON + timedelta(hours=4), {"temp": 20.5}),
        make_event("weather", "JFK", NOON - timedelta(days=1), {"temp": 1e300}),
        make_event("crews", "F1", NOON, {"size": 3}),
        make_event("trips", "F1", NOON, {"distance": 7, "place": "here"}),
    ]
    await append_all(events)
    retired = Retired()
    reader = FeatureReader(feature_store, online, retired)
    lane = Noting(ShortAnswers(online, definitions, retired))
    await redis.flushdb()
    kept = [("flights", "F1"), ("flights", "F2"), ("flights", "F3"), ("flights", "nobody"), ("weather", "EWR"), ("weather", "JFK")]
    kept += [("crews", name) for name in ("F1", "F2", "F3", "nobody")] + [("trips", "F1")]
    await reader.windows(kept)
    settings = FeaturesSettings.model_validate(mesh_env | {"MOJOMESH_PUBLIC_KEY": "none"})
    state = {"reader": reader, "definitions": definitions, "lane": lane}

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[dict[str, Any]]:
        yield state

    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(mesh_app("features", settings, Health(), lifespan, routes.router)))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=20)
        yield Doors(await stack.enter_async_context(client), lane, online, retired)


def lookup(*rows: object, model: str = "delay") -> dict[str, Any]:
    return {"model": model, "rows": list(rows)}


def at(entity_id: str, hours: float = 5.0) -> dict[str, Any]:
    return {"entity_id": entity_id, "event_time": (NOON + timedelta(hours=hours)).isoformat()}


@pytest.mark.parametrize(
    ("body", "is_short"),
    [
        (lookup(at("F1"), at("F2"), at("F3")), True),
        (lookup(at("F2", 4.5)), True),  # joined to a row that is too old: missing
        (lookup(at("F3", 8.5)), True),
        (lookup(at("F1", 3)), True),
        (lookup(at("F1", 1.5)), False),  # older than what is kept
        (lookup(at("nobody")), True),
        (lookup(at("F4")), False),
        (lookup(at("F1"), at("somebody else")), False),
        (lookup(), True),
        (lookup(at("F2", 4.5), at("F3"), model="refusing"), True),
        (lookup(at("F1"), model="computing"), True),
        (lookup(at("F1"), model="counting"), False),
        (lookup(at("F1"), model="nothing"), False),
        (lookup({"entity_id": "F1", "event_time": "2013-03-01T17:00:00Z"}), True),
        (lookup({"entity_id": "F1", "event_time": "2013-03-01T18:00:00.25+01:00"}), True),
        (lookup({"entity_id": "F1", "event_time": "2013-03-01T17:00:00.1234567Z"}), False),
        (lookup({"entity_id": "F1", "event_time": "2013-03-01 17:00:00Z"}), False),
        (lookup({"entity_id": "F1", "event_time": "2013-03-01T17:00:00"}), False),
        (lookup({"entity_id": "F1", "event_time": "2013-02-30T17:00:00Z"}), False),
        (lookup({"entity_id": "F1", "event_time": 1362157200}), False),
        (lookup({"entity_id": "x" * 512, "event_time": AT}), False),
        (lookup({"entity_id": "x" * 513, "event_time": AT}), False),
        (lookup({"entity_id": "\u00e9" * 512, "event_time": AT}), False),
        (lookup({"entity_id": ""}), False),
        (lookup({"entity_id": "F1\0", "event_time": AT}), False),
        (lookup({"entity_id": "nobody", "event_time": "0001-01-01T00:00:00+05:00"}), False),
        (lookup({"entity_id": 7}), False),
        (lookup({"entity_id": "F1", "at": AT}), False),
        (lookup("F1"), False),
        (lookup(*[at("F1")] * MOST_ROWS), True),
        (lookup(*[at("F1")] * (MOST_ROWS + 1)), False),
        ({"model": "delay"}, False),
        ([], False),
        (b"", False),
        (b"{", False),
        (b"\xff", False),
        (b'{"model": "delay", "rows": [{"entity_id": "\\ud800"}]}', False),
        (b'{"model": "no", "model": "delay", "rows": [{"entity_id": "F9", "entity_id": "F1", "event_time": "%b"}]}' % AT.encode(), True),
        (b'{"model": "delay", "rows": [{"entity_id": "F1", "event_time": NaN}]}', False),
    ],
)
async def test_vectors_are_the_same_both_ways(doors: Doors, body: object, is_short: bool) -> None:
    answer, was_short = await doors.both_ways("/v1/features:lookup", body)

    assert was_short == is_short
    assert answer.status_code == 200 or not was_short


@pytest.mark.parametrize(
    ("path", "body", "is_short"),
    [
        ("flights", {"rows": [{"entity_id": "F1", "at": AT}, {"entity_id": "F2", "at": AT}, {"entity_id": "nobody", "at": AT}]}, True),
        ("flights", {"rows": [{"entity_id": "F1"}], "snapshot_time": None}, True),
        ("flights", {"rows": [{"entity_id": "F1"}], "snapshot_time": AT}, False),
        ("flights", {"rows": [{"entity_id": "F4"}]}, False),
        ("flights", {"rows": [{"entity_id": "F1", "event_time": AT}]}, False),
        ("nothing", {"rows": [{"entity_id": "F1"}]}, False),
        ("fl%69ghts", {"rows": [{"entity_id": "F1"}]}, False),
        ("flights", {"rows": []}, True),
        ("flights", {"rows": [{"entity_id": "F1\0"}]}, False),
        ("flights", {"rows": [{"entity_id": "nobody", "at": "9999-12-31T23:59:59-05:00"}]}, False),
    ],
)
async def test_rows_are_the_same_both_ways(doors: Doors, path: str, body: object, is_short: bool) -> None:
    _, was_short = await doors.both_ways(f"/v1/features/{path}:batch", body)

    assert was_short == is_short


@pytest.mark.parametrize("odd", [{"entity_id": "F4\0"}, {"entity_id": "F4", "time": "0001-01-01T00:00:00+05:00"}])
@pytest.mark.parametrize(("path", "time"), [(":lookup", "event_time"), ("/flights:batch", "at")])
async def test_what_cannot_be_stored_is_refused_to_who_asks_for_it_alone(doors: Doors, path: str, time: str, odd: dict[str, str]) -> None:
    """F4 is not in Redis: what is asked of it together goes to PostgreSQL together."""
    model = {"model": "delay"} if path == ":lookup" else {}
    asked = [{"entity_id": "F4"}, {time if name == "time" else name: value for name, value in odd.items()}, {"entity_id": "F4"}]

    replies = await asyncio.gather(*(doors.http.post(f"/v1/features{path}", json={**model, "rows": [row]}) for row in asked))

    assert [reply.status_code for reply in replies] == [200, 422, 200]
    assert "Value error" in replies[1].json()["error"]["message"]


async def test_without_a_time_a_vector_is_that_of_now(doors: Doors) -> None:
    for headers in ({}, LONG_WAY):
        reply = await doors.http.post("/v1/features:lookup", json=lookup({"entity_id": "F1"}), headers=headers)
        (row,) = reply.json()["rows"]
        assert row["values"]["distance"] == 9
        assert row["ages_ms"]["flights"] > 86_400_000
    assert doors.lane.n_short == 1


async def test_a_body_that_is_not_said_to_be_json_is_the_applications(doors: Doors) -> None:
    content = json.dumps(lookup(at("F1"))).encode()
    for headers in ({}, {"Content-Type": "text/plain"}):
        short, long = [await doors.http.post("/v1/features:lookup", content=content, headers=headers | traced) for traced in ({}, LONG_WAY)]
        assert (short.status_code, short.content) == (long.status_code, long.content)
    assert doors.lane.n_short == 0


@pytest.mark.parametrize("trouble", ["damaged", "swapped", "of another layout", "of another generation", "gone"])
async def test_what_redis_does_not_know_for_certain_is_read_the_long_way(doors: Doors, redis: Redis, trouble: str) -> None:
    one, other = "mojomesh:online:1:flights:F1", "mojomesh:online:1:flights:F2"
    expected, was_short = await doors.both_ways("/v1/features:lookup", lookup(at("F1")))
    assert was_short
    value = await redis.get(one)
    assert isinstance(value, bytes)
    if trouble == "damaged":
        await redis.set(one, value.replace(b'"distance":5', b'"distance":6'))
    elif trouble == "swapped":
        await redis.rename(other, one)
    elif trouble == "of another layout":
        await redis.set(one, b"{}")
    elif trouble == "of another generation":
        await redis.set(GENERATION, "another")
    else:
        await redis.delete(one)

    answer = await doors.http.post("/v1/features:lookup", json=lookup(at("F1")))

    assert (answer.status_code, answer.content) == (200, expected.content)
    assert doors.lane.n_short == 1


async def test_rows_that_have_left_are_refused_both_ways(doors: Doors) -> None:
    doors.retired._of["flights"] = Retirement("flights", NOON + timedelta(hours=6), NOON)

    answer, was_short = await doors.both_ways("/v1/features:lookup", lookup(at("F1")))

    assert (answer.status_code, was_short) == (410, False)
    assert (await doors.both_ways("/v1/features:lookup", lookup(at("F1", 7))))[1]


async def test_requests_that_come_together_share_the_questions_to_redis(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    n_questions, ask = 0, doors.online.rows_at

    async def counted(asked: Any) -> Any:
        nonlocal n_questions
        n_questions += 1
        return await ask(asked)

    monkeypatch.setattr(doors.online, "rows_at", counted)
    answer = doors.lane.route(b"/v1/features:lookup", [(b"content-type", b"application/json")])
    assert answer is not None
    names = [f"F{n % 3 + 1}" for n in range(60)]

    answers = await asyncio.gather(*[cast(Any, answer(json.dumps(lookup(at(name))).encode())) for name in names])

    assert [json.loads(found)["rows"][0]["used"][0]["entity_id"] for found in answers] == names
    assert n_questions == 2  # the second one is for the joined set


async def test_a_definition_that_changes_counts_at_once(doors: Doors, definitions: Definitions) -> None:
    before, _ = await doors.both_ways("/v1/features:lookup", lookup(at("F1")))
    (changed,) = parse_definitions(DEFINITIONS.split("---")[-1].replace("[carrier, distance, international]", "[distance]"))
    definitions.put(changed, 2)

    after, was_short = await doors.both_ways("/v1/features:lookup", lookup(at("F1")))

    assert was_short
    assert before.json()["rows"][0]["values"].keys() - after.json()["rows"][0]["values"].keys() == {"carrier", "international"}
