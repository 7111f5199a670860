"""The rows that were known at a time: sealed segments and what is not sealed yet, read by DuckDB."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from copy import copy
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import duckdb
import pyarrow as pa
from adbc_driver_postgresql import dbapi
from pydantic import TypeAdapter

from mojomesh_features.segments import DUCKDB_TYPES, OTHER, json_shape
from mojomesh_store.segments import Segment

_SEGMENTS = TypeAdapter(list[Segment])
_BATCH = 65_536
_ONE_CLONE = Lock()  # a connection takes one call at a time
_ORDER = ("entity_id", "event_us", "created_us")
_TIMES = ", ".join(f"epoch_us({time}_{at}) AS {time}_us" for time, at in (("event", "time"), ("reported", "at"), ("created", "at")))


class Opening(Mapping[str, "KnownRows"]):
    """The rows of feature sets that are being opened, by name; who asks for some, in a thread, waits until they can be read."""

    def __init__(self, opening: Mapping[str, "Future[KnownRows]"]) -> None:
        self._opening = opening

    def __getitem__(self, name: str) -> "KnownRows":
        return self._opening[name].result()

    def __iter__(self) -> Iterator[str]:
        return iter(self._opening)

    def __len__(self) -> int:
        return len(self._opening)


def feature_column(name: str) -> str:
    """A feature's column in a view, quoted, and kept apart from the columns of every row."""
    return f'"feature {name}"'


class _Alike(NamedTuple):
    """What segments have in common that one query reads."""

    columns: tuple[str, ...]
    tied: bool
    partly_known: bool
    large: bool


class _Part(NamedTuple):
    query: str
    in_order: bool


