"""Snapshots: the rows known at a time, joined as of their event times into one Parquet file, the same for ever.

The rows come from PostgreSQL as Arrow, through ADBC; DuckDB joins them set by set. `_Building._load` is where sealed segments would
be read too.
"""

import asyncio
import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from adbc_driver_postgresql import dbapi

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.objects import Objects
from mojomesh_contracts.bundles import Column, SnapshotTaken
from mojomesh_contracts.definitions import Feature, Label
from mojomesh_features.errors import UnusableDefinition
from mojomesh_features.vectors import Plan
from mojomesh_store.shards import FeatureStore

_DUCKDB_TYPES = {"number": "DOUBLE", "category": "VARCHAR", "boolean": "BOOLEAN"}
_LABELS = {"binary": ("boolean", "number"), "number": ("number",), "multiclass": ("category",)}
_KEYS = ("entity_id", "event_time", "label_time", "label")
_BATCH = 65_536


class Snapshots:
    """Takes snapshots, one at a time: each may use all the memory it is allowed."""

    def __init__(self, feature_store: FeatureStore, shard_urls: Sequence[str], objects: Objects, folder: Path, memory_limit: str) -> None:
        self._feature_store = feature_store
        self._shard_urls = shard_urls
        self._objects = objects
        self._folder = folder
        self._memory_limit = memory_limit
        self._one_at_a_time = asyncio.Lock()

    async def take(self, plan: Plan, label: Feature, snapshot_time: datetime) -> SnapshotTaken:
        """The rows of `plan` with their labels, as the mesh knew them at `snapshot_time`; taken again it is the same.

        Raises:
            PermanentError: `snapshot_time` is later than now, or the labels are not what their type says.
        """
        _check_names(plan)
        await self._feature_store.pass_snapshot(snapshot_time)
        self._folder.mkdir(parents=True, exist_ok=True)
        async with self._one_at_a_time:
            with tempfile.TemporaryDirectory(dir=self._folder, prefix="snapshot-") as folder:
                building = _Building(plan, label, snapshot_time, Path(folder), self._memory_limit)
                digest, n_rows = await asyncio.to_thread(building.build, self._shard_urls)
                path = f"snapshots/{plan.model.name}/{digest}.parquet"
                if not await self._objects.exists(path):
                    await self._objects.put(path, building.parquet)
        return SnapshotTaken(path=path, digest=digest, n_rows=n_rows, snapshot_time=snapshot_time, columns=plan.columns)


def _check_names(plan: Plan) -> None:
    """Refuse columns that a file cannot hold side by side: Parquet's readers take no notice of case."""
    names = [*_KEYS, *(column.name for column in plan.columns)]
    folded = [name.casefold() for name in names]
    if twice := [name for name in names if folded.count(name.casefold()) > 1]:
        raise UnusableDefinition(f"columns of a snapshot differ by more than case, and {', '.join(_KEYS)} are taken: {', '.join(twice)}")


def label_of(label: Label, definitions: Definitions) -> Feature:
    """The feature that a model is to predict.

    Raises:
        NotFound: There is no such outcome set.
        UnusableDefinition: It has no such column, or one of a type that cannot be learned so.
    """
    feature = definitions.feature_set(label.feature_set).features.get(label.column)
    if feature is None:
        raise UnusableDefinition(f"the label names '{label.column}', which is not a feature of '{label.feature_set}'")
    if feature.type not in _LABELS[label.type]:
        raise UnusableDefinition(
            f"a {label.type} label is a {' or a '.join(_LABELS[label.type])}; '{label.column}' of '{label.feature_set}' is a {feature.type}"
        )
    return feature


