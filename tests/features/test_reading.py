"""Reading as of an event time: the same answers with Redis, without it, and with one that lies."""

import asyncio
import json
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from pydantic import ValidationError
from redis.asyncio import Redis

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_chassis.redis import open_redis
from mojomesh_contracts.definitions import Model
from mojomesh_contracts.events import FeaturesWritten
from mojomesh_features.coalescing import Coalescer
from mojomesh_features.handlers import on_features_written, read_written
from mojomesh_features.reading import FeatureReader, Found
from mojomesh_features.retiring import Retired
from mojomesh_local import ports
from mojomesh_local.processes import Child
from mojomesh_local.redis import Redis as RedisServer
from mojomesh_store import rows
from mojomesh_store.online import AsOf, Entity, OnlineRow, OnlineStore, Window, microseconds
from mojomesh_store.shards import FeatureStore
from mojomesh_store.tables import FeatureRow
from mojomesh_store.vectors import Vector, plan_of
from tests.features.making import NOON, Append, AppendAll, make_event

HOUR = timedelta(hours=1)
FLIGHT = ("flights", "UA1545")
TOO_EARLY = "0001-01-01T00:00:00+05:00"  # in UTC it is of the year 0


def written(row: FeatureRow) -> tuple[Entity, OnlineRow]:
    """As it is read from Kafka."""
    return read_written(FeaturesWritten(**row._asdict()).model_dump_json().encode())


async def the_row(reader: FeatureReader, at: datetime, entity: Entity = FLIGHT) -> OnlineRow | None:
    return (await reader.at([(entity, microseconds(at))]))[entity, microseconds(at)]


class Counting(FeatureReader):
    """Counts what goes to PostgreSQL."""

    loads = 0

    async def _load(self, entities: Sequence[Entity]) -> dict[Entity, Window | TransientError]:
        self.loads += 1
        return await super()._load(entities)

    async def _stored_now(self, asked: Sequence[AsOf]) -> dict[AsOf, Found]:
        self.loads += 1
        return await super()._stored_now(asked)


@pytest.fixture
def counting(feature_store: FeatureStore, online: OnlineStore) -> Counting:
    return Counting(feature_store, online, Retired())


async def test_the_row_true_at_the_event_time_is_read_not_the_newest(reader: FeatureReader, append: Append) -> None:
    rows = [await append("flights", "UA1545", NOON + n * HOUR, distance=n) for n in range(3)]

    assert await the_row(reader, NOON - HOUR) is None
    assert await the_row(reader, NOON) == OnlineRow.of(rows[0])
    assert await the_row(reader, NOON + 1.5 * HOUR) == OnlineRow.of(rows[1])
    assert await the_row(reader, NOON + 9 * HOUR) == OnlineRow.of(rows[2])


async def test_what_was_read_once_is_read_from_redis(counting: Counting, append: Append) -> None:
    row = await append("flights", "UA1545", distance=1400)

    for _ in range(5):
        assert await the_row(counting, NOON) == OnlineRow.of(row)

    assert counting.loads == 1


async def test_a_time_before_the_kept_rows_is_read_from_postgresql(counting: Counting, append: Append) -> None:
    rows = [await append("flights", "UA1545", NOON + n * HOUR, distance=n) for n in range(20)]
    for _ in range(3):
        assert await the_row(counting, NOON + 19 * HOUR) == OnlineRow.of(rows[19])
    loads = counting.loads

    assert await the_row(counting, NOON + 2 * HOUR) == OnlineRow.of(rows[2])
    assert counting.loads == loads + 1


