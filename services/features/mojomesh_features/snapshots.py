"""Snapshots: the rows known at a time, joined as of their event times into one Parquet file, the same for ever.

`known` reads the rows, from sealed segments and from PostgreSQL, `asof` finds those that count, `joining` puts them side by side, DuckDB
sorts and writes them.
"""

import asyncio
import hashlib
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from datetime import datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from adbc_driver_postgresql import dbapi
from numpy.typing import NDArray

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.objects import Objects
from mojomesh_contracts.bundles import SnapshotTaken
from mojomesh_contracts.definitions import Feature, Label
from mojomesh_contracts.events import FeatureValue
from mojomesh_features.deriving import with_derived
from mojomesh_features.joining import asked_rows, training_rows
from mojomesh_features.known import KnownRows, Opening
from mojomesh_features.segments import duckdb_config
from mojomesh_store import erasure
from mojomesh_store.errors import UnusableDefinition
from mojomesh_store.online import microseconds
from mojomesh_store.shards import FeatureStore, Shard
from mojomesh_store.vectors import Plan

_LABELS = {"binary": ("boolean", "number"), "number": ("number",), "multiclass": ("category",)}
_KEYS = ("entity_id", "event_time", "label_time", "label")
_BATCH = 65_536

# Arrow's own pool asks for huge pages. A virtual machine that gives free memory back to its host waits milliseconds for each (decision 23).
pa.set_memory_pool(pa.system_memory_pool())


