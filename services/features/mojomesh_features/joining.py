"""The rows of a model: what `asof` finds for pairs of entity and time, side by side in one table of DuckDB's, and queries of it."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mojomesh_features.aggregating import Integers
from mojomesh_features.asof import LAST, LAST_REPORTED, NEXT, ORIGINAL, AsOf, Choice, Found, values_at
from mojomesh_features.known import KnownRows, feature_column
from mojomesh_store.vectors import Plan, Source

ASKED_US = '"asked us"'
"""The time as of which features are derived, in microseconds since 1970."""

_SLICE = 2_000_000  # pairs, for which rows are held in memory at a time
_AT_ONCE = 4  # feature sets
_MICROSECOND = timedelta(microseconds=1)

Columns = dict[str, pa.Array | pa.ChunkedArray]


def training_rows(db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows]) -> str:
    """The query of the training rows of `plan`: one for each entity and event_time of the spine that has a label, in a snapshot's order.

    Of a spine row's versions the last counts; where the model asks for what was known at each row's own time, the last that had been
    reported then, or the first if none had. The label is the first outcome not before the event time, in its last version. In the place of
    what is to be derived stands what it is derived from, see `input_column`.
    """
    spine = known[plan.model.spine].view
    db.execute(f"""
        CREATE OR REPLACE TEMP TABLE asked AS
        SELECT DISTINCT entity_id, event_us FROM {spine} ORDER BY entity_id, event_us
    """)
    _look_up(db, plan, known, labelled=True)
    label = plan.model.label
    within = "" if label.within is None else f"AND label_us - event_us <= {label.within // _MICROSECOND}"
    return f"""
        SELECT entity_id, {_milliseconds("event_us")} AS event_time, {_milliseconds("label_us")} AS label_time,
            {"CAST(label AS DOUBLE) AS label" if label.type == "binary" else "label"}{_columns(plan)}
        FROM found WHERE label IS NOT NULL {within} ORDER BY event_time, n
    """


def asked_rows(db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows]) -> str:
    """The query of the vectors that training would have of the pairs in the table `asked` (entity_id, event_us), with their number n.

    They are as of event_us, which a spine row may be older than, and as the mesh knows them, whatever was reported when. Of a pair without
    a spine row there is none.
    """
    _look_up(db, plan, known, labelled=False)
    return f"SELECT n{_columns(plan)} FROM found WHERE has_row ORDER BY n"


def input_column(n: int, name: str | None) -> str:
    """Where what features of the `n`th source are derived from stands beside a training row: a stored feature, or the entity_id."""
    return f'"{_found_column(n, name)}"'


def _found_column(n: int, name: str | None) -> str:
    return f"source {n} entity_id" if name is None else f"source {n} feature {name}"


def _look_up(db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows], labelled: bool) -> None:
    """Make the table `found`: for each row of `asked` its number n, the label if wanted, and what the sources have."""
    ((n_asked,),) = db.execute("SELECT count(*) FROM asked").fetchall()
    for begin in range(0, max(n_asked, 1), _SLICE):
        pairs = db.sql(f"SELECT rowid AS n, * FROM asked WHERE rowid BETWEEN {begin} AND {begin + _SLICE - 1} ORDER BY n").to_arrow_table()
        found = _Slice(db, plan, known, pairs.combine_chunks()).found(labelled)
        if n_asked <= _SLICE:
            db.register("found", found)
        else:
            db.register("slice", found)
            db.execute("INSERT INTO found FROM slice" if begin else "CREATE OR REPLACE TEMP TABLE found AS FROM slice")


class _Slice:
    """Some of the pairs that are asked for."""

    def __init__(self, db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows], pairs: pa.Table) -> None:
        self._db = db
        self._plan = plan
        self._known = known
        self._pairs = pairs
        self._at_us: Integers = np.asarray(pairs["event_us"])
        self._own = AsOf(pairs["entity_id"].combine_chunks(), self._at_us)

    def found(self, labelled: bool) -> pa.Table:
        spine = self._plan.model.spine
        others = [(n, source) for n, source in enumerate(self._plan.sources) if source.feature_set != spine]
        columns: Columns = dict(zip(self._pairs.column_names, self._pairs.columns, strict=True))
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            of_entity = [threads.submit(self._joined, n, source, columns["entity_id"]) for n, source in others if not source.join]
            label = threads.submit(self._label) if labelled else None
            row, values = self._spine_row(labelled)
            named = [threads.submit(self._joined, n, source, values[source.join]) for n, source in others if source.join]
            columns["has_row"] = pa.array(row.places >= 0)
            for n, source in enumerate(self._plan.sources):
                if source.feature_set == spine:
                    columns |= self._source(n, source, columns["entity_id"], row, values)
            for part in (*of_entity, *named, *([label] if label else [])):
                columns |= part.result()
        return pa.table(columns)

    def _rows(self, feature_set: str, asof: AsOf, choice: Choice) -> Found:
        return asof.find(choice, self._known[feature_set].read(choice.keys, asof.extent, self._db.cursor()))

    def _values(self, feature_set: str, asof: AsOf, found: Found, names: Sequence[str]) -> Columns:
        """Features of the rows that were found, by name."""
        if not names:
            return {}
        columns = ", ".join(map(feature_column, names))
        rows = values_at(found.places, self._known[feature_set].read(columns, asof.extent, self._db.cursor()))
        return dict(zip(names, rows.columns, strict=True))

    def _label(self) -> Columns:
        label = self._plan.model.label
        outcome = self._rows(label.feature_set, self._own, NEXT)
        values = self._values(label.feature_set, self._own, outcome, [label.column])
        return {"label_us": _if_found(outcome, outcome.event_us), "label": values[label.column]}

    def _spine_row(self, labelled: bool) -> tuple[Found, Columns]:
        spine = self._plan.model.spine
        if labelled and self._plan.model.known_at == "row":
            row, original = (self._rows(spine, self._own, choice) for choice in (LAST_REPORTED, ORIGINAL))
            row = Found(np.where(row.event_us == self._at_us, row.places, original.places), self._at_us)
        else:
            row = self._rows(spine, self._own, LAST)
        names = [source.join for source in self._plan.sources if source.join]
        names += [name for source in self._plan.sources if source.feature_set == spine for name in _features(source)]
        return row, self._values(spine, self._own, row, list(dict.fromkeys(names)))

    def _joined(self, n: int, source: Source, entity_ids: pa.ChunkedArray) -> Columns:
        asof = AsOf(entity_ids.combine_chunks(), self._at_us) if source.join else self._own
        row = self._rows(source.feature_set, asof, LAST_REPORTED if self._plan.model.known_at == "row" else LAST)
        return self._source(n, source, entity_ids, row, self._values(source.feature_set, asof, row, _features(source)))

    def _source(self, n: int, source: Source, entity_ids: pa.ChunkedArray, row: Found, values: Columns) -> Columns:
        columns: Columns = {_found_column(n, name): values[name] for name in _features(source)}
        if source.is_derived:
            columns[_found_column(n, None)] = pc.if_else(pa.array(row.places >= 0), entity_ids, None)
        if source.max_age_us is not None:
            columns[f"source {n} us"] = _if_found(row, row.event_us)
        return columns


def _features(source: Source) -> list[str]:
    return list(dict.fromkeys([*(column.feature for column in source.stored), *source.inputs]))


def _if_found(found: Found, column: Integers) -> pa.Array:
    return pa.array(column, mask=found.places < 0)


def _columns(plan: Plan) -> str:
    columns = [value for n, source in enumerate(plan.sources) for value in _projected(n, source)]
    if plan.derived:
        columns.append(f"event_us AS {ASKED_US}")
    return "".join(f", {column}" for column in columns)


def _projected(n: int, source: Source) -> Iterator[str]:
    def in_time(value: str) -> str:
        return value if source.max_age_us is None else f'CASE WHEN event_us - "source {n} us" <= {source.max_age_us} THEN {value} END'

    for column in source.stored:
        value = input_column(n, column.feature)
        yield f'{in_time(f"CAST({value} AS INTEGER)" if column.type == "boolean" else value)} AS "{column.name}"'
    if source.is_derived:
        for name in (None, *source.inputs):
            yield f"{in_time(input_column(n, name))} AS {input_column(n, name)}"


def _milliseconds(column: str) -> str:
    return f"CAST(floor({column} / 1000) AS BIGINT)"
