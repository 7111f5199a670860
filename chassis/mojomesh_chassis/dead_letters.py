"""Dead letters: records that no consumer could handle, as they came, with the reason in headers."""

from collections.abc import Sequence
from datetime import UTC, datetime

from aiokafka import ConsumerRecord

from mojomesh_chassis.publishing import Record
from mojomesh_contracts.topics import Topic

PREFIX = "mojomesh-"
REASON, SERVICE, TOPIC, PARTITION, OFFSET, FAILED_AT, CUT = (
    f"{PREFIX}{name}" for name in ("reason", "service", "topic", "partition", "offset", "failed-at", "cut-from-bytes")
)
MAX_VALUE_BYTES = 2 * 2**20  # well below the topic's max_bytes; only a record that was compressed can be larger


def dead_letter(record: ConsumerRecord, service: str, reason: str) -> Record:
    """The record that goes to the dead-letter topic: key, value and headers as they came, and headers that say where and why.

    A value that Kafka might refuse for its size is cut, and says so; the whole of it stays in the topic it came by for its retention.
    """
    origin = {
        REASON: reason[:4000],
        SERVICE: service,
        TOPIC: record.topic,
        PARTITION: str(record.partition),
        OFFSET: str(record.offset),
        FAILED_AT: datetime.now(UTC).isoformat(),
    }
    value = record.value
    if value is not None and len(value) > MAX_VALUE_BYTES:
        origin[CUT] = str(len(value))
        value = value[:MAX_VALUE_BYTES]
    headers = [*original_headers(record.headers), *((name, text.encode("utf-8", "replace")) for name, text in origin.items())]
    return Topic(record.topic, partitions=1).dead_letters.name, record.key, value, headers


def original_headers(headers: Sequence[tuple[str, bytes | None]]) -> list[tuple[str, bytes | None]]:
    """Headers without those that a dead letter has for its own."""
    return [(name, value) for name, value in headers if not name.startswith(PREFIX)]