@dataclass(frozen=True)
class _Building:
    """One snapshot in the making, in a folder of its own. Runs in a thread."""

    plan: Plan
    label: Feature
    snapshot_time: datetime
    folder: Path
    memory_limit: str

    @property
    def parquet(self) -> Path:
        return self.folder / "snapshot.parquet"

    def build(self, shard_urls: Sequence[str]) -> tuple[str, int]:
        """Write the Parquet file; the digest of its rows and their number."""
        config: dict[str, str | bool | int | float | list[str]] = {"memory_limit": self.memory_limit, "temp_directory": str(self.folder)}
        with duckdb.connect(config=config) as db:
            for feature_set, features in self._needed().items():
                self._load(db, feature_set, features, shard_urls)
            db.execute(f"CREATE TABLE training AS {self._joined()}")
            self._check_labels(db)
            db.execute(f"COPY training TO '{self.parquet}' (FORMAT parquet, COMPRESSION zstd)")
            return _digest(db.sql("FROM training").to_arrow_reader(_BATCH))

    def _needed(self) -> dict[str, dict[str, str]]:
        """The features that must be read of each feature set, with their types in DuckDB."""
        model = self.plan.model
        needed: dict[str, dict[str, str]] = defaultdict(dict)
        needed[model.spine].update({source.join: "VARCHAR" for source in self.plan.sources if source.join})
        needed[model.label.feature_set][model.label.column] = _DUCKDB_TYPES[self.label.type]
        for column in self.plan.columns:
            needed[column.feature_set][column.feature] = _DUCKDB_TYPES[column.type]
        return needed

    def _load(self, db: duckdb.DuckDBPyConnection, feature_set: str, features: dict[str, str], shard_urls: Sequence[str]) -> None:
        """Make the table `rows_<feature set>` of the rows that were known, less those corrected by the same transaction.

        `known` orders rows as the three keys do: event time first, then created_at. Only rows of one transaction share a created_at, so
        seq, which does not fit in as well, has decided once the earlier of two such rows is gone.
        """
        table = _quoted(f"rows_{feature_set}")
        columns = ", ".join(f"{_feature(name)} {kind}" for name, kind in features.items())
        db.execute(f"CREATE TABLE {table} (entity_id VARCHAR, event_us BIGINT, created_us BIGINT, seq BIGINT, {columns})")
        shape = "{" + ", ".join(f'"{name}": "{kind}"' for name, kind in features.items()) + "}"
        vector = ", ".join(f"vector.{_quoted(name)}" for name in features)
        for url in shard_urls:
            with dbapi.connect(url) as shard, shard.cursor() as cursor:
                cursor.execute(f"""
                    SELECT entity_id, event_time, created_at, seq, "values"::text AS "values" FROM store.feature_rows
                    WHERE feature_set = '{feature_set}' AND created_at <= '{self.snapshot_time.isoformat()}'
                """)
                db.register("arriving", cursor.fetch_record_batch())
                db.execute(f"""
                    INSERT INTO {table} SELECT entity_id, epoch_us(event_time), epoch_us(created_at), seq, {vector} FROM (
                        SELECT *, from_json("values", '{shape}') AS vector FROM arriving
                    )
                """)
                db.unregister("arriving")
        db.execute(f"""
            DELETE FROM {table} USING (
                SELECT entity_id, event_us, created_us, max(seq) AS last_seq FROM {table} GROUP BY ALL HAVING count(*) > 1
            ) AS tied
            WHERE {table}.entity_id = tied.entity_id AND {table}.event_us = tied.event_us AND {table}.created_us = tied.created_us
                AND seq < last_seq
        """)

    def _joined(self) -> str:
        """The query of the training rows.

        A plain ASOF join is wrong where rows share an event time, hence one key of event time and created_at. Of the outcomes the first
        not before the spine's event time counts, in its last correction: there created_at runs backwards.
        """
        model = self.plan.model
        joins, columns = [], []
        for n, source in enumerate(self.plan.sources):
            own = source.feature_set == model.spine
            table = "spine" if own else f"source_{n}"
            fresh = "true"
            if not own:
                joined_by = "entity_id" if source.join is None else _feature(source.join)
                joins.append(f"""
                    ASOF LEFT JOIN (
                        SELECT *, event_us::HUGEINT * 9223372036854775808 + created_us AS known FROM {_quoted(f"rows_{source.feature_set}")}
                    ) AS {table} ON spine.{joined_by} = {table}.entity_id AND spine.last_known >= {table}.known""")
                if source.max_age_us is not None:
                    fresh = f"spine.event_us - {table}.event_us <= {source.max_age_us}"
            columns += [f"CASE WHEN {fresh} THEN {_value(table, column)} END AS {_quoted(column.name)}" for column in source.columns]
        label = f"outcome.{_feature(model.label.column)}"
        return f"""
            SELECT spine.entity_id AS entity_id, {_milliseconds("spine")} AS event_time, {_milliseconds("outcome")} AS label_time,
                {f"CAST({label} AS DOUBLE)" if model.label.type == "binary" else label} AS label, {", ".join(columns)}
            FROM (
                SELECT *, event_us::HUGEINT * 9223372036854775808 AS first_known, first_known + 9223372036854775807 AS last_known
                FROM {_quoted(f"rows_{model.spine}")}
                QUALIFY row_number() OVER (PARTITION BY entity_id, event_us ORDER BY created_us DESC) = 1
            ) AS spine
            ASOF JOIN (
                SELECT *, event_us::HUGEINT * 9223372036854775808 + (9223372036854775807 - created_us) AS known
                FROM {_quoted(f"rows_{model.label.feature_set}")}
            ) AS outcome ON spine.entity_id = outcome.entity_id AND spine.first_known <= outcome.known
            {"".join(joins)}
            WHERE {label} IS NOT NULL
            ORDER BY {_milliseconds("spine")}, spine.entity_id, spine.event_us
        """

    def _check_labels(self, db: duckdb.DuckDBPyConnection) -> None:
        """Make a binary label 0 or 1."""
        if self.plan.model.label.type != "binary":
            return
        wrong = db.execute("SELECT label, entity_id FROM training WHERE label NOT IN (0, 1) LIMIT 1").fetchone()
        if wrong is not None:
            raise UnusableDefinition(f"a binary label is 0 or 1 (or false, true); that of '{wrong[1]}' is {wrong[0]:g}")
        db.execute("ALTER TABLE training ALTER label TYPE INTEGER")


