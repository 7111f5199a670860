"""The rows of a model: what `asof` finds for pairs of entity and time, side by side in one table of DuckDB's, and queries of it."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mojomesh_features.aggregating import Integers
from mojomesh_features.asof import LAST, LAST_REPORTED, NEXT, AsOf, Choice
from mojomesh_features.known import KnownRows, feature_column
from mojomesh_store.vectors import Plan, Source

ASKED_US = '"asked us"'
"""The time as of which features are derived, in microseconds since 1970."""

# Apart, since the first slice, most often all there is, is not copied. DuckDB keeps the order of rows that it neither joins nor groups.
_FOUND = "(FROM first UNION ALL FROM others)"
_VALUES = 40_000_000  # that are looked up at a time: some 1 GB beside DuckDB's
_KEPT = ("n", "entity_id", "event_us")
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
    versions = "created_us DESC"
    if plan.model.known_at == "row":
        versions = "reported_us <= event_us DESC, CASE WHEN reported_us <= event_us THEN -created_us ELSE created_us END"
    asked = db.cursor().sql(f"""
        SELECT entity_id, event_us, event_us AS spine_us{_listed(_spine_features(plan))}
        FROM (FROM {spine} ORDER BY {_milliseconds("event_us")}, entity_id, event_us, {versions})
        QUALIFY (event_us = lag(event_us) OVER () AND entity_id = lag(entity_id) OVER ()) IS NOT TRUE
    """)
    _look_up(db, plan, known, asked.to_arrow_reader(_at_once(plan)), labelled=True)
    label = plan.model.label
    within = "" if label.within is None else f"AND label_us - event_us <= {label.within // _MICROSECOND}"
    return f"""
        SELECT entity_id, {_milliseconds("event_us")} AS event_time, {_milliseconds("label_us")} AS label_time,
            {"CAST(label AS DOUBLE) AS label" if label.type == "binary" else "label"}{_columns(plan)}
        FROM {_FOUND} WHERE label IS NOT NULL {within}
    """


def asked_rows(db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows], pairs: pa.Table) -> str:
    """The query of the vectors that training would have of `pairs` (n, entity_id, event_us), with their n; none without a spine row.

    They are as of event_us, which a spine row may be older than, and as the mesh knows them, whatever was reported when.
    """
    spine = known[plan.model.spine]
    asof = AsOf(pairs["entity_id"].combine_chunks(), np.asarray(pairs["event_us"]))
    found = _find(db, spine, _spine_features(plan), asof, LAST)
    columns = dict(zip(pairs.column_names, pairs.columns, strict=True)) | {"spine_us": found["event_us"]}
    columns |= {name: found[name] for name in found.column_names[1:]}
    asked = pa.table(columns).filter(pc.field("spine_us").is_valid())
    _look_up(db, plan, known, asked.to_reader(_at_once(plan)), labelled=False)
    return f"SELECT n{_columns(plan)} FROM {_FOUND}"


def _spine_features(plan: Plan) -> list[str]:
    """The features of the spine that are used."""
    names = [source.join for source in plan.sources if source.join]
    names += [name for source in plan.sources if source.feature_set == plan.model.spine for name in _features(source)]
    return list(dict.fromkeys(names))


def _listed(features: Sequence[str]) -> str:
    return "".join(f", {feature_column(name)}" for name in features)


def input_column(n: int, name: str | None) -> str:
    """Where what features of the `n`th source are derived from stands beside a training row: a stored feature, or the entity_id."""
    return f'"{_found_column(n, name)}"'


def _found_column(n: int, name: str | None) -> str:
    return f"source {n} entity_id" if name is None else f"source {n} feature {name}"


def _at_once(plan: Plan) -> int:
    return _VALUES // (len(_KEPT) + len(plan.columns))


def _look_up(
    db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows], asked: pa.RecordBatchReader, labelled: bool
) -> None:
    """Put side by side, in `_FOUND`, the rows that are asked for (`_KEPT` and the spine row's) in their order, what the sources have for
    them, and the label if wanted; batches have at most `_at_once` rows.
    """
    slices = _slices(asked, _at_once(plan))
    db.register("first", _Slice(db, plan, known, next(slices)).found(labelled))
    db.execute("CREATE OR REPLACE TEMP TABLE others AS FROM first LIMIT 0")
    for rows in slices:
        db.register("slice", _Slice(db, plan, known, rows).found(labelled))
        db.execute("INSERT INTO others FROM slice")


def _slices(reader: pa.RecordBatchReader, n_rows: int) -> Iterator[pa.Table]:
    """The rows in tables of at most `n_rows`; one at least."""
    batches: list[pa.RecordBatch] = []
    for batch in reader:
        if batches and sum(map(len, batches)) + len(batch) > n_rows:
            yield pa.Table.from_batches(batches)
            batches = []
        batches.append(batch)
    yield pa.Table.from_batches(batches, reader.schema)


class _Slice:
    """Some of the rows that are asked for."""

    def __init__(self, db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows], asked: pa.Table) -> None:
        self._db = db
        self._plan = plan
        self._known = known
        self._asked = asked
        self._at_us: Integers = np.asarray(asked["event_us"])

    def found(self, labelled: bool) -> pa.Table:
        columns: Columns = {name: self._asked[name] for name in self._asked.column_names if name in _KEPT}
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            own = threads.submit(self._as_of, "entity_id")
            parts = [threads.submit(self._source, n, source, own) for n, source in enumerate(self._plan.sources)]
            if labelled:
                parts.append(threads.submit(self._label, own))
            for part in parts:
                columns |= part.result()
        return pa.table(columns)

    def _as_of(self, column: str) -> AsOf:
        return AsOf(self._asked[column].combine_chunks(), self._at_us)

    def _label(self, own: "Future[AsOf]") -> Columns:
        label = self._plan.model.label
        found = _find(self._db, self._known[label.feature_set], [label.column], own.result(), NEXT)
        return {"label_us": found["event_us"], "label": found[f"feature {label.column}"]}

    def _source(self, n: int, source: Source, own: "Future[AsOf]") -> Columns:
        key = f"feature {source.join}" if source.join else "entity_id"
        if source.feature_set == self._plan.model.spine:
            found, event_us = self._asked, self._asked["spine_us"]
        else:
            asof = self._as_of(key) if source.join else own.result()
            by_row = self._plan.model.known_at == "row"
            found = _find(self._db, self._known[source.feature_set], _features(source), asof, LAST_REPORTED if by_row else LAST)
            event_us = found["event_us"]
        columns = {_found_column(n, name): found[f"feature {name}"] for name in _features(source)}
        if source.is_derived:
            columns[_found_column(n, None)] = pc.if_else(pc.is_valid(event_us), self._asked[key], None)
        if source.max_age_us is not None:
            columns[f"source {n} us"] = event_us
        return columns


def _find(db: duckdb.DuckDBPyConnection, rows: KnownRows, features: Sequence[str], asof: AsOf, choice: Choice) -> pa.Table:
    newest_first = choice.event_sign > 0  # what counts comes early then, and what comes after it is passed over
    return asof.find(choice, rows.read(f"{choice.keys}{_listed(features)}", asof.extent, newest_first, db.cursor()))


def _features(source: Source) -> list[str]:
    return list(dict.fromkeys([*(column.feature for column in source.stored), *source.inputs]))


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
