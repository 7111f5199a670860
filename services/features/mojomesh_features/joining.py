"""The query of a model's training rows: as-of joins of the views of `known` (by feature set), in SQL as DuckDB understands it.

A plain ASOF join is wrong where rows share an event time, hence one key of event time and created_at, `_ORDER`.
"""

from collections.abc import Iterator, Mapping
from datetime import timedelta

from mojomesh_features.known import feature_column
from mojomesh_store.vectors import Plan, Source

_ORDER = "event_us::HUGEINT * 9223372036854775808 + created_us"
_MICROSECOND = timedelta(microseconds=1)


def numbered_entities(plan: Plan, views: Mapping[str, str]) -> str:
    """What makes the table `entities` that the queries below need: entity_id and a number, in their order, for each that the spine names.

    Rows are joined and sorted by these numbers, which spares a third of what it takes by texts.
    """
    named = dict.fromkeys(["entity_id", *(feature_column(source.join) for source in plan.sources if source.join)])
    entity_ids = " UNION ".join(f"SELECT DISTINCT {column} AS entity_id FROM {views[plan.model.spine]}" for column in named)
    return f"""
        CREATE OR REPLACE TEMP TABLE entities AS
        SELECT entity_id, (row_number() OVER (ORDER BY entity_id))::INTEGER AS entity FROM ({entity_ids})
    """


def training_rows(plan: Plan, views: Mapping[str, str]) -> str:
    """The training rows of `plan`, one for each entity and event_time of the spine that has a label, in the order of the snapshot.

    Of a spine row's versions the last counts; where the model asks for what was known at each row's own time, the last that had been
    reported then, or the first if none had. The label is the first outcome not before the event time, in its last version. In the place of
    what is to be derived stands what it is derived from, see `input_column`.
    """
    model = plan.model
    label = f"outcome.{feature_column(model.label.column)}"
    within = "" if model.label.within is None else f"AND outcome.event_us - spine.event_us <= {model.label.within // _MICROSECOND}"
    return f"""
        SELECT spine.entity_id AS entity_id, {_milliseconds("spine")} AS event_time, {_milliseconds("outcome")} AS label_time,
            {f"CAST({label} AS DOUBLE)" if model.label.type == "binary" else label} AS label{_columns(plan)}
        FROM ({_spine(plan, views)}) AS spine
        ASOF JOIN (
            SELECT *, event_us::HUGEINT * 9223372036854775808 + (9223372036854775807 - created_us) AS place
            FROM {_numbered(views[model.label.feature_set])}
        ) AS outcome ON spine.entity = outcome.entity AND spine.event_us::HUGEINT * 9223372036854775808 <= outcome.place
        {_joins(plan, views)}
        WHERE {label} IS NOT NULL {within}
        ORDER BY {_milliseconds("spine")}, spine.entity, spine.event_us
    """


def asked_rows(plan: Plan, views: Mapping[str, str]) -> str:
    """The vectors that training would have of the rows of the table `asked` (n, entity_id, event_us), with their n; none without a row.

    They are as of event_us, which a spine row may be older than, and as the mesh knows them, whatever was reported when.
    """
    return f"""
        SELECT n{_columns(plan)}
        FROM (
            SELECT asked.n, asked.event_us, was.* EXCLUDE (event_us)
            FROM asked ASOF JOIN (SELECT *, {_ORDER} AS place FROM ({_naming(plan, views)})) AS was
            ON asked.entity_id = was.entity_id AND asked.event_us::HUGEINT * 9223372036854775808 + 9223372036854775807 >= was.place
        ) AS spine
        {_joins(plan, views)}
        ORDER BY n
    """


def _columns(plan: Plan) -> str:
    columns = [value for n, source in enumerate(plan.sources) for value in _values(plan, n, source)]
    if plan.derived:
        columns.append(f"spine.event_us AS {ASKED_US}")
    return "".join(f", {column}" for column in columns)


