"""Real servers for every test: each starts once per run, and only when a test asks for it.

Tests get a database, topics and a cache of their own on them. `MOJOMESH_TEST_STACK=containers` takes PostgreSQL, Redis and
Kafka from containers instead of the embedded ones; the tests do not notice.
"""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import GroupCoordinatorNotAvailableError
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.structs import OffsetAndMetadata
from hypothesis import HealthCheck, settings
from moto.server import ThreadedMotoServer
from redis import Redis as RedisClient

from mojomesh_chassis.topics import declared_topics, ensure_topics
from mojomesh_contracts.events import Event
from mojomesh_local import ports
from mojomesh_local.h2o import H2O
from mojomesh_local.kafka import Kafka
from mojomesh_local.mage import Mage
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, Cluster, Postgres
from mojomesh_local.processes import Server
from mojomesh_local.redis import Redis

settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

IN_CONTAINERS = os.environ.get("MOJOMESH_TEST_STACK") == "containers"
TEMPLATE = "mesh_template"
PASSWORD = "of-the-test-servers"
_numbers = count(1)


@dataclass(frozen=True)
class TestDatabase:
    """A migrated database of one test's own; `url` is the service role's, `owner_url` the owner's."""

    __test__ = False
    url: str
    owner_url: str


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests have to tell, by `record_property("told", …)`."""
    for report in terminalreporter.getreports("passed"):
        for told in (value for name, value in report.user_properties if name == "told"):
            terminalreporter.write_line(f"{report.nodeid}: {told}")


@contextmanager
def running(server: Server) -> Iterator[None]:
    child = server.start()
    try:
        yield
    finally:
        child.stop()


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def postgres_cluster(server_folder: Path) -> Iterator[Cluster]:
    """PostgreSQL with the roles of the mesh; most tests want `postgres`, a database of their own."""
    with ExitStack() as stack:
        if IN_CONTAINERS:
            from testcontainers.community.postgres import PostgresContainer

            image = os.environ.get("MOJOMESH_TEST_POSTGRES_IMAGE", "pgvector/pgvector:pg18")
            container = stack.enter_context(PostgresContainer(image, username="postgres", password=PASSWORD, dbname="postgres"))
            cluster = Cluster(int(container.get_exposed_port(5432)), PASSWORD, container.get_container_host_ip())
            cluster.settle()
        else:
            cluster = Cluster(ports.choose(), PASSWORD)
            stack.enter_context(running(Postgres(server_folder / "postgres", cluster, server_folder / "postgres.log").server))
        # Saves a good part of the time of the tests; only a machine that loses its power would lose facts by it.
        cluster.execute("ALTER SYSTEM SET fsync = off")
        cluster.execute("SELECT pg_reload_conf()")
        yield cluster


@pytest.fixture(scope="session")
async def postgres_template(postgres_cluster: Cluster) -> str:
    """The name of a migrated database that tests copy."""
    postgres_cluster.create_database(TEMPLATE)
    await migrate_tables([postgres_cluster.url(OWNER, TEMPLATE)])
    postgres_cluster.execute("UPDATE store.shard SET n_shards = NULL", TEMPLATE)  # some tests take several copies as shards
    return TEMPLATE


@pytest.fixture
def new_postgres(postgres_cluster: Cluster, postgres_template: str) -> Iterator[Callable[[], TestDatabase]]:
    """Makes fresh migrated databases, for tests that need several (shards); all are dropped afterwards."""
    made: list[str] = []

    def make() -> TestDatabase:
        name = f"test_{next(_numbers)}"
        postgres_cluster.create_database(name, template=postgres_template)
        made.append(name)
        return TestDatabase(postgres_cluster.url(SERVICE, name), postgres_cluster.url(OWNER, name))

    yield make
    for name in made:
        postgres_cluster.drop_database(name)


@pytest.fixture
def postgres(new_postgres: Callable[[], TestDatabase]) -> TestDatabase:
    """A fresh migrated database of this test's own."""
    return new_postgres()


