"""Redis breaks while clients read and rows are written: what the features service answers stays what it is without a cache."""

import asyncio
import hashlib
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis as RedisClient
from sqlalchemy import text

from mojomesh_chassis.database import open_database
from mojomesh_chassis.publishing import Publisher
from mojomesh_chassis.redis import open_redis
from mojomesh_contracts.definitions import definition_id, parse_definitions
from mojomesh_contracts.events import DefinitionApplied, EventReceived, FeaturesWritten, FeatureValue
from mojomesh_local import ports
from mojomesh_local.postgres import OWNER, SERVICE
from mojomesh_local.processes import Child, Command, Server
from mojomesh_local.redis import Redis as RedisServer
from mojomesh_store import rows
from mojomesh_store.online import ENTRY_TTL_MS, EVER, GENERATION, OnlineRow, OnlineStore, Window
from mojomesh_store.shards import FeatureStore, open_feature_store
from mojomesh_store.tables import FeatureRow
from tests.features.making import DEFINITIONS, NOON, make_event

HOUR = timedelta(hours=1)
AIRPORTS = ["EWR", "JFK", "LGA"]
READ = [f"F{n}" for n in range(20)]
WRITTEN = [f"W{n}" for n in range(10)]
HOT = "HOT"
CLIENTS = 4
GUARDED = ["-m", "mojomesh_features"]
UNGUARDED = ["-m", "tests.features.unguarded"]


class Question(NamedTuple):
    method: str
    path: str
    body: str | None = None


Answer = tuple[int, bytes]
HOTLY_ASKED = Question("GET", str(httpx.URL(f"/v1/features/flights/{HOT}", params={"at": NOON.isoformat()})))


@dataclass
class Cache:
    """A Redis of this module's own, to be broken."""

    server: RedisServer
    child: Child | None = None

    def start(self) -> None:
        self.child = self.server.server.start()

    def kill(self) -> None:
        assert self.child is not None
        self.child.reap()

    def forget(self) -> None:
        """Remove what it saved."""
        (self.server.folder / "dump.rdb").unlink()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        assert self.child is not None
        os.kill(self.child.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.child.pid, signal.SIGCONT)

    @contextmanager
    def client(self) -> Iterator[Any]:
        with RedisClient.from_url(self.server.url) as client:
            yield client

    @contextmanager
    def limited(self, more_bytes: int, policy: str) -> Iterator[Any]:
        """Takes at most so much more than nothing."""
        with self.client() as redis:
            redis.flushall()
            redis.config_set("maxmemory-policy", policy)
            redis.config_set("maxmemory", redis.info("memory")["used_memory"] + more_bytes if more_bytes else 1)
            try:
                yield redis
            finally:
                redis.config_set("maxmemory", self.server.max_memory)
                redis.config_set("maxmemory-policy", "allkeys-lru")


@dataclass
class Mesh:
    """What the features service runs on."""

    environment: dict[str, str]
    folder: Path
    cache: Cache
    feature_store: FeatureStore
    owner_url: str
    publisher: Publisher
    records: Any
    expected: dict[Question, Answer] = field(default_factory=dict)

    @asynccontextmanager
    async def features(self, argv: list[str], **environment: str) -> AsyncIterator["Features"]:
        """The service in a process of its own, ready."""
        port = ports.choose()
        url = f"http://127.0.0.1:{port}"
        own = {"FEATURES_PORT": str(port), "FEATURES_WORK_FOLDER": str(self.folder / f"work-{port}")}
        command = Command("features", [sys.executable, *argv], self.folder / "features.log", self.environment | own | environment)
        child = Server(command, (port,), ready=lambda: ports.says_ok(f"{url}/health/ready")).start()
        try:
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=10, limits=httpx.Limits(max_connections=None)) as http:
                yield Features(http)
        finally:
            child.stop()

    async def append(self, *events: EventReceived) -> list[FeatureRow]:
        """Store and announce rows, as ingest does."""
        stored: list[FeatureRow] = []
        for shard, part in self.feature_store.split(events):
            async with shard.begin() as db:
                stored += await rows.append(db, part)
        await self.publisher.publish([FeaturesWritten(**row._asdict()) for row in stored])
        return stored

    async def nothing_left(self) -> None:
        """Wait until features has heard of all rows."""
        topic = FeaturesWritten.topic.name
        await self.records.until_handled(f"features.{topic}", topic)


