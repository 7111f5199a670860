"""What the model `delay` says a snapshot is, a row at a time, in plain Python."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from mojomesh_contracts.definitions import Aggregate, Model
from mojomesh_contracts.events import FeatureValue
from mojomesh_store.online import microseconds
from mojomesh_store.tables import FeatureRow

TrainingRow = dict[str, FeatureValue]
HOUR = timedelta(hours=1)


def expected_rows(
    model: Model, rows: Sequence[FeatureRow], snapshot_time: datetime, aggregates: Mapping[str, Aggregate] | None = None
) -> list[TrainingRow]:
    """The training rows by the rows that were stored, whenever they were; `aggregates` are those of the spine."""
    known = _not_replaced_at_once(row for row in rows if row.created_at <= snapshot_time)
    by_row = model.known_at == "row"
    keys = {(row.entity_id, row.event_time) for row in known if row.feature_set == "flights"}
    expected: list[TrainingRow] = []
    for entity_id, at in sorted(keys, key=lambda key: key[::-1]):
        spine = _spine(known, entity_id, at, by_row)
        label = _outcome(known, entity_id, at)
        if label is None or label.values.get("late") is None:
            continue
        if model.label.within is not None and label.event_time - at > model.label.within:
            continue
        usable = [row for row in known if row.event_time <= at and (not by_row or row.reported_at <= at)]
        weather = _last(row for row in usable if (row.feature_set, row.entity_id) == ("weather", spine.values.get("origin")))
        if weather is not None and at - weather.event_time > 3 * HOUR:
            weather = None
        crew = _last(row for row in usable if (row.feature_set, row.entity_id) == ("crews", entity_id))
        expected.append(
            {
                "entity_id": entity_id,
                "event_time": microseconds(at) // 1000,
                "label_time": microseconds(label.event_time) // 1000,
                "label": as_learned(label.values["late"]),
                **{name: as_learned(spine.values.get(name)) for name in ("carrier", "distance", "international")},
                **{f"weather.{name}": as_learned(weather.values.get(name)) if weather else None for name in ("temp", "fog")},
                "crews.size": crew.values.get("size") if crew else None,
            }
        )
        for name, aggregate in (aggregates or {}).items():
            reported = [row for row in known if not by_row or row.reported_at <= at]
            expected[-1][name] = as_learned(expected_aggregate(aggregate, spine, at, reported))
    return expected


def expected_aggregate(aggregate: Aggregate, row: FeatureRow, at: datetime, known: Iterable[FeatureRow]) -> FeatureValue:
    """What an aggregate says of `row` as of `at`, by the rows that are known."""
    versions: dict[Any, list[FeatureRow]] = {}
    for fact in known:
        if fact.feature_set == aggregate.feature_set:
            versions.setdefault((fact.event_time, fact.entity_id), []).append(fact)
    facts = [max(versions[key], key=_order) for key in sorted(versions)]
    facts = [fact for fact in facts if at - aggregate.window <= fact.event_time < at]
    if None in (key := [_part(row, name) for name in aggregate.by.values()]):
        return None
    facts = [fact for fact in facts if [_part(fact, name) for name in aggregate.by] == key]
    if aggregate.feature is None:
        return len(facts)
    values: list[Any] = [value for fact in facts if (value := fact.values.get(aggregate.feature)) is not None]
    of_any: dict[str, Any] = {"count": len, "distinct": lambda values: len(set(values)), "sum": sum}
    of_some: dict[str, Any] = {"mean": lambda values: sum(values) / len(values), "min": min, "max": max, "last": lambda values: values[-1]}
    answer: FeatureValue = None
    if aggregate.function in of_any or values:
        answer = (of_any | of_some)[aggregate.function](values)
    return answer


def _part(row: FeatureRow, name: str) -> FeatureValue:
    return row.entity_id if name in ("flight_id", "airport") else row.values.get(name)


def _not_replaced_at_once(rows: Iterable[FeatureRow]) -> list[FeatureRow]:
    """Without rows that were corrected by the transaction that stored them: nobody ever knew these."""
    last: dict[Any, FeatureRow] = {}
    for row in sorted(rows, key=lambda row: row.seq):
        last[row.feature_set, row.entity_id, row.event_time, row.created_at] = row
    return list(last.values())


def as_learned(value: FeatureValue) -> FeatureValue:
    """As a snapshot holds it: true and false as 1 and 0."""
    return int(value) if isinstance(value, bool) else value


def _order(row: FeatureRow) -> Any:
    return row.event_time, row.created_at, row.seq


def _last(rows: Iterable[FeatureRow]) -> FeatureRow | None:
    return max(rows, key=_order, default=None)


def _spine(known: Sequence[FeatureRow], entity_id: str, at: datetime, by_row: bool) -> FeatureRow:
    versions = sorted((row for row in known if (row.feature_set, row.entity_id, row.event_time) == ("flights", entity_id, at)), key=_order)
    if not by_row:
        return versions[-1]
    return next((row for row in reversed(versions) if row.reported_at <= at), versions[0])


def _outcome(known: Sequence[FeatureRow], entity_id: str, at: datetime) -> FeatureRow | None:
    later = [row for row in known if (row.feature_set, row.entity_id) == ("arrivals", entity_id) and row.event_time >= at]
    first = min((row.event_time for row in later), default=None)
    return _last(row for row in later if row.event_time == first)
