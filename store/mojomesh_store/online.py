"""The online store: the newest rows of an entity in one Redis value, which proves that it is what was asked for.

Redis only ever saves time. A value counts if its checksum, name and generation are right and its rows are known to be all there are
from some event time on; what it cannot answer for certain is a miss, and PostgreSQL answers. Writes are merged into what reads have
loaded, by `online.lua`. Redis should keep nothing over a restart, or what was merged after its last save is missing until it expires.
"""

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

import orjson
from prometheus_client import Counter
from redis.exceptions import RedisError

from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.redis import LineRedis
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.events import FeatureValue, RowKey
from mojomesh_store.tables import FeatureRow

_READS = Counter("mojomesh_online_reads_total", "Entities asked of Redis by what it knew", ["outcome"])

LAYOUT = 1  # of keys and values; a change of either takes another number
ROWS_KEPT = 8
ENTRY_TTL_MS = 10 * 60 * 1000
EMPTY_TTL_MS = 30 * 1000  # of an entity without rows: anybody may ask for any name
UNLOADED_TTL_MS = 10 * 1000  # of rows that came before any load; a load that takes longer is not kept
BETA = 2.0  # of XFetch: above 1 refreshes earlier; half of it if dice are thrown on the short way and again on the long one
MOST_SEEN = 10_000  # entities whose values are remembered, of some kilobytes each
KEYS_A_CALL = 100  # a script holds up everybody else
GENERATION = f"mojomesh:online:{LAYOUT}:generation"

EVER = -(2**53)
"""`complete_from` of an entity of which every row is there."""
_WRITTEN = ("", "", 0, 0, 0)  # in place of what a load knows
_SHORTEST_EXPONENT = 1e16  # from here on a float's JSON has an exponent, and JSONB gives back an integer
_SAME = (str, bool, NoneType)  # comes back from JSONB as it is
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Entity = tuple[str, str]
"""Feature set and entity_id."""

AsOf = tuple[Entity, int]
"""An entity, and the event time in microseconds since 1970 as of which its row is asked for."""
Lease = dict[Entity, bytes]
"""How Redis knew each entity when its load began."""


def microseconds(time: datetime) -> int:
    """Since 1970, exactly."""
    since = time - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def moment(us: int) -> datetime:
    """The inverse of `microseconds`, in UTC."""
    return _EPOCH + timedelta(microseconds=us)


class Written(Protocol):
    """What a `FeaturesWritten` says, be it that or what a faster reader makes of the same record."""

    @property
    def event_time(self) -> datetime: ...
    @property
    def created_at(self) -> datetime: ...
    @property
    def seq(self) -> int: ...
    @property
    def reported_at(self) -> datetime: ...
    @property
    def values(self) -> Mapping[str, FeatureValue]: ...


class _Row(NamedTuple):
    event_us: int
    created_us: int
    seq: int
    reported_us: int
    vector: bytes  # `values` as JSON, as PostgreSQL gives them back


class OnlineRow(_Row):
    """A feature row as the online store keeps it, in the order that decides which one wins; times in microseconds since 1970."""

    key_json: bytes | None = None
    """Its key, once it has been written: a row that Redis keeps is read again and again."""

    @classmethod
    def of(cls, row: FeatureRow | Written) -> "OnlineRow":
        times = (microseconds(row.event_time), microseconds(row.created_at), row.seq, microseconds(row.reported_at))
        return cls(*times, orjson.dumps(row.values if isinstance(row, FeatureRow) else _as_stored(row.values)))

    @cached_property
    def values(self) -> Mapping[str, FeatureValue]:
        values: dict[str, FeatureValue] = orjson.loads(self.vector)
        return values

    def key(self, entity: Entity) -> RowKey:
        return RowKey(
            feature_set=entity[0],
            entity_id=entity[1],
            event_time=moment(self.event_us),
            created_at=moment(self.created_us),
            seq=self.seq,
        )

    @property
    def _line(self) -> bytes:
        return b"%d\t%d\t%d\t%d\t%b" % self