@dataclass
class Features:
    """A running features service."""

    http: httpx.AsyncClient

    async def ask(self, question: Question) -> Answer:
        json = {"content-type": "application/json"}
        reply = await self.http.request(question.method, question.path, content=question.body, headers=json)
        return reply.status_code, reply.content

    async def count(self, metric: str, **labels: str) -> float:
        families = text_string_to_metric_families((await self.http.get("/metrics")).text)
        return sum(s.value for f in families for s in f.samples if s.name == metric and labels.items() <= s.labels.items())

    async def until_hits(self, questions: Mapping[Question, Answer]) -> None:
        """Ask until the cache is used again."""
        before = await self.count("mojomesh_online_reads_total", outcome="hit")
        while await self.count("mojomesh_online_reads_total", outcome="hit") < before + 100:
            for question, answer in questions.items():
                assert await self.ask(question) == answer


def make_questions(dice: random.Random) -> list[Question]:
    """What does not depend on rows that are written later: all as of event times up to NOON + 12 h."""

    def at() -> str:
        return (NOON + dice.randrange(-1, 13) * HOUR).isoformat()

    def bodies(**more: str) -> Iterator[str]:
        for _ in range(15):
            name = "event_time" if more else "at"
            asked = [{"entity_id": dice.choice([*READ, "nobody"]), name: at()} for _ in range(dice.randrange(1, 20))]
            yield httpx.Request("POST", "http://x", json={**more, "rows": asked}).content.decode()

    return [
        *(Question("POST", "/v1/features:lookup", body) for body in bodies(model="delay")),
        *(Question("POST", "/v1/features/flights:batch", body) for body in bodies()),
        *(Question("GET", str(httpx.URL(f"/v1/features/flights/{name}", params={"at": at()}))) for name in [*READ, "nobody"]),
        HOTLY_ASKED,
        *(Question("GET", str(httpx.URL(f"/v1/features/weather/{name}", params={"at": at()}))) for name in AIRPORTS),
    ]


async def fill(mesh: Mesh, dice: random.Random) -> None:
    """Definitions, and rows late, corrected and of one event time."""
    await mesh.publisher.publish(
        [
            DefinitionApplied(event_id=uuid4(), definition_id=definition_id(each), version=1, definition=each.model_dump(mode="json"))
            for each in parse_definitions(DEFINITIONS)
        ]
    )
    await mesh.append(make_write(dice, HOT, 0))
    for _ in range(5):
        await mesh.append(*(make_write(dice, entity, dice.randrange(12)) for entity in dice.choices([*READ, *WRITTEN], k=60)))
        weather = ((dice.choice(AIRPORTS), NOON + dice.randrange(12) * HOUR, dice.randrange(40)) for _ in range(10))
        await mesh.append(*(make_event("weather", airport, at, {"temp": temp, "fog": temp < 20}) for airport, at, temp in weather))


def make_write(dice: random.Random, entity_id: str, hours: int) -> EventReceived:
    values: dict[str, FeatureValue] = {"carrier": "UA", "distance": dice.randrange(10**6), "origin": dice.choice(AIRPORTS)}
    return make_event("flights", entity_id, NOON + hours * HOUR, values)


@pytest.fixture(scope="module")
async def mesh(
    fresh_topics: Any, postgres_cluster: Any, postgres_template: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Mesh]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "objects").mkdir()
    cache = Cache(RedisServer(folder / "redis", ports.choose(), secrets.token_hex(8), folder / "redis.log"))
    database = "test_cache_faults"
    postgres_cluster.create_database(database, template=postgres_template)
    url = postgres_cluster.url(SERVICE, database)
    async with AsyncExitStack() as stack:
        records = await stack.enter_async_context(fresh_topics())
        feature_store = await stack.enter_async_context(open_feature_store([url]))
        environment = {
            "MOJOMESH_KAFKA": records.bootstrap,
            "MOJOMESH_POSTGRES": url,
            "MOJOMESH_REDIS": cache.server.url,
            "MOJOMESH_OBJECTS": (folder / "objects").as_uri(),
            "MOJOMESH_TOKEN": secrets.token_urlsafe(24),
            "MOJOMESH_PUBLIC_KEY": str(folder / "nobody.pem"),
        }
        publisher = Publisher(records.bootstrap)
        stack.push_async_callback(publisher.close)
        mesh = Mesh(environment, folder, cache, feature_store, postgres_cluster.url(OWNER, database), publisher, records)
        await fill(mesh, random.Random(1))
        yield mesh
        if cache.child is not None:
            cache.child.stop()
    postgres_cluster.drop_database(database)


