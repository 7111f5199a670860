"""The events that a windowed aggregate counts, as known now."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import orjson
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_contracts.events import FeatureValue


class Span(NamedTuple):
    """Which events: those of a key with an event time in [since, until)."""

    key: tuple[str, ...]
    since: datetime
    until: datetime


class Fact(NamedTuple):
    """An event in its last version; which span of those asked for it belongs to, and the asked features."""

    n: int
    event_time: datetime
    entity_id: str
    values: list[FeatureValue]


async def facts_of(
    db: AsyncSession, feature_set: str, by: Sequence[str | None], features: Sequence[str], spans: Sequence[Span]
) -> list[Fact]:
    """The events of this shard in each span, whose features `by` (None stands for the entity_id) are equal to the span's key."""
    entity = next((place for place, name in enumerate(by) if name is None), None)
    named = [(place, name) for place, name in enumerate(by) if name is not None]
    same_key = ("" if entity is None else "AND fact.entity_id = asked.entity_id") + (' AND fact."values" @> asked.key' if named else "")
    # The bounds of all spans follow from each span's own. The planner, which cannot look into `asked`, learns by them whether little has
    # happened between them, or less of the asked keys: without them it read all events that a key ever had.
    vector = ", ".join(f"fact.\"values\" -> '{name}'" for name in features)
    found = await db.execute(
        text(f"""
            SELECT asked.n - 1, fact.event_time, fact.entity_id, jsonb_build_array({vector})::text
            FROM unnest(
                CAST(:entity_ids AS text[]), CAST(:keys AS jsonb[]), CAST(:sinces AS timestamptz[]), CAST(:untils AS timestamptz[])
            ) WITH ORDINALITY AS asked (entity_id, key, since, until, n)
            JOIN store.feature_rows AS fact
                ON fact.feature_set = :feature_set AND fact.event_time >= asked.since AND fact.event_time < asked.until {same_key}
                AND fact.event_time >= :first AND fact.event_time < :last
            WHERE NOT EXISTS (
                SELECT FROM store.feature_rows AS later
                WHERE later.feature_set = :feature_set AND later.entity_id = fact.entity_id AND later.event_time = fact.event_time
                    AND (later.created_at, later.seq) > (fact.created_at, fact.seq)
            )
        """),
        {
            "feature_set": feature_set,
            "entity_ids": ["" if entity is None else span.key[entity] for span in spans],
            "keys": [orjson.dumps({name: span.key[place] for place, name in named}).decode() for span in spans],
            "sinces": [span.since for span in spans],
            "untils": [span.until for span in spans],
            "first": min(span.since for span in spans),
            "last": max(span.until for span in spans),
        },
    )
    return [Fact._make([*fact, orjson.loads(values)]) for *fact, values in found]