class KnownRows:
    """The rows of one feature set with `created_at <= snapshot_time`, on all shards, with some of its features (name to type).

    Columns of its view: entity_id, event_us, reported_us and created_us (microseconds since 1970), and `"feature <name>"`. Of rows
    that share the first, second and fourth, which only one transaction can have stored, the view has the one with the greatest seq; so
    event_us and created_us order the rows of an entity as the three keys do.
    """

    large = 100_000
    """Rows of a segment that is read as it lies. Smaller ones are sorted together first: each would be looked through for all who ask."""

    def __init__(self, feature_set: str, features: Mapping[str, str], snapshot_time: datetime) -> None:
        self.feature_set = feature_set
        self._features = {name: DUCKDB_TYPES[kind] for name, kind in features.items()}
        self._snapshot_time = snapshot_time
        self._tail = f'"tail {feature_set}"'
        self.view = f'"rows {feature_set}"'
        self.segments: list[Segment] = []
        self._files: dict[_Alike, list[Path]] = {}
        self._tied = False
        self._until = ""

    def read(
        self, columns: str, extent: tuple[str, str], newest_first: bool, db: duckdb.DuckDBPyConnection
    ) -> Iterator[pa.RecordBatchReader]:
        """Columns of the view, in SQL, with its keys, of the entities in `extent`, first and last included.

        Large segments come one after the other, all else together, each in the order of the keys.
        """
        db.execute("SET streaming_buffer_size = '16MB'")  # with less DuckDB waits for us before it reads on
        first, last = (f"""'{text.replace("'", "''")}'""" for text in extent)
        for part in self._parts(newest_first):
            order = "" if part.in_order else f"ORDER BY {', '.join(_ORDER)}"
            rows = db.sql(f"SELECT {columns} FROM ({part.query}) WHERE entity_id BETWEEN {first} AND {last} {order}")
            yield rows.to_arrow_reader(_BATCH)

    def read_tails(self, shards: Sequence[dbapi.Connection], db: duckdb.DuckDBPyConnection) -> None:
        """Bring what is not sealed from PostgreSQL, and learn which segments hold the rest."""
        columns = "".join(f", {feature_column(name)} {kind}" for name, kind in self._features.items())
        times = "event_us BIGINT, reported_us BIGINT, created_us BIGINT"
        db.execute(f"CREATE TABLE {self._tail} (entity_id VARCHAR, {times}, seq BIGINT{columns})")
        for shard in shards:
            with _ONE_CLONE:
                own = shard.adbc_clone()
            with own, closing(own.cursor()) as cursor:
                # One view of the manifest and of the tail: no row leaves the one for the other between our looks at them, and no partition.
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute("LOCK TABLE store.feature_rows IN ACCESS SHARE MODE")
                segments = self._sealed(cursor)
                self.segments += [segment for segment in segments if segment.follows is None or segment.follows < self._snapshot_time]
                if not segments or segments[-1].created_until < self._snapshot_time:
                    self._read_after(segments[-1].created_until if segments else None, cursor, db)

    def create_view(self, db: duckdb.DuckDBPyConnection, files: Mapping[str, Path]) -> None:
        """Make the view; `files` are the segments' on this machine, by path."""
        alike = defaultdict(list)
        for segment in self.segments:
            partly_known = segment.created_until > self._snapshot_time
            large = segment.n_rows >= self.large
            alike[_Alike(tuple(segment.columns), segment.n_tied > 0, partly_known, large)].append(files[segment.path])
        self._files = dict(alike)
        grouped = f"SELECT 1 FROM {self._tail} GROUP BY {', '.join(_ORDER)} HAVING count(*) > 1 LIMIT 1"
        self._tied = db.execute(grouped).fetchone() is not None
        self._create_view(db)

    def until(self, known_us: int, db: duckdb.DuckDBPyConnection) -> "KnownRows":
        """Those of them with `created_us <= known_us`."""
        then = copy(self)
        then.view = f'"then {self.feature_set}"'
        then._until = f"WHERE created_us <= {known_us}"
        then._create_view(db)
        return then

    def _create_view(self, db: duckdb.DuckDBPyConnection) -> None:
        db.execute(f"CREATE OR REPLACE VIEW {self.view} AS {' UNION ALL '.join(part.query for part in self._parts())}")

    def _parts(self, newest_first: bool = False) -> list[_Part]:
        step = -1 if newest_first else 1
        parts = [_Part(self._of_segments(files[::step], alike), alike.large and not alike.tied) for alike, files in self._files.items()]
        parts.append(_Part(f"SELECT * EXCLUDE (seq) FROM {self._tail} {self._last_of_tied() if self._tied else ''}", False))
        return [_Part(f"FROM ({part.query}) {self._until}", part.in_order) for part in parts[::step]]

    def _sealed(self, cursor: dbapi.Cursor) -> list[Segment]:
        cursor.execute(f"""
            SELECT coalesce(json_agg(listed), '[]')::text FROM (
                SELECT {", ".join(Segment._fields)} FROM store.segments WHERE feature_set = '{self.feature_set}' ORDER BY created_until
            ) AS listed
        """)
        return _SEGMENTS.validate_json(cursor.fetchone()[0])

    def _read_after(self, sealed: datetime | None, cursor: dbapi.Cursor, db: duckdb.DuckDBPyConnection) -> None:
        cursor.execute(f"""
            SELECT entity_id, event_time, reported_at, created_at, seq, "values" AS vector FROM store.feature_rows
            WHERE feature_set = '{self.feature_set}' AND {self._known()} AND {self._counts(sealed)}
        """)
        db.register("arriving", cursor.fetch_arrow())
        features = "".join(f', vector."{name}"' for name in self._features)
        db.execute(f"""
            INSERT INTO {self._tail} SELECT entity_id, {_TIMES}, seq{features}
            FROM (SELECT * REPLACE (from_json(vector, '{json_shape(self._features)}') AS vector) FROM arriving)
        """)
        db.unregister("arriving")

    def _of_segments(self, files: Sequence[Path], alike: _Alike) -> str:
        features = "".join(f", {self._value(name, alike.columns)} AS {feature_column(name)}" for name in self._features)
        listed = ", ".join(f"'{file}'" for file in files)
        return f"""
            SELECT entity_id, {_TIMES}{features} FROM read_parquet([{listed}])
            {f"WHERE {self._known()}" if alike.partly_known else ""} {self._last_of_tied() if alike.tied else ""}
        """

    def _value(self, name: str, columns: Sequence[str]) -> str:
        if name in columns:
            return f'"{name}"'
        return f"""from_json({OTHER}, '{json_shape({name: self._features[name]})}')."{name}\""""

    def _known(self) -> str:
        return f"created_at <= '{self._snapshot_time.isoformat()}'"

    def _counts(self, sealed: datetime | None) -> str:
        """Of the rows on a shard those that are neither in a segment nor copies, which count where they were copied from."""
        return "created_at > " + (f"'{sealed.isoformat()}'" if sealed else "(SELECT counts_after FROM store.shard)")

    def _last_of_tied(self) -> str:
        return f"QUALIFY row_number() OVER (PARTITION BY {', '.join(_ORDER)} ORDER BY seq DESC) = 1"
