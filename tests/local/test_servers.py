import asyncio
from collections.abc import Callable
from typing import Any
from urllib.request import urlopen

import asyncpg
import httpx
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import UnknownTopicOrPartitionError
from redis import Redis

from mojomesh_chassis.topics import declared_topics
from mojomesh_local.postgres import SETTINGS


async def test_a_database_has_pgvector_and_roles_that_differ(postgres: Any) -> None:
    owner = await asyncpg.connect(postgres.owner_url)
    await owner.execute("CREATE TABLE mine (v vector(2))")
    service = await asyncpg.connect(postgres.url)

    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await service.execute("SELECT v FROM mine")

    assert await owner.fetchval("SHOW synchronous_commit") == "on"
    assert SETTINGS.keys().isdisjoint({"fsync", "synchronous_commit", "full_page_writes"})  # only tests turn one off
    await service.close()
    await owner.close()


async def test_every_new_database_is_another_one(new_postgres: Callable[[], Any]) -> None:
    names = set()
    for database in (new_postgres(), new_postgres()):
        connection = await asyncpg.connect(database.url)
        names.add(await connection.fetchval("SELECT current_database()"))
        await connection.close()

    assert len(names) == 2


async def test_a_wrong_password_is_refused(postgres: Any) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres.url.replace("of-the-test-servers", "guessed"))


def test_redis_is_a_bounded_cache(redis_url: str) -> None:
    with Redis.from_url(redis_url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
        assert client.config_get("save") == {"save": ""}
        assert client.dbsize() == 0


@pytest.mark.parametrize("attempt", [1, 2])
async def test_a_test_finds_the_topics_empty_and_their_groups_without_members(kafka: str, attempt: int) -> None:
    topic = declared_topics()[0].name
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    assert {declared.name for declared in declared_topics()} <= set(await admin.list_topics())
    await admin.close()
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    # A slot of another name each time: the first one's would keep all partitions if it were still a member.
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=kafka, group_id="ingest", group_instance_id=f"ingest-{attempt}", auto_offset_reset="earliest"
    )
    await producer.start()
    await consumer.start()

    await producer.send_and_wait(topic, str(attempt).encode())

    assert (await asyncio.wait_for(consumer.getone(), 20)).value == str(attempt).encode()
    await consumer.stop()
    await producer.stop()


async def test_kafka_makes_no_topic_that_nobody_declared(kafka: str) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=kafka, request_timeout_ms=2_000, metadata_max_age_ms=500)
    await producer.start()
    with pytest.raises((UnknownTopicOrPartitionError, asyncio.TimeoutError)):
        await asyncio.wait_for(producer.send_and_wait("nobody.declared.v1", b""), 5)
    await producer.stop()

    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    assert "nobody.declared.v1" not in await admin.list_topics()
    await admin.close()


def test_h2o_answers_as_a_cluster_of_one(h2o_url: str) -> None:
    with urlopen(f"{h2o_url}/3/Cloud") as answer:
        assert b'"cloud_size":1' in answer.read()


def test_mage_lets_in_its_owner_only(mage_env: dict[str, str]) -> None:
    url, email, password = (mage_env[f"MOJOMESH_MAGE{part}"] for part in ("", "_EMAIL", "_PASSWORD"))

    key = {"X-API-KEY": "zkWlN0PkIKSN0C11CfUHUj84OT5XOJ6tDZ6bDRO2"}  # the same in every Mage: its own pages carry it

    def session_for(email: str, password: str) -> dict[str, Any]:
        answer = httpx.post(f"{url}/api/sessions", json={"session": {"email": email, "password": password}}, headers=key, timeout=60)
        return dict(answer.json())

    assert session_for(email, password)["session"]["token"]
    assert "error" in session_for("admin@admin.com", "admin")
    assert "error" in httpx.get(f"{url}/api/pipelines", headers=key, timeout=60).json()


def test_all_servers_listen_on_the_loopback_address_only(
    postgres_cluster: Any, redis_url: str, kafka_server: str, h2o_url: str, mage_url: str
) -> None:
    listening = [
        connection.laddr.ip
        for child in psutil.Process().children(recursive=True)
        for connection in child.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]

    assert len(listening) >= 6
    assert set(listening) == {"127.0.0.1"}