@dataclass(frozen=True, slots=True)
class Window:
    """The newest rows of an entity, newest first, one per event time; it knows the row true at any time from `complete_from` on."""

    rows: tuple[OnlineRow, ...]
    complete_from: int

    @classmethod
    def of(cls, newest: Sequence[OnlineRow], asked: int) -> "Window":
        """Of the `asked` newest rows, newest first, corrections before what they correct."""
        firsts: dict[int, OnlineRow] = {}
        for row in newest:
            firsts.setdefault(row.event_us, row)
        rows = tuple(firsts.values())
        return cls(rows, EVER if len(newest) < asked else rows[-1].event_us)

    def at(self, event_us: int) -> OnlineRow | None:
        """The row that was true at an event time that the window `covers`; None if there is none."""
        return next((row for row in self.rows if row.event_us <= event_us), None)

    def covers(self, event_us: int) -> bool:
        """Whether `at` is certain to be right."""
        return event_us >= self.complete_from


@dataclass(slots=True)
class _Kept:
    """A window as Redis keeps it; its rows are read as far as they are asked for, which mostly is the first."""

    value: bytes
    generation: bytes
    complete_from: int
    loaded_at_ms: int  # 0: never
    load_ms: float
    _next: int  # where the lines begin that were not read yet
    _rows: list[OnlineRow] = field(default_factory=list)

    def at(self, event_us: int) -> OnlineRow | None:
        """As `Window.at`; raises ValueError if that far lines are not rows."""
        for row in self._rows:
            if row.event_us <= event_us:
                return row
        while self._next < len(self.value):
            end = self.value.index(b"\n", self._next)
            row = _row(self.value[self._next : end])
            self._rows.append(row)
            self._next = end + 1
            if row.event_us <= event_us:
                return row
        return None

    def whole(self) -> Window:
        """All of it; raises ValueError if lines are not rows."""
        self.at(EVER - 1)
        return Window(tuple(self._rows), self.complete_from)


class Unanswered(Exception):
    """Redis did not answer, or is not asked for a while because it did not."""


@dataclass
class Breaker:
    """Stops asking a server that does not answer, and lets one call try again after a while.

    Three failures in a row open it: then a frozen Redis costs nobody its time-out but the one call that tries.
    """

    clock: Callable[[], float] = time.monotonic
    failures_allowed: int = 3
    open_s: float = 2.0
    _failures: int = 0
    _closed_again_at: float = 0.0

    @property
    def is_open(self) -> bool:
        return self._failures >= self.failures_allowed and self.clock() < self._closed_again_at

    def failed(self) -> None:
        self._failures += 1
        self._closed_again_at = self.clock() + self.open_s

    def try_now(self) -> None:
        """Called before a call: if this is the one that tries, the others go on doing without."""
        if self._failures >= self.failures_allowed:
            self._closed_again_at = self.clock() + self.open_s

    def succeeded(self) -> None:
        self._failures = 0