@pytest.fixture(scope="module")
async def features(mesh: Mesh) -> AsyncIterator[Features]:
    """Started while there is no Redis, asked everything, and then given one."""
    async with mesh.features(GUARDED) as features:
        mesh.expected = {question: await features.ask(question) for question in make_questions(random.Random(2))}
        assert await features.count("mojomesh_online_reads_total", outcome="hit") == 0
        assert {status for status, _ in mesh.expected.values()} == {200, 404}
        mesh.cache.start()
        await mesh.nothing_left()
        await features.until_hits(mesh.expected)
        yield features


@dataclass
class Load:
    """Clients that read all the time, while rows are written; `wrong` is what they were answered otherwise than without a cache."""

    features: Features
    mesh: Mesh
    dice: random.Random = field(default_factory=lambda: random.Random(3))
    n: int = 0
    wrong: list[tuple[Question, object]] = field(default_factory=list)
    over: bool = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        readers = [asyncio.create_task(self._read()) for _ in range(CLIENTS)]
        writer = asyncio.create_task(self._write())
        try:
            yield self
        finally:
            self.over = True
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            await writer  # not cancelled, which could leave rows stored that nobody announces, as ingest never does

    async def answers(self, n: int) -> None:
        """Wait for so many more, or for a wrong one."""
        enough = self.n + n
        while self.n < enough and not self.wrong:
            await asyncio.sleep(0.002)

    async def _read(self) -> None:
        questions = list(self.mesh.expected)
        while True:
            question = self.dice.choice(questions)
            if (answer := await self._answer(question)) != self.mesh.expected[question]:
                self.wrong.append((question, answer))
            self.n += 1

    async def _write(self) -> None:
        """Of entities that are asked for, rows that come after; of others any, and ask for those too."""
        while not self.over:
            later = [make_write(self.dice, entity, self.dice.randrange(20, 1000)) for entity in self.dice.sample(READ[:10], 2)]
            anywhere = [make_write(self.dice, entity, self.dice.randrange(12)) for entity in self.dice.sample(WRITTEN, 3)]
            await self.mesh.append(*later, *anywhere)
            asked = Question("GET", f"/v1/features/flights/{self.dice.choice(WRITTEN)}")
            if isinstance(answer := await self._answer(asked), httpx.HTTPError):
                self.wrong.append((asked, answer))
            await asyncio.sleep(0.01)

    async def _answer(self, question: Question) -> object:
        try:
            return await self.features.ask(question)
        except httpx.HTTPError as error:
            return error


Trouble = Callable[[Cache, Load], Awaitable[None]]


async def killed(cache: Cache, load: Load) -> None:
    for _ in range(2):
        cache.kill()
        await load.answers(100)
        cache.start()
        await load.answers(100)


async def frozen(cache: Cache, load: Load) -> None:
    with cache.frozen():
        await load.answers(100)
    await load.answers(100)


async def full(cache: Cache, load: Load) -> None:
    with cache.limited(0, "noeviction"):
        await load.answers(150)
    await load.answers(100)


async def evicting(cache: Cache, load: Load) -> None:
    with cache.limited(12_000, "allkeys-lru") as redis:
        await load.answers(300)
        while redis.info("stats")["evicted_keys"] <= 50 and not load.wrong:
            # What clients send and receive counts too: where that has grown beyond the limit nothing is stored, so nothing evicted.
            redis.config_set("maxmemory", redis.info("memory")["used_memory"])
            await load.answers(50)


async def flushed(cache: Cache, load: Load) -> None:
    with cache.client() as redis:
        for _ in range(30):
            redis.flushall()
            await load.answers(6)


def signed(body: bytes) -> bytes:
    return hashlib.sha1(body).hexdigest().encode() + b"\n" + body


def body_of(value: bytes) -> bytes:
    return value.partition(b"\n")[2]


def changed(value: bytes, other: bytes, dice: random.Random) -> bytes:
    return value.replace(b'"distance":', b'"distance":1')