async def test_a_row_that_was_announced_is_read(counting: Counting, online: OnlineStore, append: Append) -> None:
    await append("flights", "UA1545", distance=1)
    for _ in range(2):
        await the_row(counting, NOON)
    loads = counting.loads
    row = await append("flights", "UA1545", NOON + HOUR, distance=2)

    for _ in range(2):  # a redelivery changes nothing
        await on_features_written([written(row)], online)

    assert await the_row(counting, NOON + HOUR) == OnlineRow.of(row)
    assert counting.loads == loads


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"seq": 2.0},
        {"seq": "7"},
        {"seq": None},
        {"values": {"distance": {}}},
        {"values": {"long": 10**30, "yes": True, "none": None, "text": "\ud83d\ude00"}},
        {"created_at": "2013-05-01T12:00:00"},
        {"created_at": "2013-05-01T12:00:00.123456+05:00"},
        {"created_at": 1367409600},
        {"event_time": "0001-01-01T00:00:00+05:00"},
        {"later": [1]},
    ],
)
def test_what_was_written_is_read_or_refused_as_pydantic_does(change: dict[str, object]) -> None:
    row = FeatureRow("flights", "UA1545", NOON, NOON, NOON + HOUR, 1, uuid4(), {"distance": 1.5, "carrier": "UA"})
    value = json.dumps(json.loads(FeaturesWritten(**row._asdict()).model_dump_json()) | change).encode()
    try:
        event = FeaturesWritten.model_validate_json(value)
    except ValidationError:
        with pytest.raises(ValidationError):
            read_written(value)
    else:
        assert read_written(value) == ((event.feature_set, event.entity_id), OnlineRow.of(event))


async def test_what_was_announced_is_read_byte_by_byte_as_what_is_stored(feature_store: FeatureStore, append: Append) -> None:
    """JSONB keeps neither the order of names nor the sign of zero nor exponents."""
    numbers = [
        -0.0,
        0.0,
        1.0,
        1.5,
        -1e15,
        1e15,
        1e16,
        -1e16,
        123456789012345680.0,
        2.0**63,
        2.0**64,
        2**63,
        2**64,
        -(10**30),
        1e22,
        -1.5e300,
        1e-7,
        5e-324,
        0.1,
    ]
    row = await append("flights", "UA1545", NOON, ü=1, z="zwölf\n", aa=None, **{f"n{n}": value for n, value in enumerate(numbers)})
    async with feature_store.shards[0].begin() as db:
        ((stored,),) = await rows.newest_of_many(db, "flights", ["UA1545"], 1)

    assert written(row)[1].vector == OnlineRow.of(stored).vector


async def history(append_all: AppendAll, seed: int) -> list[AsOf]:
    """Rows late, corrected, and of one event time, known in several transactions; and times to ask as of."""
    dice = random.Random(seed)
    entities = [("flights", f"F{n}") for n in range(6)]
    for _ in range(6):
        await append_all(
            make_event(*dice.choice(entities), NOON + dice.randrange(12) * HOUR, {"distance": dice.randrange(1000)})
            for _ in range(dice.randrange(1, 15))
        )
    return [(entity, microseconds(NOON + hours * HOUR)) for entity in [*entities, ("flights", "nobody")] for hours in range(-1, 13)]


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[tuple[str, Child]]:
    server = RedisServer(tmp_path / "redis", ports.choose(), "own", tmp_path / "redis.log")
    child = server.server.start()
    try:
        yield server.url, child
    finally:
        if child.running:
            os.kill(child.pid, signal.SIGCONT)
        child.stop()


@pytest.fixture
async def own_reader(own_redis: tuple[str, Child], feature_store: FeatureStore) -> AsyncIterator[FeatureReader]:
    async with open_redis(own_redis[0]) as redis:
        yield FeatureReader(feature_store, OnlineStore(redis), Retired())


async def from_postgresql(feature_store: FeatureStore, asked: list[AsOf]) -> Mapping[AsOf, Found]:
    async with open_redis("redis://127.0.0.1:9/0") as nowhere:
        return await FeatureReader(feature_store, OnlineStore(nowhere), Retired())._stored_now(asked)


