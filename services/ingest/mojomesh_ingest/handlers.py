"""What ingest does with the events it consumes."""

from datetime import UTC, datetime
from uuid import uuid5

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_chassis.definitions import Definitions, subscribe_definitions
from mojomesh_chassis.errors import Rejected
from mojomesh_contracts.events import EventReceived, FeaturesWritten
from mojomesh_contracts.validation import problem_of
from mojomesh_ingest import checking
from mojomesh_store.rows import row_id
from mojomesh_store.shards import FeatureStore
from mojomesh_store.tables import FeatureRow

router = MeshRouter("ingest")
subscribe_definitions(router)


@router.work(EventReceived, batch=5_000)
async def on_events_received(events: list[EventReceived], feature_store: FeatureStore, definitions: Definitions) -> list[FeaturesWritten]:
    """Store each event once, as a feature row; announce all of them, so that a repeat after a crash still announces.

    What its feature set says to hold back goes to quarantine instead.

    Raises:
        Rejected: Some events break their feature set, or name none.
    """
    if any(event.feature_set not in definitions.feature_sets for event in events):
        await definitions.caught_up()  # the definition may have been applied just before the event was sent
    now = datetime.now(UTC)
    problems = (problem_of(event, definitions.feature_sets.get(event.feature_set), now) for event in events)
    if reasons := {index: problem for index, problem in enumerate(problems) if problem}:
        raise Rejected(reasons)
    stored: list[FeatureRow] = []
    odd = checking.problems_of(events, definitions.feature_sets)
    held = await checking.hold_back(events, odd, definitions.feature_sets, feature_store)
    for shard, part in feature_store.split(event for event in events if row_id(event) not in held):
        stored += await checking.append(shard, part, odd, definitions.feature_sets)
    return [announcement(row) for row in stored]


def announcement(row: FeatureRow) -> FeaturesWritten:
    """The event that says `row` is stored: the same, with the same id, each time it is said."""
    return FeaturesWritten.model_construct(  # nothing to validate: the row was
        event_id=uuid5(row.event_id, f"features.written {row.feature_set} {row.event_time.isoformat()}"),
        feature_set=row.feature_set,
        entity_id=row.entity_id,
        event_time=row.event_time,
        reported_at=row.reported_at,
        created_at=row.created_at,
        seq=row.seq,
        values=row.values,
    )