def _joins(plan: Plan, views: Mapping[str, str]) -> str:
    return " ".join(_joined(plan, n, source, views) for n, source in enumerate(plan.sources) if source.feature_set != plan.model.spine)


def _spine(plan: Plan, views: Mapping[str, str]) -> str:
    order = "created_us"
    if plan.model.known_at == "row":
        order = "reported_us <= event_us, CASE WHEN reported_us <= event_us THEN created_us ELSE -created_us END"
    # The last in that order; looking for one that follows costs half of numbering all.
    return f"FROM ({_naming(plan, views)}) QUALIFY lead(true) OVER (PARTITION BY entity, event_us ORDER BY {order}) IS NULL"


def _naming(plan: Plan, views: Mapping[str, str]) -> str:
    """The rows of the spine with the numbers of the entities that they name: `entity`, their own, and `entity_<n>` of the `n`th source."""
    named = [(f"entity_{n}", feature_column(source.join)) for n, source in enumerate(plan.sources) if source.join]
    numbers = "".join(f", {name}.entity AS {name}" for name, _ in named)
    joins = " ".join(f"LEFT JOIN entities AS {name} ON stored.{column} = {name}.entity_id" for name, column in named)
    return f"SELECT stored.*{numbers} FROM {_numbered(views[plan.model.spine])} AS stored {joins}"


def _numbered(view: str) -> str:
    """The rows of a view with the numbers of their entities; those of entities that the spine does not name are left out."""
    return f"(FROM {view} JOIN entities USING (entity_id))"


def _joined(plan: Plan, n: int, source: Source, views: Mapping[str, str]) -> str:
    """The join of a set's row as of the spine's event time.

    By row: a row can be used from the later of its event time and its report on. It is of use only if none that could be used by then
    comes after it, and among those left the last that can be used is the one.
    """
    joined_by = "entity" if source.join is None else f"entity_{n}"
    known = _numbered(views[source.feature_set])
    if plan.model.known_at == "row":
        rows = f"""
            SELECT * FROM (
                SELECT *, {_ORDER} AS place, max({_ORDER}) OVER (PARTITION BY entity ORDER BY usable_us) AS last_place
                FROM (SELECT *, greatest(event_us, reported_us) AS usable_us FROM {known})
            ) WHERE place = last_place
        """
        condition = f"spine.event_us >= source_{n}.usable_us"
    else:
        rows = f"SELECT *, {_ORDER} AS place FROM {known}"
        condition = f"spine.event_us::HUGEINT * 9223372036854775808 + 9223372036854775807 >= source_{n}.place"
    return f"ASOF LEFT JOIN ({rows}) AS source_{n} ON spine.{joined_by} = source_{n}.entity AND {condition}"


def input_column(n: int, name: str | None) -> str:
    """Where what features of the `n`th source are derived from stands beside a training row: a stored feature, or the entity_id."""
    return f'"source {n} entity_id"' if name is None else f'"source {n} feature {name}"'


ASKED_US = '"asked us"'
"""The time as of which features are derived, in microseconds since 1970."""


def _values(plan: Plan, n: int, source: Source) -> Iterator[str]:
    table = "spine" if source.feature_set == plan.model.spine else f"source_{n}"

    def in_time(value: str) -> str:
        return (
            value if source.max_age_us is None else f"CASE WHEN spine.event_us - {table}.event_us <= {source.max_age_us} THEN {value} END"
        )

    for column in source.stored:
        value = f"{table}.{feature_column(column.feature)}"
        yield f'{in_time(f"CAST({value} AS INTEGER)" if column.type == "boolean" else value)} AS "{column.name}"'
    if source.is_derived:
        yield f"{in_time(f'{table}.entity_id')} AS {input_column(n, None)}"
        for name in source.inputs:
            yield f"{in_time(f'{table}.{feature_column(name)}')} AS {input_column(n, name)}"


def _milliseconds(table: str) -> str:
    return f"CAST(floor({table}.event_us / 1000) AS BIGINT)"
