"""Dead letters: records that no consumer could handle, as they came, with the reason in headers; and sending them again."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from aiokafka import ConsumerRecord

from mojomesh_chassis.errors import PermanentError
from mojomesh_chassis.publishing import Publisher, Record
from mojomesh_chassis.reading import read_topics
from mojomesh_contracts.topics import Topic

Headers = Sequence[tuple[str, bytes | None]]

PREFIX = "mojomesh-"
REASON, SERVICE, TOPIC, PARTITION, OFFSET, FAILED_AT, CUT, REPLAYED_AT = (
    f"{PREFIX}{name}" for name in ("reason", "service", "topic", "partition", "offset", "failed-at", "cut-from-bytes", "replayed-at")
)
MAX_VALUE_BYTES = 2 * 2**20  # well below the topic's max_bytes; only a record that came compressed can be larger
MAX_REASON_CHARS = 4_000


@dataclass(frozen=True)
class DeadLetter:
    """A record that could not be handled. Buried several times (a crash, a retry), it is still one."""

    topic: str  # where it came from, as are partition and offset
    partition: int
    offset: int
    service: str
    reason: str
    failed_at: datetime
    key: bytes | None
    value: bytes | None
    headers: Headers  # as they came
    cut_from_bytes: int | None  # how large the value was, if it was cut
    replayed_at: datetime | None = None

    @property
    def letter_id(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


def dead_letter(record: ConsumerRecord, service: str, reason: str) -> Record:
    """The record that goes to the dead-letter topic: key, value and headers as they came, and headers that say where and why.

    A value that Kafka might refuse for its size is cut, and says so; the whole of it stays in the topic it came by for its retention.
    """
    about = {
        REASON: reason[:MAX_REASON_CHARS],
        SERVICE: service,
        TOPIC: record.topic,
        PARTITION: str(record.partition),
        OFFSET: str(record.offset),
        FAILED_AT: datetime.now(UTC).isoformat(),
    }
    value = record.value
    if value is not None and len(value) > MAX_VALUE_BYTES:
        about[CUT] = str(len(value))
        value = value[:MAX_VALUE_BYTES]
    return Record(_buried_in(record.topic), record.key, value, [*_original(record.headers), *_as_headers(about)])


async def read_dead_letters(kafka: str, topics: Sequence[Topic]) -> list[DeadLetter]:
    """The dead letters of `topics`, oldest first, each once however often it was buried.

    Raises:
        TransientError: Nobody answers at `kafka`.
    """
    letters: dict[str, DeadLetter] = {}
    replayed: dict[str, datetime] = {}
    async for record in read_topics(kafka, [topic.dead_letters.name for topic in topics]):
        about = {name: value.decode("utf-8", "replace") for name, value in record.headers if name.startswith(PREFIX) and value is not None}
        if not {TOPIC, PARTITION, OFFSET} <= about.keys():
            continue  # somebody else's
        letter_id = f"{about[TOPIC]}/{about[PARTITION]}/{about[OFFSET]}"
        if REPLAYED_AT in about:
            replayed[letter_id] = datetime.fromisoformat(about[REPLAYED_AT])
        else:
            letters[letter_id] = _letter(record, about)
    found = [DeadLetter(**{**vars(letter), "replayed_at": replayed.get(letter_id)}) for letter_id, letter in letters.items()]
    return sorted(found, key=lambda letter: letter.failed_at)


async def replay(publisher: Publisher, letters: Sequence[DeadLetter]) -> None:
    """Send letters to where they came from, as they came; then note in the dead-letter topic that this was done.

    Raises:
        PermanentError: Of one of them only a part is left; none was sent.
        TransientError: Kafka did not acknowledge all; replay again, their effects are safe to repeat.
    """
    if cut := [letter.letter_id for letter in letters if letter.cut_from_bytes is not None]:
        raise PermanentError(f"{', '.join(cut)}: too large to be kept whole, so it cannot be replayed from here")
    await publisher.send([Record(letter.topic, letter.key, letter.value, letter.headers) for letter in letters])
    now = datetime.now(UTC).isoformat()
    notes: list[Record] = []
    for letter in letters:
        about = {TOPIC: letter.topic, PARTITION: str(letter.partition), OFFSET: str(letter.offset), REPLAYED_AT: now}
        notes.append(Record(_buried_in(letter.topic), b"", None, _as_headers(about)))
    await publisher.send(notes)


def _letter(record: ConsumerRecord, about: dict[str, str]) -> DeadLetter:
    return DeadLetter(
        topic=about[TOPIC],
        partition=int(about[PARTITION]),
        offset=int(about[OFFSET]),
        service=about.get(SERVICE, ""),
        reason=about.get(REASON, ""),
        failed_at=datetime.fromisoformat(about[FAILED_AT]) if FAILED_AT in about else datetime.fromtimestamp(record.timestamp / 1000, UTC),
        key=record.key,
        value=record.value,
        headers=_original(record.headers),
        cut_from_bytes=int(about[CUT]) if CUT in about else None,
    )


def _buried_in(topic: str) -> str:
    return Topic(topic, partitions=1).dead_letters.name


def _original(headers: Headers) -> Headers:
    return [(name, value) for name, value in headers if not name.startswith(PREFIX)]


def _as_headers(about: dict[str, str]) -> Headers:
    return [(name, text.encode("utf-8", "replace")) for name, text in about.items()]