@pytest.fixture(scope="session")
def redis_server(server_folder: Path) -> Iterator[str]:
    with ExitStack() as stack:
        if IN_CONTAINERS:
            from testcontainers.community.redis import RedisContainer

            container = stack.enter_context(RedisContainer(os.environ.get("MOJOMESH_TEST_REDIS_IMAGE", "redis:7-alpine")))
            yield f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
        else:
            redis = Redis(server_folder / "redis", ports.choose(), PASSWORD, server_folder / "redis.log")
            stack.enter_context(running(redis.server))
            yield redis.url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """An empty Redis."""
    with RedisClient.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture(scope="session")
def kafka_server(server_folder: Path) -> Iterator[str]:
    with ExitStack() as stack:
        if IN_CONTAINERS:
            from testcontainers.community.kafka import KafkaContainer

            image = os.environ.get("MOJOMESH_TEST_KAFKA_IMAGE", "confluentinc/cp-kafka:7.6.0")
            container = KafkaContainer(image).with_kraft().with_env("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false")
            yield stack.enter_context(container).get_bootstrap_server()
        else:
            kafka = Kafka(server_folder / "kafka", ports.choose(2), server_folder / "kafka.log")
            stack.enter_context(running(kafka.server))
            yield kafka.bootstrap


@pytest.fixture(scope="session")
def fresh_topics(kafka_server: str) -> Callable[[], AbstractAsyncContextManager["Records"]]:
    """Makes the topics of the mesh, all empty, for as long as the context lasts; `kafka` is that for one test."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Records]:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka_server)
        await admin.start()
        try:
            await ensure_topics(kafka_server)
            await _until_topics_are(admin, {topic.name for topic in declared_topics()})
            yield Records(kafka_server)
            await _expel_members(admin, kafka_server)
            await admin.delete_topics([name for name in await admin.list_topics() if not name.startswith("__")])
            await _until_topics_are(admin, set())
        finally:
            await admin.close()

    return make


@pytest.fixture
async def kafka(fresh_topics: Callable[[], AbstractAsyncContextManager["Records"]]) -> AsyncIterator[str]:
    """Bootstrap servers of a Kafka with the topics of the mesh, all empty, and no consumer groups with members."""
    async with fresh_topics() as records:
        yield records.bootstrap


class Records:
    """A plain Kafka client for tests: sends, reads a whole topic, and waits until a group has handled all there is."""

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap

    async def send(
        self, topic: str, *values: bytes | None, key: bytes | None = None, headers: Sequence[tuple[str, bytes | None]] = (), **options: Any
    ) -> None:
        """Send values as they are; with a key, all go to one partition in their order."""
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap, max_request_size=2**26, **options) as producer:
            for sent in [await producer.send(topic, value, key=key, headers=list(headers)) for value in values]:
                await sent

    async def publish(self, *events: Event) -> None:
        """Send events as a client that knows the contracts does."""
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap) as producer:
            for event in events:
                await producer.send(event.topic.name, event.model_dump_json().encode(), key=event.partition_key.encode())
            await producer.flush()

    async def read(self, topic: str) -> list[ConsumerRecord]:
        """Every record that is in the topic now, by partition."""
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=self.bootstrap, auto_offset_reset="earliest")
        await consumer.start()
        try:
            found: list[ConsumerRecord] = []
            ends = await consumer.end_offsets(consumer.assignment())
            while any([await consumer.position(partition) < end for partition, end in ends.items()]):
                for records in (await consumer.getmany(timeout_ms=100)).values():
                    found += records
            return sorted(found, key=lambda record: (record.partition, record.offset))
        finally:
            await consumer.stop()

    async def until_handled(self, group: str, topic: str) -> None:
        """Wait until the group has committed everything that is in the topic now."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap)
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=self.bootstrap)
        await admin.start()
        await consumer.start()
        try:
            ends = await consumer.end_offsets(consumer.assignment())
            committed: dict[TopicPartition, OffsetAndMetadata] = {}
            while any(end and (partition not in committed or committed[partition].offset < end) for partition, end in ends.items()):
                await asyncio.sleep(0.02)
                with suppress(GroupCoordinatorNotAvailableError):  # for a moment, when the first group of all is made
                    committed = await admin.list_consumer_group_offsets(group)
        finally:
            await consumer.stop()
            await admin.close()


