"""Whether an event can become a feature row: one answer, in words, at every door."""

from datetime import UTC, datetime, timedelta

from mojomesh_contracts.definitions import FeatureSet
from mojomesh_contracts.events import Arrival, FeatureValue
from mojomesh_contracts.storable import NUL

EARLIEST = datetime(1900, 1, 1, tzinfo=UTC)
CLOCK_SKEW = timedelta(minutes=5)  # clients' clocks may be ahead of ours by this much


def problem_of(event: Arrival, feature_set: FeatureSet | None, now: datetime) -> str | None:
    """Why `event` cannot be stored, every fault named; None if it can.

    Args:
        feature_set: What the event's `feature_set` names; None if nobody defined it.
        now: Wall clock.
    """
    if feature_set is None:
        return f"no feature set is named '{event.feature_set}'; apply its definition first"
    found = [] if feature_set.is_usual(event.values) else _problems_of_values(event.values, feature_set)
    if event.vectors:
        found += feature_set.problems_of_vectors(event.vectors)
    latest = now + CLOCK_SKEW
    for name, time in (("event_time", event.event_time), ("reported_at", event.reported_at)):
        if time is not None and not EARLIEST <= time <= latest:
            found.append(f"{name} {time.isoformat()} is not between {EARLIEST.year} and now + {CLOCK_SKEW.seconds // 60} minutes")
    if NUL in event.entity_id:
        found.append("entity_id contains a NUL character")
    return "; ".join(found) or None


def _problems_of_values(values: dict[str, FeatureValue], feature_set: FeatureSet) -> list[str]:
    with_nul = [name for name, value in values.items() if isinstance(value, str) and NUL in value]
    return feature_set.problems(values) + [f"'{name}' contains a NUL character" for name in with_nul]
