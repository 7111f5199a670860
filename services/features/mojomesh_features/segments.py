"""What a sealed segment looks like: one Parquet file of feature rows, readable by anything that reads Parquet (docs/segments.md)."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from datetime import datetime
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import duckdb
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from adbc_driver_postgresql import StatementOptions, dbapi
from numpy.typing import NDArray

from mojomesh_contracts.definitions import Feature
from mojomesh_store.online import moment
from mojomesh_store.segments import Segment

DUCKDB_TYPES = {"number": "DOUBLE", "category": "VARCHAR", "boolean": "BOOLEAN"}
KEYS = ("entity_id", "event_time", "reported_at", "created_at", "seq", "event_id")
OTHER = "other"
"""The column for what has none of its own, as JSON; null in almost every row."""
BATCH_BYTES = 4 << 20  # what a core works at stays near it; by default four times as much
COUNTED_TOGETHER = 500  # rows: what is made of the bytes of a whole batch is memory from the kernel, page by page and each time anew

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


def write_segment(shard_url: str, extent: Extent, columns: Mapping[str, str], to: Path, config: Config) -> tuple[int, int]:
    """Write the rows of `extent` from PostgreSQL as a Parquet file, sorted by entity, event_time, created_at and seq.

    Reading is one COPY out of PostgreSQL, which takes longest and so does no more than it must. DuckDB takes vectors apart and sorts,
    within its bound of memory.

    Returns:
        Number and sum of seq of the rows that PostgreSQL sent.
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
        cursor.adbc_statement.set_options(**{StatementOptions.BATCH_SIZE_HINT_BYTES.value: BATCH_BYTES})
        cursor.execute(query)
        sent = Sent(cursor.fetch_record_batch())
        db.register("arriving", sent.counted())
        db.execute("SET VARIABLE common = ?", [sent.common])
        # Sorted rows keep their order from there on; what is made of them after sorting need not be carried through it.
        db.execute(f"""
            COPY (
                SELECT * REPLACE (event_id::VARCHAR AS event_id) FROM (
                    SELECT {", ".join(KEYS)}, {features}{_rest(columns)} AS {OTHER} FROM (SELECT *, {parsed} AS parsed FROM arriving)
                    ORDER BY {_BY_ENTITY}, event_time, created_at, seq
                )
            ) TO '{to}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, KV_METADATA {{mojomesh: '{about}'}})
        """)
    return sent.n_rows, sent.sum_of_seqs


# As entity_id orders them. But where all begin alike, as 'account-1' and 'account-2', that is left out, since DuckDB compares texts fast by
# their first bytes only.
_BY_ENTITY = """
    CASE WHEN starts_with(entity_id, getvariable('common')) THEN 1 WHEN entity_id < getvariable('common') THEN 0 ELSE 2 END::UTINYINT,
    CASE WHEN starts_with(entity_id, getvariable('common')) THEN substr(entity_id, length(getvariable('common')) + 1) ELSE entity_id END
"""


class Sent:
    """Feature rows on their way from PostgreSQL into DuckDB; `common` is what the entities of the first of them begin with."""

    def __init__(self, batches: pa.RecordBatchReader) -> None:
        first = pa.Table.from_batches(islice(batches, 1), batches.schema)
        self._schema = batches.schema
        self._batches = chain(first.to_batches(), batches)
        least, greatest = pc.min_max(first["entity_id"]).as_py().values()
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(least or "", greatest or "", strict=False))
        self.common = "".join(letter for letter, _ in alike)
        self.n_rows = self.sum_of_seqs = 0

    def counted(self) -> pa.RecordBatchReader:
        """The rows, once, with a column more."""
        return pa.RecordBatchReader.from_batches(self._schema.append(pa.field("n_keys", pa.int32())), self._counting())

    def _counting(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.n_rows += batch.num_rows
            self.sum_of_seqs += int(batch["seq"].to_numpy().sum())
            yield batch.append_column("n_keys", pa.array(n_keys(batch["vector"])))


def n_keys(vectors: pa.Array) -> NDArray[np.int32]:
    """How many keys each vector has, or more if a text in it looks like one, but never fewer; shape (n_rows,).

    JSON writes `":` after every key and, unless it is part of a text, nowhere else. To count those takes a quarter of parsing.
    """
    _, ends, content = vectors.storage.buffers()
    bounds = np.frombuffer(ends, np.int32)[vectors.offset : vectors.offset + len(vectors) + 1]
    text = np.frombuffer(content, np.uint8)
    found = np.empty(len(vectors), np.int32)
    for first in range(0, len(vectors), COUNTED_TOGETHER):
        begins = bounds[first : first + COUNTED_TOGETHER + 1]
        some = text[begins[0] : begins[-1]]
        after_key = some[1:] == ord(":")
        after_key &= some[:-1] == ord('"')
        # Shorter vectors have less than 256, and bytes are added up several times as fast.
        fits = np.uint8 if np.diff(begins).max() < 256 * len('\\":') else np.int32
        found[first : first + COUNTED_TOGETHER] = np.add.reduceat(after_key.view(np.uint8), begins[:-1] - begins[0], dtype=fits)
    return found


def _rest(columns: Iterable[str]) -> str:
    """What of a vector has no column, as JSON; null if it has no more keys than there are values in columns, which is soon found out."""
    filled = "".join(f' + (parsed."{name}" IS NOT NULL)::INTEGER' for name in columns)
    in_columns = orjson.dumps(dict.fromkeys(columns)).decode()
    return f"CASE WHEN n_keys > 0{filled} THEN nullif(json_merge_patch(vector, '{in_columns}'), '{{}}') END"


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