def truncated(value: bytes, other: bytes, dice: random.Random) -> bytes:
    return b"".join(value.splitlines(keepends=True)[:3])


def of_another(value: bytes, other: bytes, dice: random.Random) -> bytes:
    return other


def of_another_layout(value: bytes, other: bytes, dice: random.Random) -> bytes:
    return signed(b"2\t" + body_of(value))


def of_chance(value: bytes, other: bytes, dice: random.Random) -> bytes:
    return dice.randbytes(dice.randrange(300))


def a_list(value: bytes, other: bytes, dice: random.Random) -> list[bytes]:
    return [value]


Poison = Callable[[bytes, bytes, random.Random], bytes | list[bytes]]


def poisoning(poison: Poison) -> Trouble:
    async def poisoned(cache: Cache, load: Load) -> None:
        with cache.client() as redis:
            for _ in range(12):
                keys = list(redis.scan_iter("mojomesh:online:1:flights:*"))
                values = dict(zip(keys, redis.mget(keys), strict=True))
                good = [value for value in values.values() if value]
                for key, value in values.items():
                    if not value:  # it is poisoned
                        continue
                    overwrite(redis, key, poison(value, load.dice.choice(good), load.dice))
                await load.answers(10)

    return poisoned


def overwrite(redis: Any, key: bytes | str, wrong: bytes | list[bytes]) -> None:
    if isinstance(wrong, bytes):
        redis.set(key, wrong)
    else:
        redis.pipeline().delete(key).rpush(key, *wrong).execute()


def generation_is(make: Callable[[random.Random], bytes | list[bytes]]) -> Trouble:
    async def poisoned(cache: Cache, load: Load) -> None:
        with cache.client() as redis:
            for _ in range(12):
                overwrite(redis, GENERATION, make(load.dice))
                await load.answers(10)

    return poisoned


TROUBLES: dict[str, Trouble] = {
    "killed": killed,
    "frozen": frozen,
    "full": full,
    "full and evicting": evicting,
    "flushed": flushed,
    **{
        f"poisoned: {poison.__name__}": poisoning(poison)
        for poison in (changed, truncated, of_another, of_another_layout, of_chance, a_list)
    },
    "poisoned: generation of chance": generation_is(lambda dice: dice.randbytes(dice.randrange(1, 60))),
    "poisoned: generation a list": generation_is(lambda _: [b"a", b"list"]),
}


@pytest.mark.parametrize("trouble", TROUBLES)
async def test_while_redis_is_in_trouble_answers_are_those_without_a_cache(features: Features, mesh: Mesh, trouble: str) -> None:
    async with Load(features, mesh).running() as load:
        await load.answers(50)
        await TROUBLES[trouble](mesh.cache, load)

    assert load.wrong == []
    assert await stale(features, mesh) == set()
    await features.until_hits(mesh.expected)


async def stale(features: Features, mesh: Mesh) -> set[str]:
    """The entities of which features, having heard of all rows, answers otherwise than PostgreSQL."""
    await mesh.nothing_left()
    hours = [*range(-1, 24), 10_000]
    asked = [{"entity_id": name, "at": (NOON + hour * HOUR).isoformat()} for name in [*READ, *WRITTEN] for hour in hours]
    known, stored = [
        await features.http.post("/v1/features/flights:batch", json={"rows": asked, **more})
        for more in ({}, {"snapshot_time": datetime.now(UTC).isoformat()})
    ]
    if known.content == stored.content:
        return set()
    answers = zip(asked, known.json()["rows"], stored.json()["rows"], strict=True)
    return {row["entity_id"] for row, now_known, there in answers if now_known != there}


def forged(poison: Poison) -> Poison:
    """The same, but with the name and the checksum that are asked for."""

    def forge(value: bytes, other: bytes, dice: random.Random) -> bytes:
        wrong = poison(value, other, dice)
        assert isinstance(wrong, bytes)
        name, (_, rest) = body_of(value).partition(b"\t")[0], body_of(wrong).split(b"\t", 1)
        return signed(name + b"\t" + rest)

    return forge


@pytest.mark.parametrize("poison", [changed, truncated, of_another], ids=lambda poison: poison.__name__)
async def test_control_poison_with_the_right_checksum_and_name_is_believed(features: Features, mesh: Mesh, poison: Poison) -> None:
    async with Load(features, mesh).running() as load:
        await poisoning(forged(poison))(mesh.cache, load)

    assert load.wrong != []
    with mesh.cache.client() as redis:
        redis.flushall()