@pytest.mark.parametrize("trouble", ["none", "killed", "frozen", "poisoned", "swapped", "flushed"])
async def test_whatever_happens_to_redis_answers_are_the_same(
    own_redis: tuple[str, Child], own_reader: FeatureReader, feature_store: FeatureStore, append_all: AppendAll, trouble: str
) -> None:
    url, child = own_redis
    asked = await history(append_all, seed=1)
    expected = await from_postgresql(feature_store, asked)
    for _ in range(3):
        assert await own_reader.at(asked) == expected

    await make_trouble(url, child, trouble)

    assert await own_reader.at(asked) == expected
    answers = await asyncio.gather(*(own_reader.at([as_of]) for as_of in asked))
    assert {as_of: row for answer in answers for as_of, row in answer.items()} == expected


async def make_trouble(url: str, child: Child, trouble: str) -> None:
    if trouble == "killed":
        child.reap()
    elif trouble == "frozen":
        os.kill(child.pid, signal.SIGSTOP)
    async with open_redis(url) as redis:
        if trouble == "flushed":
            await redis.flushall()
        elif trouble in ("poisoned", "swapped"):
            keys = [key async for key in redis.scan_iter("mojomesh:online:1:flights:*")]
            values = [value for value in await redis.mget(keys) if isinstance(value, bytes)]
            assert len(values) == len(keys) == 7
            rotated = values[1:] + values[:1]
            damaged = [value.replace(b'"distance":', b'"distance":1') for value in values]
            await redis.mset(dict(zip(keys, rotated if trouble == "swapped" else damaged, strict=True)))


@pytest.mark.parametrize("trouble", ["poisoned", "swapped"])
async def test_control_a_reader_that_does_not_check_values_is_taken_in(
    own_redis: tuple[str, Child], feature_store: FeatureStore, append_all: AppendAll, trouble: str
) -> None:
    class Trusting(OnlineStore):
        def _window(self, entity: Entity, generation: object, value: object) -> Window | None:
            lines = value.split(b"\n")[2:-1] if isinstance(value, bytes) else []
            fields = [line.split(b"\t", 4) for line in lines]
            return Window(tuple(OnlineRow(int(a), int(b), int(c), int(d), e) for a, b, c, d, e in fields), -(2**60)) if lines else None

    url, child = own_redis
    asked = [as_of for as_of in await history(append_all, seed=1) if as_of[1] >= microseconds(NOON + 11 * HOUR)]
    async with open_redis(url) as redis:
        trusting = FeatureReader(feature_store, Trusting(redis), Retired())
        expected = await from_postgresql(feature_store, asked)
        for _ in range(3):
            assert await trusting.at(asked) == expected

        await make_trouble(url, child, trouble)

        assert await trusting.at(asked) != expected


@pytest.mark.parametrize("seed", range(5))
async def test_with_announcements_in_any_order_answers_are_postgresqls(
    reader: FeatureReader, online: OnlineStore, feature_store: FeatureStore, append_all: AppendAll, seed: int
) -> None:
    dice = random.Random(seed)
    announced: list[FeatureRow] = []
    for _ in range(8):
        entities = [f"F{n}" for n in range(4)]
        events = [
            make_event("flights", dice.choice(entities), NOON + dice.randrange(15) * HOUR, {"distance": dice.randrange(1000)})
            for _ in range(dice.randrange(1, 20))
        ]
        announced += await append_all(events)
        dice.shuffle(announced)
        await on_features_written([written(row) for row in announced], online)
        asked = [(("flights", entity_id), microseconds(NOON + hours * HOUR)) for entity_id in entities for hours in range(-1, 16)]

        assert await reader.at(asked) == await from_postgresql(feature_store, asked)


async def test_what_200_ask_at_once_is_loaded_once(counting: Counting, append: Append) -> None:
    row = OnlineRow.of(await append("flights", "UA1545", distance=1400))

    answers = await asyncio.gather(*(the_row(counting, NOON) for _ in range(200)))

    assert answers == [row] * 200
    assert counting.loads <= 2


async def test_control_without_coalescing_every_one_of_them_loads(counting: Counting, append: Append) -> None:
    row = OnlineRow.of(await append("flights", "UA1545", distance=1400))

    answers = await asyncio.gather(*(counting.windows([FLIGHT]) for _ in range(200)))

    windows = [answer[FLIGHT] for answer in answers]
    assert [window.at(microseconds(NOON)) for window in windows if isinstance(window, Window)] == [row] * 200
    assert counting.loads >= 50