@pytest.fixture
def records(kafka: str) -> Records:
    """Sends and reads records of this test's Kafka."""
    return Records(kafka)


async def _until_topics_are(admin: AIOKafkaAdminClient, wanted: set[str]) -> None:
    # The controller answers first, the broker learns of it a moment later: a topic is still listed after it was deleted.
    while {name for name in await admin.list_topics() if not name.startswith("__")} != wanted:
        await asyncio.sleep(0.02)


async def _expel_members(admin: AIOKafkaAdminClient, bootstrap: str) -> None:
    """Make consumers leave their groups: a static member stays in its group, and keeps its partitions, after it was closed."""
    groups = [name for name, _ in await admin.list_consumer_groups()]
    if not groups:
        return
    client = AIOKafkaClient(bootstrap_servers=bootstrap)
    await client.bootstrap()
    try:
        for group in groups:
            # One at a time: aiokafka reads an answer of several groups with the wrong schema (its v3 request expects a v2 answer).
            (answer,) = await admin.describe_consumer_groups([group])
            coordinator = await admin.find_coordinator(group)
            for _, _, _, _, _, members, *_ in answer.groups:
                for member_id, *_ in members:
                    await client.send(coordinator, LeaveGroupRequest(group, member_id))
    finally:
        await client.close()


@pytest.fixture(scope="session")
def h2o_url(server_folder: Path) -> Iterator[str]:
    """An H2O cluster of one node, shared by the run: name your frames and models, and remove them."""
    h2o = H2O(server_folder / "h2o", ports.choose(2), server_folder / "h2o.log")
    with running(h2o.server):
        yield h2o.url


@pytest.fixture(scope="session")
def mage_env(server_folder: Path) -> Iterator[dict[str, str]]:
    """The variables that lead to a Mage with the trainer's pipelines, shared by the run."""
    mage = Mage(server_folder / "mage", ports.choose(), PASSWORD, server_folder / "mage.log")
    with running(mage.server):
        yield mage.env


@pytest.fixture(scope="session")
def mage_url(mage_env: dict[str, str]) -> str:
    return mage_env["MOJOMESH_MAGE"]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of a server that speaks S3's protocol, over HTTP; the variables that lead there are set."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs each request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_REGION": "us-east-1"}
    for name, value in ({"AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true"} | keys).items():
        monkeypatch.setenv(name, value)
    httpx.post(f"{endpoint}/moto-api/reset").raise_for_status()
    httpx.put(f"{endpoint}/mesh").raise_for_status()
    yield "s3://mesh/prefix"
    server.stop()


@pytest.fixture
def mesh_env(tmp_path: Path) -> dict[str, str]:
    """What every service needs to be told and no server is behind; add the servers that the test uses.

    `IngestSettings(**mesh_env, MOJOMESH_KAFKA=kafka, MOJOMESH_POSTGRES=postgres.url)`
    """
    objects = tmp_path / "objects"
    objects.mkdir()
    nobody = "127.0.0.1:9"  # the discard port: what a test did not ask for must not answer
    return {
        "MOJOMESH_KAFKA": nobody,
        "MOJOMESH_POSTGRES": f"postgresql://nobody@{nobody}/nothing",
        "MOJOMESH_REDIS": f"redis://{nobody}/0",
        "MOJOMESH_H2O": f"http://{nobody}",
        "MOJOMESH_OBJECTS": objects.as_uri(),
        "MOJOMESH_TOKEN": secrets.token_urlsafe(24),
        "MOJOMESH_ENVIRONMENT": "development",
    }