async def test_control_a_writer_that_takes_its_row_for_all_there_is_gives_wrong_answers(features: Features, mesh: Mesh) -> None:
    """As a cache that is simply told the newest row: right until something was evicted."""
    (row,) = await mesh.append(make_write(random.Random(4), READ[10], 15))
    async with Load(features, mesh).running() as load, open_redis(mesh.cache.server.url) as redis:
        while not load.wrong:
            await redis.flushall()
            online = OnlineStore(redis)
            lease = await online.lease([("flights", READ[10])])
            await online.keep(lease, {("flights", READ[10]): Window((OnlineRow.of(row),), EVER)}, load_ms=1)
            await load.answers(15)
        await redis.flushall()


async def test_control_a_redis_that_keeps_its_data_over_a_restart_serves_what_is_stale(features: Features, mesh: Mesh) -> None:
    await features.until_hits(mesh.expected)
    with mesh.cache.client() as redis:
        redis.save()
    await mesh.append(*(make_write(random.Random(5), entity, 16) for entity in READ[10:]))
    assert await stale(features, mesh) == set()

    mesh.cache.kill()
    mesh.cache.start()
    wrong = await stale(features, mesh)
    mesh.cache.kill()
    mesh.cache.forget()
    mesh.cache.start()

    assert wrong


async def loads_of_a_stampede(mesh: Mesh, replicas: list[Features]) -> float:
    """How often a value is loaded that expires when 200 clients ask for it, twice, and PostgreSQL is slow."""
    async with open_redis(mesh.cache.server.url) as redis:
        window = None
        while window is None:
            assert await replicas[0].ask(HOTLY_ASKED) == mesh.expected[HOTLY_ASKED]
            (window,) = await OnlineStore(redis).windows([("flights", HOT)])
        old = OnlineStore(redis, clock=lambda: time.time() - ENTRY_TTL_MS / 1000)
        await old.keep(await old.lease([("flights", HOT)]), {("flights", HOT): window}, load_ms=20)

    async def loads() -> float:
        return sum([await features.count("mojomesh_row_loads_total") for features in replicas])

    async def ask(number: int) -> None:
        for _ in range(2):
            assert await replicas[number % len(replicas)].ask(HOTLY_ASKED) == mesh.expected[HOTLY_ASKED]

    before = await loads()
    async with open_database(mesh.owner_url) as owner, asyncio.TaskGroup() as clients, owner.begin() as db:
        await db.execute(text("LOCK TABLE store.feature_rows IN ACCESS EXCLUSIVE MODE"))
        for number in range(200):
            clients.create_task(ask(number))
        while await loads() == before:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)  # all the others come
    return await loads() - before


async def test_a_hot_value_that_expires_is_loaded_once_by_each_replica(features: Features, mesh: Mesh) -> None:
    assert 1 <= await loads_of_a_stampede(mesh, [features]) <= 2
    async with mesh.features(GUARDED, MOJOMESH_REPLICA="1") as another:
        assert 1 <= await loads_of_a_stampede(mesh, [features, another]) <= 2


@pytest.fixture(scope="module")
async def unguarded(features: Features, mesh: Mesh) -> AsyncIterator[Features]:
    """Waits for Redis as long as it takes, has no answer of its own when Redis has none, and loads for each who asks."""
    url = mesh.cache.server.url + "?socket_timeout=60"
    async with mesh.features(UNGUARDED, MOJOMESH_REPLICA="2", MOJOMESH_REDIS=url) as unguarded:
        unguarded.http.timeout = httpx.Timeout(2)
        yield unguarded


@pytest.mark.parametrize("trouble", ["killed", "frozen", "full"])
async def test_control_without_the_guards_trouble_is_noticed(unguarded: Features, mesh: Mesh, trouble: str) -> None:
    async with Load(unguarded, mesh).running() as load:
        await load.answers(50)
        assert load.wrong == []
        await TROUBLES[trouble](mesh.cache, load)

    assert load.wrong != []


async def test_control_without_coalescing_everybody_loads(unguarded: Features, mesh: Mesh) -> None:
    unguarded.http.timeout = httpx.Timeout(30)

    assert await loads_of_a_stampede(mesh, [unguarded]) >= 50