async def test_who_goes_away_does_not_take_the_load_from_the_others() -> None:
    started, may_end = asyncio.Event(), asyncio.Event()

    async def load(keys: list[str]) -> Mapping[str, str]:
        started.set()
        await may_end.wait()
        return {key: key.upper() for key in keys}

    coalescer = Coalescer(load)
    first, second = asyncio.create_task(coalescer.get(["a"])), asyncio.create_task(coalescer.get(["a", "b"]))
    await started.wait()
    first.cancel()
    may_end.set()

    assert await second == {"a": "A", "b": "B"}
    assert first.cancelled() or await asyncio.wait([first])


async def test_an_error_reaches_all_who_wait_and_the_next_load_starts_anew() -> None:
    failures = [OSError("away")]

    async def load(keys: list[str]) -> Mapping[str, str]:
        if failures:
            raise failures.pop()
        return dict.fromkeys(keys, "there")

    coalescer = Coalescer(load)
    answers = await asyncio.gather(coalescer.get(["a"]), coalescer.get(["a"]), return_exceptions=True)

    assert [str(answer) for answer in answers] == ["away", "away"]
    assert await coalescer.get(["a"]) == {"a": "there"}


async def test_a_vector_is_joined_as_of_the_event_time(
    reader: FeatureReader, append: Append, model: Model, definitions: Definitions
) -> None:
    flight = await append("flights", "UA1545", NOON, carrier="UA", distance=1400, international=True, origin="EWR")
    await append("weather", "EWR", NOON - 5 * HOUR, temp=1.0)
    weather = await append("weather", "EWR", NOON - HOUR, temp=2.0, fog=False)
    await append("weather", "EWR", NOON + 2 * HOUR, temp=3.0)
    plan = plan_of(model, definitions)

    (vector, too_old, too_early) = await reader.vectors(
        plan, [("UA1545", microseconds(NOON + HOUR)), ("UA1545", microseconds(NOON + 1.5 * HOUR)), ("UA1545", microseconds(NOON - HOUR))]
    )

    assert isinstance(vector, Vector)
    assert vector.values == {
        "carrier": "UA",
        "distance": 1400,
        "international": True,
        "weather.temp": 2.0,
        "weather.fog": False,
        "crews.size": None,
    }
    assert [row.key(entity) for entity, row in vector.used.items()] == [flight.key, weather.key]
    assert vector.ages_ms == {"flights": 3_600_000, "weather": 7_200_000}
    assert isinstance(too_old, Vector) and too_old.values["weather.temp"] == 2.0
    assert too_early is None


async def test_the_doors_answer_one_and_many(http: httpx.AsyncClient, append: Append) -> None:
    row = await append("flights", "UA 15/45", NOON, carrier="UA", distance=1400.5)

    one = await http.get("/v1/features/flights/UA 15/45", params={"at": NOON.isoformat()})
    many = await http.post("/v1/features/flights:batch", json={"rows": [{"entity_id": "UA 15/45"}, {"entity_id": "nobody"}]})

    assert one.status_code == 200
    assert one.json() == {
        "feature_set": "flights",
        "entity_id": "UA 15/45",
        "event_time": "2013-03-01T12:00:00+00:00",
        "created_at": row.created_at.isoformat(),
        "seq": row.seq,
        "reported_at": row.reported_at.isoformat(),
        "values": {"carrier": "UA", "distance": 1400.5},
    }
    assert many.json() == {"rows": [one.json(), None]}
    assert (await http.get("/v1/features")).json() == {"rows": {"flights": 1, "weather": 0, "crews": 0, "arrivals": 0}}