class Snapshots:
    """Takes snapshots, one at a time: each may use all the memory it is allowed, and spills what does not fit."""

    rows: type[KnownRows] = KnownRows

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
            TransientError: A shard is away.
        """
        _check_names(plan)
        async with self._reading(_needed(plan, label), snapshot_time) as (db, known, folder):
            file = folder / "snapshot.parquet"
            query = await asyncio.to_thread(training_rows, db, plan, known)
            if plan.derived:
                query = await asyncio.to_thread(with_derived, db, plan, known, query, _KEYS)
            digest, n_rows = await asyncio.to_thread(_write, db, query, plan.model.label, file)
            path = f"snapshots/{plan.model.name}/{digest}.parquet"
            if not await self._objects.exists(path):
                await self._objects.put(path, file)
        erased = await self.erasures(plan, snapshot_time)
        return SnapshotTaken(path=path, digest=digest, n_rows=n_rows, snapshot_time=snapshot_time, columns=plan.columns, erasures=erased)

    async def erasures(self, plan: Plan, snapshot_time: datetime) -> list[datetime]:
        """When rows were erased that had been known at `snapshot_time`, of the feature sets of a model."""
        found: set[datetime] = set()
        for shard in self._feature_store.shards:
            async with shard.begin() as db:
                found |= await erasure.erasures(db, plan.feature_sets, snapshot_time)
        return sorted(found)

    async def vectors(self, plan: Plan, asked: Sequence[tuple[str, int]], times: Sequence[datetime]) -> list[list[dict[str, FeatureValue]]]:
        """The vectors that training would have of each entity_id at its event time, as known at each of `times`, the last one last.

        Columns are those of a snapshot; empty where the spine has no row.

        Raises:
            PermanentError: The last of `times` is later than now.
        """
        async with self._reading(_needed(plan), times[-1]) as (db, known, _):
            entity_ids, times_us = zip(*asked, strict=True)
            pairs = pa.table({"n": range(len(asked)), "entity_id": entity_ids, "event_us": times_us})
            return [await asyncio.to_thread(_vectors, db, plan, known, pairs, time) for time in times]

    @asynccontextmanager
    async def _reading(
        self, needed: Mapping[str, Mapping[str, str]], snapshot_time: datetime
    ) -> AsyncIterator[tuple[duckdb.DuckDBPyConnection, Mapping[str, KnownRows], Path]]:
        """What was known of these features, by feature set, in a database of its own, and a folder that lives as long."""
        await self._feature_store.pass_snapshot(snapshot_time)
        self._folder.mkdir(parents=True, exist_ok=True)
        async with self._one_at_a_time:
            with tempfile.TemporaryDirectory(dir=self._folder, prefix="snapshot-") as name:
                folder = Path(name)
                db = await asyncio.to_thread(duckdb.connect, config=duckdb_config(self._memory_limit, folder))
                try:
                    rows = [self.rows(name, features, snapshot_time) for name, features in needed.items()]
                    async with self._opening(rows, db, folder) as known:
                        yield db, known, folder
                except (dbapi.Error, duckdb.Error):
                    # A connection that breaks has many names in the two libraries; to ask the shards tells whether one of them did it.
                    await self._feature_store.each(Shard.answer)
                    raise
                finally:
                    await asyncio.to_thread(db.close)  # to give gigabytes back takes a while

    @asynccontextmanager
    async def _opening(self, known: Sequence[KnownRows], db: duckdb.DuckDBPyConnection, folder: Path) -> AsyncIterator[Opening]:
        """Open the rows side by side: those of the spine are looked at while others are still on their way."""
        loop = asyncio.get_running_loop()
        with ExitStack() as open_until_end:
            # Learns PostgreSQL's types, which takes longer than all else; its clones know them.
            shards = [open_until_end.enter_context(await asyncio.to_thread(dbapi.connect, url)) for url in self._shard_urls]
            threads = open_until_end.enter_context(ThreadPoolExecutor(len(known)))

            async def open_rows(rows: KnownRows, own: duckdb.DuckDBPyConnection) -> KnownRows:
                await loop.run_in_executor(threads, rows.read_tails, shards, own)
                files = {segment.path: await self._objects.fetch(segment.path, folder) for segment in rows.segments}
                await loop.run_in_executor(threads, rows.create_view, own, files)
                return rows

            opening = {rows.feature_set: asyncio.run_coroutine_threadsafe(open_rows(rows, db.cursor()), loop) for rows in known}
            try:
                yield Opening(opening)
            finally:
                await asyncio.gather(*map(asyncio.wrap_future, opening.values()), return_exceptions=True)


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


def _vectors(
    db: duckdb.DuckDBPyConnection, plan: Plan, known: Mapping[str, KnownRows], pairs: pa.Table, known_at: datetime
) -> list[dict[str, FeatureValue]]:
    then = {name: rows.until(microseconds(known_at), db) for name, rows in known.items()}
    query = asked_rows(db, plan, then, pairs)
    if plan.derived:
        query = with_derived(db, plan, then, query, ["n"])
    vectors: list[dict[str, FeatureValue]] = [{} for _ in range(len(pairs))]
    for row in db.sql(query).to_arrow_table().to_pylist():
        vectors[row.pop("n")] = row
    return vectors


def _needed(plan: Plan, label: Feature | None = None) -> dict[str, dict[str, str]]:
    """The features that must be read of each feature set, with their types; with a label, what training needs."""
    model = plan.model
    needed: dict[str, dict[str, str]] = defaultdict(dict)
    needed[model.spine].update({source.join: "category" for source in plan.sources if source.join})
    if label is not None:
        needed[model.label.feature_set][model.label.column] = label.type
    for source in plan.sources:
        needed[source.feature_set] |= {column.feature: column.type for column in source.stored} | source.inputs
        for aggregate in source.aggregates:
            needed[aggregate.feature_set] |= {name: "category" for name in aggregate.theirs if name is not None}
            if aggregate.feature is not None and aggregate.kind is not None:
                needed[aggregate.feature_set][aggregate.feature] = aggregate.kind
    return needed


def _write(db: duckdb.DuckDBPyConnection, query: str, label: Label, to: Path) -> tuple[str, int]:
    """Write the training rows to a Parquet file; their digest and number.

    Raises:
        UnusableDefinition: A binary label is neither 0 nor 1.
    """
    rows = f"({query})"
    if label.type == "binary":  # an integer; one that is no label is written as 2, and told
        rows = f"(SELECT * REPLACE (CASE WHEN label IN (0, 1) THEN CAST(label AS INTEGER) ELSE 2 END AS label) FROM {rows})"
    ((n_rows,),) = db.execute(f"COPY {rows} TO '{to}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)").fetchall()
    if label.type == "binary" and db.execute(f"SELECT 1 FROM '{to}' WHERE label = 2 LIMIT 1").fetchone():
        wrong, entity_id = db.execute(f"SELECT label, entity_id FROM ({query}) WHERE label NOT IN (0, 1) LIMIT 1").fetchall()[0]
        raise UnusableDefinition(f"a binary label is 0 or 1 (or false, true); that of '{entity_id}' is {wrong:g}")
    return _digest(db, to), n_rows


def _digest(db: duckdb.DuckDBPyConnection, file: Path) -> str:
    """SHA-256 of a file's rows in their order: of names, types and values, whatever its bytes."""
    names = db.sql(f"FROM '{file}'").columns
    with ThreadPoolExecutor() as threads:  # reading and hashing release the interpreter
        columns = list(threads.map(lambda name: _digest_of_column(db.cursor(), file, name), names))
    return hashlib.sha256("".join(columns).encode()).hexdigest()


def _digest_of_column(db: duckdb.DuckDBPyConnection, file: Path, name: str) -> str:
    """A line of a column's name, type and hashes: of which values there are, of how long the texts are, and of the values."""
    present, sizes, content = (hashlib.sha256() for _ in range(3))
    batches = db.sql(f"""SELECT "{name}" FROM '{file}'""").to_arrow_reader(_BATCH)
    for (column,) in batches:
        present.update(np.asarray(pc.is_valid(column)).astype(np.uint8).tobytes())
        if pa.types.is_string(column.type):
            offsets, text = _texts(pc.fill_null(column, ""))
            sizes.update(np.diff(offsets).astype("<i8").tobytes())
            content.update(text)
        else:
            values = np.asarray(pc.fill_null(column, 0))
            content.update((values + values.dtype.type(0)).tobytes())  # adding 0 makes -0.0 the 0.0 that it equals
    return f"{name} {batches.schema.field(0).type} {present.hexdigest()} {sizes.hexdigest()} {content.hexdigest()}\n"


def _texts(column: pa.StringArray) -> tuple[NDArray[np.int32], memoryview]:
    """Where each text begins and the last ends, and the UTF-8 of all of them in a row."""
    _, offsets, text = column.buffers()
    places = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return places, memoryview(text or b"")[places[0] : places[-1]]
