"""Reading topics as they stand now, as a bystander: no group, no offsets."""

from collections.abc import AsyncIterator, Iterable

from aiokafka import AIOKafkaConsumer, ConsumerRecord
from aiokafka.errors import KafkaConnectionError

from mojomesh_chassis.errors import NotFound, TransientError


async def read_topics(kafka: str, topics: Iterable[str]) -> AsyncIterator[ConsumerRecord]:
    """Every record that is in the topics at the call; those of one partition in order.

    Raises:
        TransientError: Nobody answers at `kafka`.
        NotFound: A topic does not exist.
    """
    wanted = set(topics)
    consumer = AIOKafkaConsumer(*wanted, bootstrap_servers=kafka, auto_offset_reset="earliest", isolation_level="read_committed")
    try:
        await consumer.start()
    except KafkaConnectionError as error:
        await consumer.stop()
        raise TransientError(f"nobody answers as Kafka at {kafka}: {error}") from error
    try:
        if missing := wanted - await consumer.topics():
            raise NotFound(f"Kafka at {kafka} has no topic {', '.join(sorted(missing))}; run `mojomesh migrate`")
        ends = await consumer.end_offsets(consumer.assignment())
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=200, max_records=5_000)).values():
                for record in records:
                    yield record
    finally:
        await consumer.stop()