async def test_time_travel_shows_what_was_known_then(http: httpx.AsyncClient, append: Append) -> None:
    known_first = await append("flights", "UA1545", NOON, distance=1)
    known_later = await append("flights", "UA1545", NOON, distance=2)

    async def distance(snapshot_time: datetime | None) -> Any:
        params = {} if snapshot_time is None else {"snapshot_time": snapshot_time.isoformat()}
        reply = await http.get("/v1/features/flights/UA1545", params=params)
        return reply.json()["values"]["distance"] if reply.status_code == 200 else reply.status_code

    assert await distance(None) == await distance(known_later.created_at) == 2
    assert await distance(known_first.created_at) == 1
    assert await distance(known_first.created_at - timedelta(microseconds=1)) == 404
    assert await distance(datetime.now(UTC) + HOUR) == 422


async def test_a_lookup_answers_vectors_and_says_what_is_missing(http: httpx.AsyncClient, append: Append) -> None:
    flight = await append("flights", "UA1545", NOON, carrier="UA", origin="EWR")
    asked = {"model": "delay", "rows": [{"entity_id": "UA1545", "event_time": NOON.isoformat()}, {"entity_id": "nobody"}]}

    reply = await http.post("/v1/features:lookup", json=asked)

    found, missing = reply.json()["rows"]
    assert found["values"]["carrier"] == "UA"
    assert found["values"]["weather.temp"] is None
    assert found["used"] == [flight.key.model_dump(mode="json") | {key: value for key, value in found["used"][0].items() if "_" in key}]
    assert found["ages_ms"] == {"flights": 0}
    assert "no row of 'nobody'" in missing["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/v1/features/fligths/x", None, 404, "there are: arrivals, crews, flights, weather"),
        ("GET", "/v1/features/flights/x?at=2013-03-01T12:00:00", None, 422, "timezone"),
        ("POST", "/v1/features:lookup", {"model": "dealy", "rows": []}, 404, "no model 'dealy'; there are: delay"),
        ("POST", "/v1/features:lookup", {"model": "delay", "rows": [{"id": "x"}]}, 422, "rows.0.entity_id"),
        ("GET", "/v1/features/flights/a%00", None, 422, "path.entity_id: Value error, contains a NUL character"),
        ("GET", f"/v1/features/flights/{'x' * 513}", None, 422, "at most 512 characters"),
        ("GET", "/v1/features/flights/x?at=1492-10-12T00:00:00Z", None, 404, "no row of 'x'"),
        ("GET", "/v1/features/flights/x?at=9999-12-31T23:59:59-05:00", None, 422, "query.at: Value error, lies outside"),
        ("GET", f"/v1/features/flights/x?snapshot_time={TOO_EARLY.replace('+', '%2B')}", None, 422, "outside the years"),
        ("POST", "/v1/features:lookup", {"model": "delay", "rows": [{"entity_id": "a\0"}]}, 422, "0.entity_id: Value error"),
        ("POST", "/v1/features/flights:batch", {"rows": [{"entity_id": "x", "at": TOO_EARLY}]}, 422, "rows.0.at: Value error"),
        ("POST", "/v1/features/flights:batch", {"rows": [], "snapshot_time": TOO_EARLY}, 422, "outside the years"),
        ("GET", "/v1/predictions?model=%00", None, 422, "query.model: Value error, contains a NUL character"),
        ("GET", "/v1/predictions?model=delay&after=100000000000000000000", None, 422, "query.after"),
        ("GET", "/v1/predictions/7b4aa0ee-6a3c-4f58-9f6c-4f0b0e6f9d3a", None, 404, "no prediction"),
    ],
)
async def test_a_wrong_question_is_told_what_is_wrong(
    http: httpx.AsyncClient, method: str, path: str, body: Any, status: int, words: str
) -> None:
    reply = await http.request(method, path, json=body)

    assert reply.status_code == status
    assert words in reply.json()["error"]["message"]


async def test_a_future_snapshot_is_refused(reader: FeatureReader, redis: Redis) -> None:
    with pytest.raises(PermanentError, match="not possible yet"):
        await reader.known_at([(FLIGHT, microseconds(NOON))], datetime.now(UTC) + HOUR)