@dataclass
class OnlineStore:
    """The newest rows of entities, in Redis. Reading never raises: what Redis does not know is a miss.

    Args:
        clock: Seconds since 1970.
        chance: Uniform in (0, 1]; XFetch's dice.
    """

    redis: LineRedis
    breaker: Breaker = field(default_factory=Breaker)
    clock: Callable[[], float] = time.time
    chance: Callable[[], float] = lambda: 1.0 - random.random()
    # Values that were read before, and proved to be what they should be: equal ones need not prove it again.
    _seen: dict[Entity, _Kept] = field(default_factory=dict)
    _generation: object = None  # of what was seen
    # Writes that Redis did not take: until they are repeated, whole entries may lack them, so none is believed.
    _missed_writes: bool = False

    def __post_init__(self) -> None:
        self._merge = self.redis.register_script((Path(__file__).parent / "online.lua").read_text())

    async def windows(self, entities: Sequence[Entity]) -> list[Window | None]:
        """What Redis knows of each entity, in one round trip.

        None is a miss: nothing there, somebody else's or a damaged value, no answer, or XFetch's turn to load anew.
        """
        generation, values = await self._values(entities)
        if generation is None:
            return [None] * len(entities)
        windows = [self._window(entity, generation, value) for entity, value in zip(entities, values, strict=True)]
        _count(len(windows), sum(window is not None for window in windows))
        return windows

    async def rows_at(self, asked: Sequence[AsOf]) -> dict[AsOf, OnlineRow | None]:
        """The row of each entity that was true at the event time, if Redis knows for certain; in one round trip.

        It is `windows` for who needs one time of each and loads nothing: it reads no more of a value than that takes.
        """
        entities = list(dict.fromkeys([entity for entity, _ in asked]))
        generation, values = await self._values(entities)
        if generation is None:
            return {}
        kept = {entity: self._believed(entity, generation, value) for entity, value in zip(entities, values, strict=True)}
        found: dict[AsOf, OnlineRow | None] = {}
        for as_of in asked:
            entity, at = as_of
            window = kept[entity]
            if window is not None and at >= window.complete_from:
                try:
                    found[as_of] = window.at(at)
                except ValueError:
                    _warn_of_layout(entity)
        _count(len(asked), len(found))
        return found

    async def _values(self, entities: Sequence[Entity]) -> tuple[object, list[object]]:
        """The generation and what Redis has of each entity; no generation, nothing to be believed."""
        if self._missed_writes:
            return None, []
        try:
            found = await self._asking(self.redis.values([GENERATION, *[_key(entity) for entity in entities]]))
        except Unanswered:
            _READS.labels("unanswered").inc(len(entities))
            return None, []
        if not isinstance(found, list) or len(found) != len(entities) + 1:
            log.warning("redis_answered_something_else")
            return None, []
        if found[0] != self._generation:
            self._generation = found[0]
            self._seen.clear()  # nothing of whom was forgotten stays
        return None if self._missed_writes else found[0], found[1:]  # which may have been missed meanwhile

    async def lease(self, entities: Sequence[Entity]) -> Lease:
        """What to `keep` entities under that are loaded from now on: it notices if a write is not merged into what is loaded.

        A write leaves its row with the entity; if that is evicted before the load is kept, the lease is void.
        """
        if self._missed_writes:
            return {}
        try:
            return await self._merging({entity: [*_WRITTEN, 0] for entity in entities})
        except Unanswered:
            return {}

    async def keep(self, lease: Lease, loaded: Mapping[Entity, Window], load_ms: float) -> None:
        """Keep what was loaded under a lease for those who ask next; without an answer from Redis it is not kept."""
        loaded_at = int(self.clock() * 1000)
        parts = {
            entity: [
                window.complete_from,
                lease[entity],
                loaded_at,
                f"{load_ms:.3f}",
                ENTRY_TTL_MS if window.rows else EMPTY_TTL_MS,
                len(window.rows),
                *(row._line for row in window.rows),
            ]
            for entity, window in loaded.items()
            if entity in lease
        }
        try:
            await self._merging(parts)
        except Unanswered as error:
            log.info("rows_not_kept", n=len(loaded), reason=str(error))

    async def merge(self, written: Iterable[tuple[Entity, OnlineRow]]) -> None:
        """Let reads know of rows that were written; repeating it, in any order, changes nothing.

        Raises:
            TransientError: Redis did not take all; until it does, reads of this process do without it, and then everything is loaded anew.
        """
        rows: dict[Entity, list[OnlineRow]] = {}
        for entity, row in written:
            rows.setdefault(entity, []).append(row)
        parts = {entity: [*_WRITTEN, len(of_one), *(row._line for row in of_one)] for entity, of_one in rows.items()}
        try:
            if self._missed_writes:
                # Another generation, begun by whoever asks next; a Redis that is full takes no new one, but lets go of this.
                await self._asking(self.redis.delete(GENERATION), anyway=True)
            await self._merging(parts, anyway=True)
        except Unanswered as error:
            self._missed_writes = True
            raise TransientError(f"Redis does not take rows, reads go to PostgreSQL: {error}", retry_after_s=0.25) from error
        self._missed_writes = False

    async def forget(self, entities: Sequence[Entity]) -> None:
        """Drop entities, and let nothing count that was loaded before.

        Raises:
            TransientError: Redis does not answer.
        """
        try:
            # A load that is on its way must not put back what it found: hence another generation.
            await self._asking(self.redis.delete(GENERATION, *(_key(entity) for entity in entities)), anyway=True)
        except Unanswered as error:
            raise TransientError(f"Redis does not forget: {error}") from error

    async def _merging(self, parts: Mapping[Entity, list[Any]], anyway: bool = False) -> Lease:
        leases: Lease = {}
        entities = iter(parts.items())
        while some := list(islice(entities, KEYS_A_CALL)):
            keys = [GENERATION, *(_key(entity) for entity, _ in some)]
            arguments: list[Any] = [ROWS_KEPT, str(uuid4()), UNLOADED_TTL_MS]
            for entity, part in some:
                arguments += [_name(entity), *part]
            answer = await self._asking(self._merge(keys, arguments), anyway)
            if not isinstance(answer, list) or len(answer) != len(some):
                raise Unanswered("Redis answered something else")
            leases.update((entity, lease) for (entity, _), lease in zip(some, answer, strict=True))
        return leases

    async def _asking(self, command: Any, anyway: bool = False) -> Any:
        """A command's answer, through the breaker; `anyway` asks even if it is open (writes must get through in the end)."""
        if self.breaker.is_open and not anyway:
            command.close()
            raise Unanswered("Redis has not answered lately")
        self.breaker.try_now()
        try:
            answer = await command
        except (RedisError, OSError) as error:
            self.breaker.failed()
            raise Unanswered(repr(error)) from error
        self.breaker.succeeded()
        return answer

    def _window(self, entity: Entity, generation: object, value: object) -> Window | None:
        kept = self._believed(entity, generation, value)
        try:
            return None if kept is None else kept.whole()
        except ValueError:
            _warn_of_layout(entity)
            return None

    def _believed(self, entity: Entity, generation: object, value: object) -> _Kept | None:
        if not isinstance(value, bytes):
            return None
        kept = self._seen.get(entity)
        if kept is None or kept.value != value:
            if (kept := _proved(entity, value)) is None:
                return None
            if len(self._seen) >= MOST_SEEN:
                self._seen.clear()
            self._seen[entity] = kept
        is_whole = kept.loaded_at_ms and kept.generation == generation
        return kept if is_whole and not self._turn_to_load(kept.loaded_at_ms, kept.load_ms) else None

    def _turn_to_load(self, loaded_at_ms: int, load_ms: float) -> bool:
        """Probabilistic early expiration: near its end a value is loaded anew by one reader or two, not by all at once.

        Source:
            Vattani, Chierichetti, Lowenstein (2015), Optimal Probabilistic Cache Stampede Prevention, VLDB 8(8), algorithm XFetch.
        """
        return self.clock() * 1000 - load_ms * BETA * math.log(self.chance()) >= loaded_at_ms + ENTRY_TTL_MS


