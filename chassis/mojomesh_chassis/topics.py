"""Creating the topics that contracts declare: one step, run once; never auto-created."""

from collections.abc import Iterable

from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic

from mojomesh_contracts.events import EVENTS
from mojomesh_contracts.topics import Topic


def declared_topics() -> list[Topic]:
    """Every topic of the mesh, each followed by its dead-letter topic."""
    return [topic for event in EVENTS for topic in (event.topic, event.topic.dead_letters)]


async def ensure_topics(kafka: str, topics: Iterable[Topic] | None = None, replication_factor: int = 1) -> list[str]:
    """Create what is missing and add missing partitions; the names of the topics created.

    Raises:
        KafkaConnectionError: Nobody answers at `kafka`.
    """
    wanted = {topic.name: topic for topic in (declared_topics() if topics is None else topics)}
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        existing = set(await admin.list_topics())
        missing = [topic for name, topic in wanted.items() if name not in existing]
        if missing:
            await admin.create_topics([_new_topic(topic, replication_factor) for topic in missing])
        described = await admin.describe_topics([name for name in wanted if name in existing]) if existing & set(wanted) else []
        grown = {
            found["topic"]: NewPartitions(wanted[found["topic"]].partitions)
            for found in described
            if len(found["partitions"]) < wanted[found["topic"]].partitions
        }
        if grown:
            await admin.create_partitions(grown)
    finally:
        await admin.close()
    return [topic.name for topic in missing]


def _new_topic(topic: Topic, replication_factor: int) -> NewTopic:
    configs = {"cleanup.policy": "compact"} if topic.compacted else {"retention.ms": str(int(topic.retention.total_seconds() * 1000))}
    configs["max.message.bytes"] = str(topic.max_bytes + 64 * 1024)  # key and headers count too
    return NewTopic(topic.name, topic.partitions, replication_factor, topic_configs=configs)
