"""The query of a model's training rows: as-of joins of the views of `known`, in SQL as DuckDB understands it.

A plain ASOF join is wrong where rows share an event time, hence one key of event time and created_at, `_ORDER`.
"""

from datetime import timedelta

from mojomesh_contracts.bundles import Column
from mojomesh_features.known import KnownRows, feature_column
from mojomesh_store.vectors import Plan, Source

_ORDER = "event_us::HUGEINT * 9223372036854775808 + created_us"
_MICROSECOND = timedelta(microseconds=1)


def training_rows(plan: Plan, known: dict[str, KnownRows]) -> str:
    """The training rows of `plan`, one for each entity and event_time of the spine that has a label, in the order of the snapshot.

    Of a spine row's versions the last counts; where the model asks for what was known at each row's own time, the last that had been
    reported then, or the first if none had. The label is the first outcome not before the event time, in its last version.
    """
    model = plan.model
    joins = [_joined(plan, n, source, known) for n, source in enumerate(plan.sources) if source.feature_set != model.spine]
    columns = "".join(f", {_value(plan, n, source, column)}" for n, source in enumerate(plan.sources) for column in source.columns)
    label = f"outcome.{feature_column(model.label.column)}"
    within = "" if model.label.within is None else f"AND outcome.event_us - spine.event_us <= {model.label.within // _MICROSECOND}"
    return f"""
        SELECT spine.entity_id AS entity_id, {_milliseconds("spine")} AS event_time, {_milliseconds("outcome")} AS label_time,
            {f"CAST({label} AS DOUBLE)" if model.label.type == "binary" else label} AS label{columns}
        FROM ({_spine(plan, known)}) AS spine
        ASOF JOIN (
            SELECT *, event_us::HUGEINT * 9223372036854775808 + (9223372036854775807 - created_us) AS place
            FROM {known[model.label.feature_set].view}
        ) AS outcome ON spine.entity_id = outcome.entity_id AND spine.event_us::HUGEINT * 9223372036854775808 <= outcome.place
        {" ".join(joins)}
        WHERE {label} IS NOT NULL {within}
        ORDER BY {_milliseconds("spine")}, spine.entity_id, spine.event_us
    """


def _spine(plan: Plan, known: dict[str, KnownRows]) -> str:
    order = "created_us"
    if plan.model.known_at == "row":
        order = "reported_us <= event_us, CASE WHEN reported_us <= event_us THEN created_us ELSE -created_us END"
    # The last in that order; looking for one that follows costs half of numbering all.
    return f"FROM {known[plan.model.spine].view} QUALIFY lead(true) OVER (PARTITION BY entity_id, event_us ORDER BY {order}) IS NULL"


def _joined(plan: Plan, n: int, source: Source, known: dict[str, KnownRows]) -> str:
    """The join of a set's row as of the spine's event time.

    By row: a row can be used from the later of its event time and its report on. It is of use only if none that could be used by then
    comes after it, and among those left the last that can be used is the one.
    """
    joined_by = "entity_id" if source.join is None else feature_column(source.join)
    if plan.model.known_at == "row":
        rows = f"""
            SELECT * FROM (
                SELECT *, {_ORDER} AS place, max({_ORDER}) OVER (PARTITION BY entity_id ORDER BY usable_us) AS last_place
                FROM (SELECT *, greatest(event_us, reported_us) AS usable_us FROM {known[source.feature_set].view})
            ) WHERE place = last_place
        """
        condition = f"spine.event_us >= source_{n}.usable_us"
    else:
        rows = f"SELECT *, {_ORDER} AS place FROM {known[source.feature_set].view}"
        condition = f"spine.event_us::HUGEINT * 9223372036854775808 + 9223372036854775807 >= source_{n}.place"
    return f"ASOF LEFT JOIN ({rows}) AS source_{n} ON spine.{joined_by} = source_{n}.entity_id AND {condition}"


def _value(plan: Plan, n: int, source: Source, column: Column) -> str:
    table = "spine" if source.feature_set == plan.model.spine else f"source_{n}"
    value = f"{table}.{feature_column(column.feature)}"
    if column.type == "boolean":
        value = f"CAST({value} AS INTEGER)"
    if source.max_age_us is not None:
        value = f"CASE WHEN spine.event_us - {table}.event_us <= {source.max_age_us} THEN {value} END"
    return f'{value} AS "{column.name}"'


def _milliseconds(table: str) -> str:
    return f"CAST(floor({table}.event_us / 1000) AS BIGINT)"