def _count(n_asked: int, hits: int) -> None:
    _READS.labels("hit").inc(hits)
    _READS.labels("miss").inc(n_asked - hits)


def _proved(entity: Entity, value: bytes) -> _Kept | None:
    """What a value says, if it is whole and the entity's."""
    digest, _, body = value.partition(b"\n")
    if hashlib.sha1(body, usedforsecurity=False).hexdigest().encode() != digest:
        log.warning("online_value_damaged", feature_set=entity[0], entity_id=entity[1])
        return None
    try:
        head = body[: body.index(b"\n")]
        name, generation, complete_from, loaded_at, load_ms = head.split(b"\t")
        lines = len(value) - len(body) + len(head) + 1
        kept = _Kept(value, generation, int(complete_from), int(loaded_at), float(load_ms), lines)
    except ValueError:
        _warn_of_layout(entity)
        return None
    if name != _name(entity):
        log.warning("online_value_of_another", feature_set=entity[0], entity_id=entity[1], found=name.decode("utf-8", "replace"))
        return None
    return kept


def _warn_of_layout(entity: Entity) -> None:
    log.warning("online_value_of_another_layout", feature_set=entity[0], entity_id=entity[1])


def _as_stored(values: Mapping[str, FeatureValue]) -> dict[str, FeatureValue]:
    """Values as they come back from JSONB, byte by byte: keys in its order, no negative zero, no exponents."""
    in_order = ((name, values[name]) for name in _in_order(tuple(values)))
    return {name: value if isinstance(value, _SAME) else _number_as_stored(value) for name, value in in_order}


@lru_cache(maxsize=1_000)
def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (len(name.encode()), name.encode())))


def _number_as_stored(value: float) -> float:
    if abs(value) < _SHORTEST_EXPONENT:
        return value + 0  # makes -0.0 the 0.0 that it equals
    digits: float = orjson.loads(format(Decimal(repr(value)), "f"))
    return digits


def _key(entity: Entity) -> str:
    # The layout's number, not the feature set's version: while replicas learn of a new version, writes must reach what others read.
    return f"mojomesh:online:{LAYOUT}:{entity[0]}:{entity[1]}"


def _name(entity: Entity) -> bytes:
    return orjson.dumps(entity)  # escapes tabs and line ends


def _row(line: bytes) -> OnlineRow:
    event_us, created_us, seq, reported_us, vector = line.split(b"\t", 4)
    return OnlineRow(int(event_us), int(created_us), int(seq), int(reported_us), vector)
