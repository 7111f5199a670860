"""Events that their definition says to hold back, on the first database until somebody lets them go, and who let them go after that.

Of events with one (feature_set, event_time, event_id) the first stays, here as among the rows.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import orjson
from sqlalchemy import MetaData, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.outbox import outbox_table, save_events
from mojomesh_contracts.events import Arrival, Event, EventReceived
from mojomesh_ingest.reading import event_of
from mojomesh_store.rows import RowId

OUTBOX = outbox_table(MetaData(schema="ingest"))

_KEYS = "unnest(CAST(:feature_sets AS text[]), CAST(:event_times AS timestamptz[]), CAST(:event_ids AS uuid[]))"

# Two holders that insert the same keys in opposite orders deadlock: hence ORDER BY.
_HOLD = text("""
    INSERT INTO ingest.quarantine (feature_set, event_time, event_id, entity_id, event, problems)
    SELECT feature_set, event_time, event_id, entity_id, event::jsonb, problems::jsonb
    FROM unnest(
        CAST(:feature_sets AS text[]), CAST(:event_times AS timestamptz[]), CAST(:event_ids AS uuid[]), CAST(:entity_ids AS text[]),
        CAST(:events AS text[]), CAST(:problems AS text[])
    ) AS arrived (feature_set, event_time, event_id, entity_id, event, problems)
    ORDER BY feature_set, event_time, event_id
    ON CONFLICT DO NOTHING
    RETURNING feature_set, event_time, event_id
""")

_RELEASED = text(f"""
    SELECT feature_set, event_time, event_id FROM {_KEYS} AS asked (feature_set, event_time, event_id)
    JOIN ingest.quarantine USING (feature_set, event_time, event_id) WHERE released_at IS NOT NULL
""")

_HELD = text("""
    SELECT event, problems, held_at FROM ingest.quarantine
    WHERE released_at IS NULL AND feature_set = coalesce(:feature_set, feature_set)
    ORDER BY held_at, event_id LIMIT :limit
""").columns(event=JSONB, problems=JSONB)

_RELEASE = text("""
    UPDATE ingest.quarantine SET released_at = clock_timestamp()
    WHERE (feature_set, event_time, event_id) IN (
        SELECT feature_set, event_time, event_id FROM ingest.quarantine
        WHERE released_at IS NULL AND feature_set = coalesce(:feature_set, feature_set)
            AND (CAST(:event_ids AS uuid[]) IS NULL OR event_id = ANY(CAST(:event_ids AS uuid[])))
        ORDER BY held_at, event_id LIMIT :limit FOR UPDATE
    )
    RETURNING event
""").columns(event=JSONB)


class Held(NamedTuple):
    """An event that is held back, and why, by feature."""

    event: EventReceived
    problems: dict[str, str]
    held_at: datetime


async def hold(db: AsyncSession, events: Mapping[RowId, tuple[Arrival, dict[str, str]]]) -> set[RowId]:
    """Keep events with what is wrong with them; those that were not here before."""
    arrived = list(events.values())
    found = await db.execute(
        _HOLD,
        _columns(events)
        | {
            "entity_ids": [event.entity_id for event, _ in arrived],
            "events": [event_of(event).model_dump_json() for event, _ in arrived],
            "problems": [orjson.dumps(problems).decode() for _, problems in arrived],
        },
    )
    return {(feature_set, event_time, event_id) for feature_set, event_time, event_id in found}


async def released(db: AsyncSession, keys: Sequence[RowId]) -> set[RowId]:
    """Which of them have been let go."""
    return {(feature_set, event_time, event_id) for feature_set, event_time, event_id in await db.execute(_RELEASED, _columns(keys))}


async def held(db: AsyncSession, feature_set: str | None, limit: int) -> list[Held]:
    """What is held back, oldest first; of all feature sets or one."""
    found = await db.execute(_HELD, {"feature_set": feature_set, "limit": limit})
    return [Held(EventReceived.model_validate(event), problems, held_at) for event, problems, held_at in found]


async def release(db: AsyncSession, feature_set: str | None, event_ids: Sequence[UUID] | None, limit: int) -> list[EventReceived]:
    """Let events go, oldest first: once this transaction is committed they are sent again, and stored whatever their values.

    None: of any feature set, with any id.
    """
    ids = None if event_ids is None else list(event_ids)
    found = await db.scalars(_RELEASE, {"feature_set": feature_set, "event_ids": ids, "limit": limit})
    events = [EventReceived.model_validate(event) for event in found]
    await save_events(db, OUTBOX, events, _sending_id)
    return events


async def held_of(db: AsyncSession, entity_id: str, feature_sets: Sequence[str]) -> list[RowId]:
    """The keys of an entity's events, held or let go."""
    found = await db.execute(
        text("""
            SELECT feature_set, event_time, event_id FROM ingest.quarantine
            WHERE entity_id = :entity_id AND feature_set = ANY(:sets)
        """),
        {"entity_id": entity_id, "sets": list(feature_sets)},
    )
    return [(feature_set, event_time, event_id) for feature_set, event_time, event_id in found]


async def forget(db: AsyncSession, entity_id: str, feature_sets: Sequence[str]) -> int:
    """Erase an entity's events, held or let go, how many; as the owner."""
    named = {"entity_id": entity_id, "sets": list(feature_sets)}
    sent = text("DELETE FROM ingest.outbox WHERE payload->>'entity_id' = :entity_id AND payload->>'feature_set' = ANY(:sets)")
    await db.execute(sent, named)
    kept = text("DELETE FROM ingest.quarantine WHERE entity_id = :entity_id AND feature_set = ANY(:sets) RETURNING 1")
    return len((await db.execute(kept, named)).all())


def _sending_id(event: Event) -> UUID:
    # Clients may use one event_id for several facts: what tells them apart is all of the row's id.
    assert isinstance(event, EventReceived)
    return event.derive_id(f"released {event.feature_set} {event.event_time.isoformat()}")


def _columns(keys: Sequence[RowId] | Mapping[RowId, object]) -> dict[str, list[object]]:
    feature_sets, event_times, event_ids = zip(*keys, strict=True)
    return {"feature_sets": list(feature_sets), "event_times": list(event_times), "event_ids": list(event_ids)}
