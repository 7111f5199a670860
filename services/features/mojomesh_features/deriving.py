"""Derived features of training rows, in DuckDB: aggregates by the code of online reads, formulas by the closures of online reads."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import FunctionNullHandling
from duckdb.sqltypes import DuckDBPyType

from mojomesh_contracts.bundles import Column
from mojomesh_contracts.events import FeatureValue
from mojomesh_contracts.formulas import Formula
from mojomesh_features.aggregating import Facts, Integers, Values, aggregated
from mojomesh_features.joining import ASKED_US, input_column
from mojomesh_features.known import feature_column
from mojomesh_features.segments import DUCKDB_TYPES
from mojomesh_store.online import moment
from mojomesh_store.vectors import Plan, Source, Windowed

_ARROW_TYPES = {"number": pa.float64(), "category": pa.string(), "boolean": pa.bool_()}


def with_derived(db: duckdb.DuckDBPyConnection, plan: Plan, views: Mapping[str, str], rows: str, kept: Sequence[str]) -> str:
    """The query of `rows` in their order with what is derived from them: the columns `kept`, then those of the plan in its order."""
    db.execute(f"CREATE OR REPLACE TEMP TABLE joined AS {rows}")
    columns: dict[str, pa.Array] = {}
    for n, source in enumerate(plan.sources):
        alike: dict[object, list[Windowed]] = defaultdict(list)
        for aggregate in source.aggregates:
            alike[aggregate.feature_set, aggregate.theirs, aggregate.ours].append(aggregate)
        for aggregates in alike.values():
            columns |= _aggregates(db, plan, views, n, aggregates)
    ((n_rows,),) = db.execute("SELECT count(*) FROM joined").fetchall()
    db.register("aggregated", pa.table({"joined row": np.arange(n_rows), **columns}))
    values = (_value(db, n, source, column) for n, source in enumerate(plan.sources) for column in source.columns)
    return f"""
        SELECT {", ".join([*kept, *values])} FROM joined JOIN aggregated ON joined.rowid = aggregated."joined row" ORDER BY joined.rowid
    """


def _aggregates(
    db: duckdb.DuckDBPyConnection, plan: Plan, views: Mapping[str, str], n: int, aggregates: Sequence[Windowed]
) -> dict[str, pa.Array]:
    """Aggregates of one source over the same facts by the same key, by the name of their column."""
    first = aggregates[0]
    names = [f"key_{place}" for place in range(len(first.ours))]
    ours = [input_column(n, name) for name in first.ours]
    theirs = ["entity_id" if name is None else feature_column(name) for name in first.theirs]
    db.execute(f"""
        CREATE OR REPLACE TEMP TABLE keys AS
        SELECT row_number() OVER () - 1 AS key, * FROM (
            SELECT DISTINCT {_list(ours, names, "{} AS {}")} FROM joined WHERE {_list(ours, names, "{} IS NOT NULL", " AND ")}
        )
    """)
    asked = db.execute(f"""
        SELECT coalesce(key, -1) AS key, {ASKED_US} AS us
        FROM joined LEFT JOIN keys ON {_list(ours, names, "{} = {}", " AND ")} ORDER BY joined.rowid
    """).fetchnumpy()
    keys, at_us = (asked[name].astype(np.int64) for name in ("key", "us"))
    facts = _facts(db, plan, views[first.feature_set], _list(theirs, names, "{} = {}", " AND "), aggregates)
    return {
        _column_name(n, aggregate): pa.array(aggregated(aggregate, facts, keys, at_us), _ARROW_TYPES[aggregate.gives])
        for aggregate in aggregates
    }


def _facts(db: duckdb.DuckDBPyConnection, plan: Plan, view: str, same_key: str, aggregates: Sequence[Windowed]) -> Facts:
    """The facts of the asked keys: in their last version, or in all of them where each row knows its own."""
    kinds = {aggregate.feature: aggregate.kind for aggregate in aggregates if aggregate.feature is not None}
    features = "".join(
        f", {feature_column(name)}" if kind == "category" else f", {feature_column(name)}::DOUBLE" for name, kind in kinds.items()
    )
    by_row = plan.model.known_at == "row"
    versions = "PARTITION BY entity_id, event_us ORDER BY created_us"
    if by_row:
        later = f"min(reported_us) OVER ({versions} ROWS BETWEEN 1 FOLLOWING AND UNBOUNDED FOLLOWING)"
        rows = f"SELECT *, coalesce({later}, {np.iinfo(np.int64).max}) AS until_us FROM {view}"
    else:
        rows = f"SELECT *, NULL AS until_us FROM {view} QUALIFY lead(true) OVER ({versions}) IS NULL"
    found = db.sql(f"""
        SELECT key, event_us, reported_us, until_us{features} FROM ({rows}) JOIN keys ON {same_key}
        ORDER BY key, event_us, entity_id, created_us
    """).to_arrow_table()
    key, event_us, reported_us, until_us, *values = found.columns
    known_us = (_integers(reported_us), _integers(until_us)) if by_row else None
    return Facts(_integers(key), _integers(event_us), dict(zip(kinds, map(_values, values), strict=True)), known_us)


def _value(db: duckdb.DuckDBPyConnection, n: int, source: Source, column: Column) -> str:
    """A column's expression over `joined` and `aggregated`."""
    aggregates = {aggregate.name: aggregate for aggregate in source.aggregates}
    formula = dict(source.formulas).get(column.feature)
    if formula is not None:
        inputs = [f'"{_column_name(n, aggregates[name])}"' if name in aggregates else input_column(n, name) for name in formula.names]
        row = ", ".join(f"_{place} := {value}" for place, value in enumerate([ASKED_US, *inputs]))
        function = _function(db, formula)
        value = f"CASE WHEN {input_column(n, None)} IS NOT NULL THEN {function}(struct_pack({row})) END"
    elif column.feature in aggregates:
        value = f'"{_column_name(n, aggregates[column.feature])}"'
    else:
        return f'"{column.name}"'
    return f'{f"CAST({value} AS INTEGER)" if column.type == "boolean" else value} AS "{column.name}"'


def _function(db: duckdb.DuckDBPyConnection, formula: Formula) -> str:
    """Make `formula` a function of one struct: the asked time and the features it uses."""

    def evaluate(row: dict[str, Any]) -> FeatureValue:
        asked_us, *values = row.values()
        return formula(dict(zip(formula.names, values, strict=True)), moment(asked_us))

    types = ["BIGINT", *(DUCKDB_TYPES[kind] for kind in formula.names.values())]
    row = DuckDBPyType(f"STRUCT({', '.join(f'_{place} {kind}' for place, kind in enumerate(types))})")
    gives = DuckDBPyType(DUCKDB_TYPES[formula.kind])
    name = f"computed_{uuid4().hex}"
    db.create_function(name, evaluate, [row], gives, null_handling=FunctionNullHandling.SPECIAL)
    return name


def _column_name(n: int, aggregate: Windowed) -> str:
    return f"source {n} aggregate {aggregate.name}"


def _list(first: Sequence[str], second: Sequence[str], form: str, between: str = ", ") -> str:
    return between.join(form.format(*pair) for pair in zip(first, second, strict=True))


def _integers(column: pa.ChunkedArray) -> Integers:
    return np.asarray(column, dtype=np.int64)


def _values(column: pa.ChunkedArray) -> Values:
    return np.asarray(column)
