"""Creating the topics that contracts declare: one step, run once; never auto-created."""

import asyncio
from collections.abc import Iterable

from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.errors import KafkaConnectionError, NoError, TopicAlreadyExistsError, for_code

from mojomesh_chassis.errors import TransientError
from mojomesh_contracts.events import EVENTS
from mojomesh_contracts.topics import Topic

SERVED_WITHIN_S = 30


def declared_topics() -> list[Topic]:
    """Every topic of the mesh, each followed by its dead-letter topic."""
    return [topic for event in EVENTS for topic in (event.topic, event.topic.dead_letters)]


async def ensure_topics(kafka: str, topics: Iterable[Topic] | None = None, replication_factor: int = 1) -> list[str]:
    """Create what is missing and add missing partitions; returns the names of the topics created, once Kafka serves all that is wanted.

    Raises:
        KafkaConnectionError: Nobody answers at `kafka`.
        KafkaError: Kafka refused to create a topic.
        TimeoutError: A partition has no leader.
    """
    wanted = {topic.name: topic for topic in (declared_topics() if topics is None else topics)}
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        existing = await _leaders(admin, wanted)
        created = await _create(admin, [topic for name, topic in wanted.items() if name not in existing], replication_factor)
        grown = {name: NewPartitions(wanted[name].partitions) for name, found in existing.items() if len(found) < wanted[name].partitions}
        if grown:
            await admin.create_partitions(grown)
        await _until_served(admin, wanted)
    finally:
        await admin.close()
    return created


async def require_topics(kafka: str, names: Iterable[str]) -> None:
    """Do nothing if the topics exist. To be asked before subscribing: aiokafka waits for ever for a topic that does not.

    Raises:
        TransientError: Nobody answers at `kafka`, or a topic does not exist yet.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    try:
        await admin.start()
        missing = set(names).difference(await admin.list_topics())
    except KafkaConnectionError as error:
        raise TransientError(f"nobody answers as Kafka at {kafka}") from error
    finally:
        await admin.close()
    if missing:
        raise TransientError(f"Kafka at {kafka} has no topic {', '.join(sorted(missing))}; run `mojomesh migrate`")


async def _until_served(admin: AIOKafkaAdminClient, wanted: dict[str, Topic]) -> None:
    """The controller has decided; the brokers learn of it a moment later."""
    async with asyncio.timeout(SERVED_WITHIN_S):
        while True:
            leaders = await _leaders(admin, wanted)
            if all(len(leaders.get(name, ())) >= topic.partitions and -1 not in leaders[name] for name, topic in wanted.items()):
                return
            await asyncio.sleep(0.02)


async def _create(admin: AIOKafkaAdminClient, topics: list[Topic], replication_factor: int) -> list[str]:
    if not topics:
        return []
    answer = await admin.create_topics([_new_topic(topic, replication_factor) for topic in topics])
    codes = {name: code for name, code, *_ in answer.topic_errors}
    for name, code in codes.items():
        if code not in (NoError.errno, TopicAlreadyExistsError.errno):  # somebody else may be at it
            raise for_code(code)(f"Kafka did not create {name}")
    return [name for name, code in codes.items() if code == NoError.errno]


async def _leaders(admin: AIOKafkaAdminClient, names: Iterable[str]) -> dict[str, list[int]]:
    """The leader of each partition (-1: none yet) of those topics that exist."""
    listed = set(await admin.list_topics())
    existing = [name for name in names if name in listed]
    described = await admin.describe_topics(existing) if existing else []
    return {found["topic"]: [partition["leader"] for partition in found["partitions"]] for found in described}


def _new_topic(topic: Topic, replication_factor: int) -> NewTopic:
    configs = {"cleanup.policy": "compact"} if topic.compacted else {"retention.ms": str(int(topic.retention.total_seconds() * 1000))}
    configs["max.message.bytes"] = str(topic.max_bytes + 64 * 1024)  # key and headers count too
    return NewTopic(topic.name, topic.partitions, replication_factor, topic_configs=configs)
