"""Reading topics as they stand now, as a bystander: no group, no offsets."""

from collections.abc import AsyncIterator, Iterable

from aiokafka import AIOKafkaConsumer, ConsumerRecord

from mojomesh_chassis.topics import require_topics


async def read_topics(kafka: str, topics: Iterable[str]) -> AsyncIterator[ConsumerRecord]:
    """Every record that is in the topics at the call; those of one partition in order.

    Raises:
        TransientError: Nobody answers at `kafka`, or a topic does not exist yet.
    """
    wanted = set(topics)
    await require_topics(kafka, wanted)
    consumer = AIOKafkaConsumer(*wanted, bootstrap_servers=kafka, auto_offset_reset="earliest", isolation_level="read_committed")
    await consumer.start()
    try:
        ends = await consumer.end_offsets(consumer.assignment())
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=200, max_records=5_000)).values():
                for record in records:
                    yield record
    finally:
        await consumer.stop()