def _value(table: str, column: Column) -> str:
    value = f"{table}.{_feature(column.feature)}"
    return f"CAST({value} AS INTEGER)" if column.type == "boolean" else value


def _milliseconds(table: str) -> str:
    return f"CAST(floor({table}.event_us / 1000) AS BIGINT)"


def _feature(name: str) -> str:
    """A feature's column, kept apart from the columns of every row."""
    return _quoted(f"feature {name}")


def _quoted(name: str) -> str:
    """A name as SQL takes it; names of definitions have no quotes in them."""
    return f'"{name}"'


def _digest(rows: pa.RecordBatchReader) -> tuple[str, int]:
    """SHA-256 of rows in their order, and their number: of names, types and values, whatever the file's bytes or the batches."""
    parts = {field.name: [hashlib.sha256() for _ in range(3)] for field in rows.schema}
    n_rows = 0
    for batch in rows:
        n_rows += batch.num_rows
        for name, (present, sizes, content) in parts.items():
            column = batch.column(name)
            present.update(np.asarray(pc.is_valid(column)).astype(np.uint8).tobytes())
            if pa.types.is_string(column.type):
                filled = pc.fill_null(column, "")
                sizes.update(np.asarray(pc.binary_length(filled)).astype("<i8").tobytes())
                content.update("".join(filled.to_pylist()).encode())
            else:
                values = np.asarray(pc.fill_null(column, 0))
                content.update((values + values.dtype.type(0)).tobytes())  # adding 0 makes -0.0 the 0.0 that it equals
    whole = hashlib.sha256()
    for field in rows.schema:
        whole.update(f"{field.name} {field.type} {' '.join(part.hexdigest() for part in parts[field.name])}\n".encode())
    return whole.hexdigest(), n_rows
