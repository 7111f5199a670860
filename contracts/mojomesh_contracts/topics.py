"""What a topic is. The topics themselves are declared by the events that travel on them, in `events`."""

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Topic:
    """A Kafka topic as `ensure_topics` creates it.

    A compacted topic keeps the last record of each key for ever; any other keeps its records for `retention`.
    """

    name: str
    partitions: int
    retention: timedelta = timedelta(days=7)
    compacted: bool = False
    max_bytes: int = 4 * 2**20  # of a record's value; what clients write is held to less, so that what follows from it fits too

    @property
    def dead_letters(self) -> "Topic":
        """Where records go that no consumer of this topic could handle, bytes and headers as they came."""
        return Topic(f"{self.name}.dlt", partitions=1, retention=timedelta(days=90), max_bytes=4 * 2**20)
