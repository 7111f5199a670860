"""Derived features of training rows, in DuckDB: aggregates by the code of online reads, formulas by the closures of online reads."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import duckdb
import numpy as np
import pyarrow as pa

from mojomesh_contracts.bundles import Column
from mojomesh_features.aggregating import Facts, Integers, Values, aggregated
from mojomesh_features.joining import ASKED_US, input_column
from mojomesh_features.known import KnownRows, feature_column
from mojomesh_store.online import moment
from mojomesh_store.vectors import Plan, Source, Windowed

_ARROW_TYPES = {"number": pa.float64(), "category": pa.string(), "boolean": pa.bool_()}
_BATCH = 65_536


def with_derived(db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows], rows: str, kept: Sequence[str]) -> str:
    """The query of `rows` in their order with what is derived from them: the columns `kept`, then those of the plan in its order."""
    db.execute(f"CREATE OR REPLACE TEMP TABLE joined AS {rows}")
    derived: dict[str, pa.Array] = {}
    values = list(kept)
    for n, source in enumerate(plan.sources):
        columns = _aggregated(db, plan, known, n, source)
        columns |= _computed(db, n, source, columns)
        derived |= {_derived(n, name): column for name, column in columns.items()}
        values += [_value(n, column, columns) for column in source.columns]
    ((n_rows,),) = db.execute("SELECT count(*) FROM joined").fetchall()
    db.register("derived", pa.table({"joined row": np.arange(n_rows), **derived}))
    return f"""
        SELECT {", ".join(values)} FROM joined JOIN derived ON joined.rowid = derived."joined row" ORDER BY joined.rowid
    """


def _derived(n: int, name: str) -> str:
    return f"source {n} derived {name}"


def _value(n: int, column: Column, derived: Mapping[str, pa.Array]) -> str:
    if column.feature not in derived:
        return f'"{column.name}"'
    value = f'"{_derived(n, column.feature)}"'
    return f'{f"CAST({value} AS INTEGER)" if column.type == "boolean" else value} AS "{column.name}"'


def _computed(db: duckdb.DuckDBPyConnection, n: int, source: Source, aggregated: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
    """The formulas of a source for each row, missing where it has no row."""
    used = dict.fromkeys(name for _, formula in source.formulas for name in formula.names)
    stored = [name for name in used if name not in aggregated]
    columns = [ASKED_US, input_column(n, None), *(input_column(n, name) for name in stored)]
    found: dict[str, list[pa.Array]] = {name: [] for name, _ in source.formulas}
    begin = 0
    for batch in db.sql(f"SELECT {', '.join(columns)} FROM joined ORDER BY rowid").to_arrow_reader(_BATCH) if found else ():
        asked_us, entity_ids, *values = (column.to_pylist() for column in batch.columns)
        inputs = dict(zip(stored, values, strict=True))
        inputs |= {name: column.slice(begin, len(batch)).to_pylist() for name, column in aggregated.items() if name in used}
        begin += len(batch)
        rows = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)] or [{}] * len(batch)
        for name, formula in source.formulas:
            answers = (
                None if entity_id is None else formula(row, moment(us))
                for us, entity_id, row in zip(asked_us, entity_ids, rows, strict=True)
            )
            found[name].append(pa.array(answers, _ARROW_TYPES[formula.kind]))
    return {name: pa.chunked_array(found[name], _ARROW_TYPES[formula.kind]) for name, formula in source.formulas}


def _aggregated(db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows], n: int, source: Source) -> dict[str, pa.Array]:
    """The aggregates of a source for each row; those over the same facts by the same key together."""
    alike: dict[object, list[Windowed]] = defaultdict(list)
    for aggregate in source.aggregates:
        alike[aggregate.feature_set, aggregate.theirs, aggregate.ours].append(aggregate)
    return {name: column for some in alike.values() for name, column in _aggregates(db, plan, known, n, some).items()}


def _aggregates(
    db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows], n: int, aggregates: Sequence[Windowed]
) -> dict[str, pa.Array]:
    """Aggregates of one source over the same facts by the same key, by name."""
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
    facts = _facts(db, plan, known[first.feature_set].view, _list(theirs, names, "{} = {}", " AND "), aggregates)
    return {aggregate.name: pa.array(aggregated(aggregate, facts, keys, at_us), _ARROW_TYPES[aggregate.gives]) for aggregate in aggregates}


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


def _list(first: Sequence[str], second: Sequence[str], form: str, between: str = ", ") -> str:
    return between.join(form.format(*pair) for pair in zip(first, second, strict=True))


def _integers(column: pa.ChunkedArray) -> Integers:
    return np.asarray(column, dtype=np.int64)


def _values(column: pa.ChunkedArray) -> Values:
    return np.asarray(column)
