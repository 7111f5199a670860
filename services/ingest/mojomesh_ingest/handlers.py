"""What ingest does with the events it consumes."""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_chassis.definitions import Definitions, subscribe_definitions
from mojomesh_chassis.errors import Rejected, TransientError
from mojomesh_chassis.publishing import EncodedEvent
from mojomesh_contracts.definitions import FeatureSet
from mojomesh_contracts.events import Arrival, Event, EventParked, EventReceived, FeaturesWritten, FeatureValue, derived_id
from mojomesh_contracts.validation import problem_of
from mojomesh_ingest import checking
from mojomesh_ingest.parking import Parking
from mojomesh_ingest.reading import read_event
from mojomesh_store.errors import Moved, TooFewShards
from mojomesh_store.rows import row_id
from mojomesh_store.shards import FeatureStore, Shard
from mojomesh_store.tables import FeatureRow

router = MeshRouter("ingest")
subscribe_definitions(router)

PATIENCE_S = 5.0  # with one of several shards, before its events are parked
MOST_PATIENCE_S = 60.0  # with a shard whose events are parked: others do not wait for it


@router.work(EventReceived, batch=5_000, read=read_event, members=2, pace_s=0.04)
async def on_events_received(
    events: Sequence[Arrival], feature_store: FeatureStore, definitions: Definitions, parking: Parking
) -> list[Event | EncodedEvent]:
    """Store each event once, as a feature row; announce all of them, so that a repeat after a crash still announces.

    What its feature set says to hold back goes to quarantine instead. Of several shards one that is away or slow holds up nobody: its
    events are parked, and so are those that come after them.

    Raises:
        Rejected: Some events break their feature set, or name none.
    """
    if any(event.feature_set not in definitions.feature_sets for event in events):
        await definitions.caught_up()  # the definition may have been applied just before the event was sent
    now = datetime.now(UTC)
    problems = (problem_of(event, definitions.feature_sets.get(event.feature_set), now) for event in events)
    if reasons := {index: problem for index, problem in enumerate(problems) if problem}:
        raise Rejected(reasons)
    feature_sets = definitions.feature_sets
    n_placed, parts = feature_store.n_placed, feature_store.split(events)
    if len(feature_store.shards) == 1:
        return await _store(feature_store, n_placed, *parts[0], feature_sets)
    waiting = await parking.queues(n_placed)
    storing: dict[Shard, Awaitable[list[Event | EncodedEvent]]] = {
        shard: asyncio.wait_for(_store(feature_store, n_placed, shard, part, feature_sets), PATIENCE_S)
        for shard, part in parts
        if parking.queue_of(shard) not in waiting
    }
    outcomes = dict(zip(storing, await asyncio.gather(*storing.values(), return_exceptions=True), strict=True))
    following: list[Event | EncodedEvent] = []
    for shard, part in parts:
        match outcomes.get(shard):
            case list(announced):
                following += announced
            case Moved() | TooFewShards() as error:
                raise error
            case None | TransientError() | TimeoutError() as error:
                following += parking.park(shard, part, error)
            case BaseException() as error:
                raise error
    return following


@router.work(EventParked, batch=5_000, apart=True)
async def on_events_parked(events: list[EventParked], feature_store: FeatureStore, definitions: Definitions) -> list[Event | EncodedEvent]:
    """Store what waited for its shard, in the order in which it came; it waits on while the shard is away."""
    if any(parked.event.feature_set not in definitions.feature_sets for parked in events):
        await definitions.caught_up()  # another process knew it when it parked the event
    async with asyncio.timeout(MOST_PATIENCE_S):
        n_placed, parts = feature_store.n_placed, feature_store.split(parked.event for parked in events)
        stored = [await _store(feature_store, n_placed, shard, part, definitions.feature_sets) for shard, part in parts]
        return [event for part in stored for event in part]


async def _store(
    feature_store: FeatureStore, n_placed: int, shard: Shard, events: Sequence[Arrival], feature_sets: Mapping[str, FeatureSet]
) -> list[Event | EncodedEvent]:
    """Store events of one shard; what announces them."""
    odd = checking.problems_of(events, feature_sets)
    held = await checking.hold_back(events, odd, feature_sets, feature_store)
    stored = await checking.append(
        feature_store, n_placed, shard, [event for event in events if row_id(event) not in held], odd, feature_sets
    )
    return [announcement(row) for row in stored]


class _Written(msgspec.Struct, gc=False):
    """`FeaturesWritten`, for writing it as JSON at a sixth of what Pydantic costs."""

    event_id: str
    feature_set: str
    entity_id: str
    event_time: datetime
    reported_at: datetime
    created_at: datetime
    seq: int
    values: dict[str, FeatureValue]


_encode = msgspec.json.Encoder().encode


def announcement(row: FeatureRow) -> EncodedEvent:
    """The event that says `row` is stored: the same, with the same id, each time it is said."""
    feature_set, entity_id, event_time, reported_at, created_at, seq, event_id, values = row
    own_id = derived_id(event_id, f"features.written {feature_set} {event_time.isoformat()}")
    written = _Written(own_id, feature_set, entity_id, event_time, reported_at, created_at, seq, values)
    try:
        value = _encode(written)
    except OverflowError:  # an integer of more than 64 bits
        value = FeaturesWritten.model_construct(**msgspec.structs.asdict(written)).model_dump_json().encode()
    return EncodedEvent(FeaturesWritten.topic, own_id, entity_id, value)
