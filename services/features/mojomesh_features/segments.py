"""What a sealed segment looks like: one Parquet file of feature rows, readable by anything that reads Parquet (docs/segments.md)."""

from collections.abc import Iterable, Mapping
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import duckdb
import orjson
from adbc_driver_postgresql import dbapi

from mojomesh_contracts.definitions import Feature
from mojomesh_store.online import moment
from mojomesh_store.segments import Segment

DUCKDB_TYPES = {"number": "DOUBLE", "category": "VARCHAR", "boolean": "BOOLEAN"}
KEYS = ("entity_id", "event_time", "reported_at", "created_at", "seq", "event_id")
OTHER = "other"
"""The column for what has none of its own, as JSON; null in almost every row."""

Config = dict[str, str | bool | int | float | list[str]]


def duckdb_config(memory_limit: str, folder: Path) -> Config:
    """DuckDB within a bound of memory; what does not fit goes to `folder`."""
    return {"memory_limit": memory_limit, "temp_directory": str(folder)}


def columns_of(features: Mapping[str, Feature]) -> dict[str, str]:
    """The features that get a column of their own, with their types; tables take no notice of case, so not every name can have one."""
    columns: dict[str, str] = {}
    taken = {*KEYS, OTHER}
    for name, feature in features.items():
        if name.casefold() not in taken:
            taken.add(name.casefold())
            columns[name] = feature.type
    return columns


def json_shape(types: Mapping[str, str]) -> str:
    """The structure, as DuckDB's from_json takes it, of vectors with these features (name to type in DuckDB)."""
    return orjson.dumps(dict(types)).decode()


class Extent(NamedTuple):
    """Which rows a segment is to hold: those of a feature set that were created in (follows, until]."""

    feature_set: str
    follows: datetime | None
    until: datetime


def write_segment(shard_url: str, extent: Extent, columns: Mapping[str, str], to: Path, config: Config) -> None:
    """Write the rows of `extent` from PostgreSQL as a Parquet file, sorted by entity, event_time, created_at and seq.

    Reading is one COPY out of PostgreSQL, which takes longest and so does no more than it must. DuckDB takes vectors apart and sorts,
    within its bound of memory.
    """
    follows = "(SELECT counts_after FROM store.shard)" if extent.follows is None else f"'{extent.follows.isoformat()}'"
    query = f"""
        SELECT entity_id, event_time, reported_at, created_at, seq, event_id, "values" AS vector FROM store.feature_rows
        WHERE feature_set = '{extent.feature_set}' AND created_at <= '{extent.until.isoformat()}' AND created_at > {follows}
    """
    shape = json_shape({name: DUCKDB_TYPES[kind] for name, kind in columns.items()})
    parsed = f"from_json(vector, '{shape}')" if columns else "NULL"
    features = "".join(f'parsed."{name}", ' for name in columns)
    about = orjson.dumps({"until": extent.until, "columns": columns}).decode()
    with dbapi.connect(shard_url) as shard, closing(shard.cursor()) as cursor, duckdb.connect(config=config) as db:
        cursor.execute(query)
        db.register("arriving", cursor.fetch_arrow())
        db.execute(f"""
            COPY (
                SELECT * REPLACE (event_id::VARCHAR AS event_id) FROM (
                    SELECT {", ".join(KEYS)}, {features}{_rest(columns)} AS {OTHER} FROM (SELECT *, {parsed} AS parsed FROM arriving)
                )
                ORDER BY entity_id, event_time, created_at, seq
            ) TO '{to}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, KV_METADATA {{mojomesh: '{about}'}})
        """)


def _rest(columns: Iterable[str]) -> str:
    """What of a vector has no column, as JSON; null if it has no more keys than there are values in columns, which is soon found out."""
    filled = "".join(f' + (parsed."{name}" IS NOT NULL)::INTEGER' for name in columns)
    in_columns = orjson.dumps(dict.fromkeys(columns)).decode()
    return f"CASE WHEN len(json_keys(vector)) > 0{filled} THEN nullif(json_merge_patch(vector, '{in_columns}'), '{{}}') END"


def read_segment(file: Path, feature_set: str, follows: datetime | None, path: str) -> Segment:
    """What the manifest is to say of a segment's file, from the file alone."""
    with duckdb.connect() as db:
        (about,) = _only(db.execute(f"SELECT decode(value) FROM parquet_kv_metadata('{file}') WHERE decode(key) = 'mojomesh'"))
        n_rows, sum_of_seqs, first_us, last_us, n_tied = _only(
            db.execute(f"""
                SELECT count(*), sum(seq)::BIGINT, epoch_us(min(event_time)), epoch_us(max(event_time)),
                    count(*) FILTER (entity_id = before.entity_id AND event_time = before.event_time AND created_at = before.created_at)
                FROM (
                    SELECT *, lag({{'entity_id': entity_id, 'event_time': event_time, 'created_at': created_at}}) OVER () AS before
                    FROM '{file}'
                )
            """)
        )
    told = orjson.loads(about)
    return Segment(
        feature_set,
        follows,
        datetime.fromisoformat(told["until"]),
        path,
        told["columns"],
        n_rows,
        n_tied,
        sum_of_seqs,
        moment(first_us),
        moment(last_us),
    )


class ErasedRow(NamedTuple):
    """What an erasure needs to know of a row."""

    event_time: datetime
    created_at: datetime
    event_id: UUID


def rows_of_entity(file: Path, entity_id: str) -> list[ErasedRow]:
    """An entity's rows in a segment; rows lie sorted by entity, so of the others little is read."""
    with duckdb.connect() as db:
        found = db.execute(f"SELECT epoch_us(event_time), epoch_us(created_at), event_id FROM '{file}' WHERE entity_id = ?", [entity_id])
        return [ErasedRow(moment(event_us), moment(created_us), UUID(event_id)) for event_us, created_us, event_id in found.fetchall()]


def n_rows_of(file: Path) -> int:
    """Rows in a segment, from the file's end alone."""
    with duckdb.connect() as db:
        return int(_only(db.execute(f"SELECT num_rows FROM parquet_file_metadata('{file}')"))[0])


def write_without(file: Path, entity_id: str, to: Path, config: Config) -> Path:
    """Write a segment without an entity's rows, else the same in the same order; `to`."""
    with duckdb.connect(config=config) as db:
        (about,) = _only(db.execute(f"SELECT decode(value) FROM parquet_kv_metadata('{file}') WHERE decode(key) = 'mojomesh'"))
        db.execute("SET VARIABLE forgotten = ?", [entity_id])
        db.execute(f"""
            COPY (FROM '{file}' WHERE entity_id <> getvariable('forgotten'))
            TO '{to}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, KV_METADATA {{mojomesh: '{about}'}})
        """)
    return to


def _only(found: duckdb.DuckDBPyConnection) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = found.fetchone()
    assert row is not None  # an aggregate
    return row
