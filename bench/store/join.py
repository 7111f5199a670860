"""Sealing and point-in-time joins, on a PostgreSQL of its own, against other ways in the same run.

Joined: a spine of n rows with its labels and two feature sets of 5 n rows each (12 values, 1 % corrections, text keys; one set by the
spine's own entity, one by a column), 1 % of all rows not sealed yet; Parquet out. Rivals take turns, each time in a process of its own:

    ours        Snapshots.take: segments and the unsealed tail, sorted, with its digest and the copy into the object store
    by row      the same with `known_at: row`
    bare        one DuckDB query of chained ASOF joins over one sorted Parquet file a set, unsorted and without a digest
    row_number  the same after a row_number() has removed corrected rows
    feast       Feast's offline join (file source) in an environment of its own, within `PATIENCE_S` and the memory of feast_join.py
    lateral     LATERAL joins in PostgreSQL itself, its index for such reads in place, rows sent to a client, not written as Parquet; of
                `ASKED` rows of the spine

What is sealed is also read by others, which neither sort it nor look for what has no column:

    received    taken from PostgreSQL by ADBC over one connection, in batches of its own size, and dropped
    from_json   taken by ADBC, written as Parquet by DuckDB with its from_json
    orjson      a part of it, taken by asyncpg and written as Parquet with orjson and pyarrow

Printed as Markdown: seconds of each time, those of CPU in the process that joins or seals (the median, which tells more than the clock on a
machine that is not idle), rows a second (the median), the process's peak memory, the share of the machine's time that its host gave to
others meanwhile (`bench/steal.py`); then what ours is to each, with the goals.
"""

import asyncio
import json
import os
import resource
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import duckdb
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from adbc_driver_postgresql import dbapi

from bench.steal import Steal
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.objects import open_objects
from mojomesh_contracts.definitions import parse_definitions
from mojomesh_features.sealing import Sealer
from mojomesh_features.segments import DUCKDB_TYPES, KEYS, Extent, columns_of, duckdb_config, json_shape, write_segment
from mojomesh_features.snapshots import Snapshots, label_of
from mojomesh_local import ports
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import DATABASE, OWNER, SERVICE, Cluster, Postgres
from mojomesh_store.shards import open_feature_store
from mojomesh_store.vectors import plan_of

MEMORY = "4GiB"
FEAST = "feast==0.67.0"
PATIENCE_S = 240.0  # with Feast, at each size
SETTLE_S = 4.0  # before each turn: a virtual machine has given back by then what the one before it freed, so that all find memory alike
ASKED = 50_000
SEALING = "300,000"  # rows a second
GOALS = {
    "accounts": SEALING,
    "places": SEALING,
    "bare": "0.85",
    "row_number": "2",
    "by row": "at most 2",
    "feast": "50",
    "ten times": "at most 11",
}
INDEXES = ("feature_rows_as_of", "feature_rows_values")
PARSED, AT_A_TIME = 500_000, 10_000  # rows, by orjson
SEALED = f'{", ".join(KEYS)}, "values"'
VALUES = [*(f"number_{n}" for n in range(8)), *(f"category_{n}" for n in range(4))]
KEY_TYPES = (pa.string(), *(pa.timestamp("us", "UTC") for _ in range(3)), pa.int64(), pa.string())
VALUE_TYPES = {"number": pa.float64(), "category": pa.string(), "boolean": pa.bool_()}
USED = ("number_0", "number_1", "number_2", "category_0")

DEFINITIONS = """
kind: FeatureSet
name: trips-N
entity: account
features: {place: {type: category}, distance: {type: number}, hour: {type: number}}
---
kind: FeatureSet
name: outcomes-N
entity: account
features: {late: {type: boolean}}
---
kind: FeatureSet
name: accounts-N
entity: account
features: {VALUES}
---
kind: FeatureSet
name: places-N
entity: place
features: {VALUES}
---
kind: Model
name: late-N
spine: trips-N
label: {feature_set: outcomes-N, column: late, type: binary}
features:
  - {feature_set: trips-N, columns: [distance, hour]}
  - {feature_set: accounts-N, columns: [USED]}
  - {feature_set: places-N, join: place, columns: [USED]}
algorithm: {name: gbm}
walk_forward: {n_windows: 2, train: expanding, test: 15d, step: 15d}
"""

# Row i of n happened at its share of 90 days; every hundredth is corrected by a row that came in later.
LOAD = """
    INSERT INTO store.feature_rows (feature_set, entity_id, event_time, reported_at, created_at, event_id, "values")
    SELECT $1, ENTITY, '2025-01-01Z'::timestamptz + i * (interval '90 days' / $2::int),
        '2025-01-01Z'::timestamptz + i * (interval '90 days' / $2::int) + (hashint4(i) & 1023) * interval '1 second',
        now() - LASTS * 2 + (i - $3::int) * (LASTS / ($4::int - $3::int + 1)) + CORRECTED, gen_random_uuid(), VECTOR
    FROM generate_series($3::int, $4::int, STEP) AS i
"""
VECTOR = "jsonb_build_object({})".format(  # numbers of 17 digits
    ", ".join(f"'{name}', " + ("random()" if name.startswith("n") else f"'level ' || (i + {n}) % 20") for n, name in enumerate(VALUES))
)
ACCOUNT = "'account-' || (hashint4(i * 7) & 2147483647) % greatest($2::int / 50, 1)"
TRIP = ACCOUNT.replace("$2::int / 50", "$2::int / 10")
SETS = {
    "trips": (1, TRIP, "jsonb_build_object('place', 'place-' || i % greatest($2::int / 10, 1), 'distance', i % 5000, 'hour', i % 24)"),
    "outcomes": (1, TRIP, "jsonb_build_object('late', i % 3 = 0)"),
    "accounts": (5, ACCOUNT, VECTOR),
    "places": (5, ACCOUNT.replace("account-", "place-"), VECTOR),
}


def definitions_of(n: int, *only: str) -> Definitions:
    values = ", ".join(f"{name}: {{type: {name.split('_')[0]}}}" for name in VALUES)
    text = DEFINITIONS.replace("VALUES", values).replace("USED", ", ".join(USED)).replace("-N", f"-{n}")
    return Definitions(*(d for d in parse_definitions(text) if not only or d.name in only))


def columns_in(feature_set: str) -> dict[str, str]:
    """The columns that its rows are sealed into, with their types."""
    return columns_of(definitions_of(int(feature_set.split("-")[1])).feature_set(feature_set).features)


async def load(url: str, n: int, part: tuple[float, float], lasts: str) -> None:
    """Store a part of the rows of scale `n`, as if they had come in over the time `lasts`."""
    connection = await asyncpg.connect(url)
    for name, (factor, entity, vector) in SETS.items():
        await connection.execute("SELECT store.add_partitions($1, 0)", f"{name}-{n}")  # as features does, once a set is defined
        rows = factor * n
        bounds = int(part[0] * rows) + 1, int(part[1] * rows)
        sql = LOAD.replace("ENTITY", entity).replace("VECTOR", vector).replace("LASTS", f"interval '{lasts}'")
        await connection.execute(sql.replace("STEP", "1").replace("CORRECTED", "interval '0'"), f"{name}-{n}", rows, *bounds)
        corrected = sql.replace("STEP", "100").replace("CORRECTED", f"interval '{lasts}' / 2")
        await connection.execute(corrected, f"{name}-{n}", rows, *bounds)
    await connection.execute("VACUUM (ANALYZE) store.feature_rows")  # as autovacuum does, which a load in one go outruns
    await connection.close()


@contextmanager
def a_database(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(ports.choose(), secrets.token_hex(8))
    server = Postgres(folder / "postgres", cluster, folder / "postgres.log").server.start()
    try:
        asyncio.run(migrate_tables([cluster.url(OWNER)]))
        yield cluster
    finally:
        server.stop()


def write_out(cluster: Cluster) -> None:
    """Have everything on disk that was loaded, so that nobody is still writing it while others are timed."""
    cluster.execute("CHECKPOINT")
    os.sync()


# What the children do: each prints its result as JSON.


async def seal(url: str, folder: Path, *names: str) -> dict[str, Any]:
    async with open_feature_store([url]) as store:
        sealer = Sealer(store, [url], open_objects((folder / "objects").as_uri()), folder / "work", MEMORY)
        definitions = definitions_of(int(names[0].split("-")[1]), *names)
        began = time.perf_counter()
        sealed = await sealer.seal(definitions)
        return {"rows": sum(segment.n_rows for segment in sealed), "s": time.perf_counter() - began}


async def ours(url: str, folder: Path, n: int, known_at: str) -> dict[str, Any]:
    definitions = definitions_of(n)
    model = definitions.model(f"late-{n}").model_copy(update={"known_at": known_at})
    async with open_feature_store([url]) as store:
        snapshots = Snapshots(store, [url], open_objects((folder / "objects").as_uri()), folder / "work", MEMORY)
        at = await store.pass_snapshot()
        began = time.perf_counter()
        taken = await snapshots.take(plan_of(model, definitions), label_of(model.label, definitions), at)
        return {"rows": taken.n_rows, "s": time.perf_counter() - began}


@contextmanager
def arriving(url: str, feature_set: str) -> Iterator[pa.RecordBatchReader]:
    with dbapi.connect(url) as shard, closing(shard.cursor()) as cursor:
        cursor.execute(f"SELECT {SEALED} FROM store.feature_rows WHERE feature_set = '{feature_set}'")
        yield cursor.fetch_record_batch()


def received(url: str, feature_set: str) -> dict[str, Any]:
    began = time.perf_counter()
    with arriving(url, feature_set) as batches:
        rows = sum(batch.num_rows for batch in batches)
        return {"rows": rows, "s": time.perf_counter() - began}


def by_from_json(url: str, folder: Path, feature_set: str) -> dict[str, Any]:
    shape = json_shape({name: DUCKDB_TYPES[kind] for name, kind in columns_in(feature_set).items()})
    out = folder / "from_json.parquet"
    began = time.perf_counter()
    with arriving(url, feature_set) as batches, duckdb.connect(config=duckdb_config(MEMORY, folder)) as db:
        db.register("arriving", batches)
        ((rows,),) = db.execute(f"""
            COPY (SELECT * EXCLUDE "values", unnest(from_json("values", '{shape}')) FROM arriving)
            TO '{out}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)
        """).fetchall()
    return {"rows": rows, "s": time.perf_counter() - began}


async def by_orjson(url: str, folder: Path, feature_set: str) -> dict[str, Any]:
    columns = columns_in(feature_set)
    schema = pa.schema([*zip(KEYS, KEY_TYPES, strict=True), *((name, VALUE_TYPES[kind]) for name, kind in columns.items())])
    rows = 0
    began = time.perf_counter()
    connection = await asyncpg.connect(url)
    with pq.ParquetWriter(folder / "orjson.parquet", schema, compression="zstd", compression_level=1) as file:
        async with connection.transaction():
            cursor = await connection.cursor(f"SELECT {SEALED} FROM store.feature_rows WHERE feature_set = $1 LIMIT {PARSED}", feature_set)
            while found := await cursor.fetch(AT_A_TIME):
                *keys, event_ids, texts = zip(*found, strict=True)
                vectors = [orjson.loads(text) for text in texts]
                values = ([vector.get(name) for vector in vectors] for name in columns)
                file.write_table(pa.table([*map(list, keys), [str(event_id) for event_id in event_ids], *values], schema))
                rows += len(found)
    await connection.close()
    return {"rows": rows, "s": time.perf_counter() - began}


def bare(folder: Path, n: int, corrected: str) -> dict[str, Any]:
    """`corrected`: of the spine the last versions, rows to join instead of a file's, and the order of an entity's rows."""
    numbered = "row_number() OVER (PARTITION BY entity_id, event_time ORDER BY created_at DESC, seq DESC) = 1"
    spine, rows, order, last = {
        "bare": (
            "lead(true) OVER (PARTITION BY entity_id, event_time ORDER BY created_at, seq) IS NULL",
            "'{}'",
            "epoch_us({0}event_time)::HUGEINT * 9223372036854775808 + epoch_us({0}created_at)",
            " + 9223372036854775807",
        ),
        "row_number": (numbered, f"(FROM '{{}}' QUALIFY {numbered})", "epoch_us({0}event_time)", ""),
    }[corrected]
    table = {name: rows.format(folder / f"{name}-{n}.parquet") for name in SETS}
    at = f"{order.format('').replace('epoch_us(created_at)', '0')}{last}"
    first = order.format("").replace("epoch_us(created_at)", "(9223372036854775807 - epoch_us(created_at))")
    used = ", ".join(f"{name}.{column} AS {name}_{column}" for name in ("accounts", "places") for column in USED)
    query = f"""
        SELECT spine.entity_id, spine.event_time, outcome.event_time AS label_time, late::INTEGER AS label, distance, hour, {used}
        FROM (
            SELECT *, {at} AS at, {order.format("").replace("epoch_us(created_at)", "0")} AS since
            FROM (FROM '{folder / f"trips-{n}.parquet"}' QUALIFY {spine})
        ) AS spine
        ASOF JOIN (SELECT *, {first} AS place FROM {table["outcomes"]}) AS outcome
            ON spine.entity_id = outcome.entity_id AND spine.since <= outcome.place
        ASOF LEFT JOIN (SELECT *, {order.format("")} AS place FROM {table["accounts"]}) AS accounts
            ON spine.entity_id = accounts.entity_id AND spine.at >= accounts.place
        ASOF LEFT JOIN (SELECT *, {order.format("")} AS place FROM {table["places"]}) AS places
            ON spine.place = places.entity_id AND spine.at >= places.place
        WHERE late IS NOT NULL
    """
    out = folder / "bare.parquet"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as spill, duckdb.connect(config=duckdb_config(MEMORY, Path(spill))) as db:
        ((rows_out,),) = db.execute(f"COPY ({query}) TO '{out}' (FORMAT parquet, COMPRESSION zstd)").fetchall()
    spent = time.perf_counter() - began
    return {"rows": rows_out, "s": spent}


def export(url: str, folder: Path, n: int) -> None:
    """One sorted file a set, of all its rows: what the bare queries and Feast read."""
    config = duckdb_config(MEMORY, folder)
    for name in SETS:
        feature_set = f"{name}-{n}"
        write_segment(url, Extent(feature_set, None, datetime.now(UTC)), columns_in(feature_set), folder / f"{name}-{n}.parquet", config)


def child(folder: Path, *arguments: str) -> dict[str, Any]:
    return answer_of([sys.executable, "-m", "bench.store.join", "--child", str(folder), *arguments])


def answer_of(argv: list[str], patience_s: float | None = None) -> dict[str, Any]:
    """What a process says at its end, and what the machine was not given meanwhile."""
    steal = Steal()
    done = subprocess.run(argv, stdout=subprocess.PIPE, timeout=patience_s, check=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer | {"stolen": steal.share}


def act(folder: Path, what: str, *arguments: str) -> None:
    """A child's life."""
    before = time.process_time()
    if what == "seal":
        result = asyncio.run(seal(arguments[0], folder, *arguments[1:]))
    elif what == "ours":
        result = asyncio.run(ours(arguments[0], folder, int(arguments[1]), arguments[2]))
    elif what == "received":
        result = received(*arguments)
    elif what == "from_json":
        result = by_from_json(arguments[0], folder, arguments[1])
    elif what == "orjson":
        result = asyncio.run(by_orjson(arguments[0], folder, arguments[1]))
    elif what == "lateral":
        result = asyncio.run(lateral(arguments[0], int(arguments[1])))
    else:
        result = bare(folder, int(arguments[1]), arguments[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps(result | {"gb": used.ru_maxrss / 1e6, "cpu_s": used.ru_utime + used.ru_stime - before}))


def feast(folder: Path, n: int) -> dict[str, Any] | None:
    """Feast's own join, in an environment of its own; None if it does not end in time or in memory."""
    home = Path(tempfile.gettempdir()) / f"mojomesh-bench-{FEAST}"
    if not (home / "ready").exists():
        venv.create(home, with_pip=True)
        subprocess.run([home / "bin" / "pip", "install", "--quiet", FEAST], check=True)
        (home / "ready").touch()
    script = Path(__file__).with_name("feast_join.py")
    try:
        return answer_of([str(home / "bin" / "python"), str(script), str(folder), str(n), *USED], PATIENCE_S)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None


async def lateral(url: str, n: int) -> dict[str, Any]:
    """The same join by PostgreSQL, of some of the spine."""
    joins, used = "", ""
    for name, key in (("accounts", "spine.entity_id"), ("places", "spine.vector->>'place'")):
        used += "".join(f", {name}.vector->>'{column}'" for column in USED)
        joins += f"""
            LEFT JOIN LATERAL (
                SELECT "values" AS vector FROM store.feature_rows
                WHERE feature_set = '{name}-{n}' AND entity_id = {key} AND event_time <= spine.event_time
                ORDER BY event_time DESC, created_at DESC, seq DESC LIMIT 1
            ) AS {name} ON true
        """
    query = f"""
        SELECT spine.entity_id, spine.event_time, outcomes.event_time, outcomes.vector->>'late', spine.vector->>'distance',
            spine.vector->>'hour'{used}
        FROM (
            SELECT DISTINCT ON (entity_id, event_time) entity_id, event_time, "values" AS vector FROM store.feature_rows
            WHERE feature_set = 'trips-{n}' AND event_time < (
                SELECT max(event_time) FROM (
                    SELECT event_time FROM store.feature_rows WHERE feature_set = 'trips-{n}' ORDER BY event_time LIMIT {ASKED}
                ) AS first
            )
            ORDER BY entity_id, event_time, created_at DESC, seq DESC
        ) AS spine
        JOIN LATERAL (
            SELECT event_time, "values" AS vector FROM store.feature_rows
            WHERE feature_set = 'outcomes-{n}' AND entity_id = spine.entity_id AND event_time >= spine.event_time
            ORDER BY event_time, created_at DESC, seq DESC LIMIT 1
        ) AS outcomes ON true {joins}
    """
    connection = await asyncpg.connect(url)
    began = time.perf_counter()
    copied = await connection.copy_from_query(query, output=os.devnull, format="binary")
    spent = time.perf_counter() - began
    await connection.close()
    return {"rows": int(copied.removeprefix("COPY ")), "s": spent}


def show(what: str, n: int, results: list[dict[str, Any]]) -> tuple[float, float]:
    """A line of the table; rows a second, and rows a second of CPU, each the median."""
    rates = [statistics.median(result["rows"] / result[spent] for result in results) for spent in ("s", "cpu_s")]
    spent = ", ".join(f"{result['s']:.2f}" for result in results)
    cpu_s, gb = statistics.median(result["cpu_s"] for result in results), max(result["gb"] for result in results)
    stolen = ", ".join(f"{result['stolen']:.0%}" for result in results)
    print(f"| {what} | {n:,} | {spent} | {cpu_s:.2f} | {rates[0]:,.0f} | {gb:.1f} GB | {stolen} |", flush=True)
    return rates[0], rates[1]


def goal(name: str) -> str:
    return f" (goal {GOALS[name]})" if name in GOALS else ""


def main(quick: bool) -> None:
    """Measure, with `quick` a tenth of it in one round."""
    scales = [1_000, 10_000, 100_000] if quick else [10_000, 100_000, 300_000, 1_000_000]
    told: list[str] = []
    took: dict[int, float] = {}
    print(f"DuckDB {duckdb.__version__} with {MEMORY}\n")
    print("| | rows | seconds | CPU s | rows/s | memory | stolen |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="mojomesh-bench-") as name, a_database(folder := Path(name)) as cluster:
        (folder / "objects").mkdir()
        url = cluster.url(SERVICE)
        asyncio.run(change_indexes(cluster.url(OWNER), *(f"DROP INDEX store.{index}" for index in INDEXES)))
        for n in scales:
            asyncio.run(load(cluster.url(OWNER), n, (0, 0.99), "1 hour"))
            write_out(cluster)
            rounds = 3 if n == max(scales) and not quick else 1
            told += [sealing(cluster, folder, name, n, rounds if name in GOALS else 1) for name in SETS]
            time.sleep(2)  # the tail comes in after what is sealed
            asyncio.run(load(cluster.url(OWNER), n, (0.99, 1), "1 second"))
            export(url, folder, n)
            write_out(cluster)
            took[n] = join(url, folder, n, rounds, told)
            if n // 10 in took:
                told.append(f"{n:,} spine rows took {took[n] / took[n // 10]:.1f} x the time of a tenth of them{goal('ten times')}")
        asyncio.run(change_indexes(cluster.url(OWNER), AS_OF))
        for n in scales:
            rate, _ = show("lateral", n, [child(folder, "lateral", url, str(n))])
            told.append(f"{n:,} spine rows: ours is {n / took[n] / rate:.1f} x lateral")
    print("\n" + "\n".join(f"- {line}" for line in told))


def sealing(cluster: Cluster, folder: Path, name: str, n: int, rounds: int) -> str:
    """How fast a feature set is sealed, in turns with others who read it."""
    ways = ("seal", "received", "from_json", "orjson")
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        cluster.execute(f"DELETE FROM store.segments WHERE feature_set = '{name}-{n}'", DATABASE)
        shutil.rmtree(folder / "objects" / "segments" / f"{name}-{n}", ignore_errors=True)
        for way in ways:
            time.sleep(SETTLE_S)
            results[way].append(child(folder, way, cluster.url(SERVICE), f"{name}-{n}"))
    rate, *others = [show(f"{name}: {way}", SETS[name][0] * n, found)[0] for way, found in results.items()]
    ratios = ", ".join(f"{rate / other:.2f} x {way}" for way, other in zip(ways[1:], others, strict=True))
    return f"{SETS[name][0] * n:,} rows of {name} are sealed at {rate:,.0f} rows/s{goal(name)}, {ratios}"


def join(url: str, folder: Path, n: int, rounds: int, told: list[str]) -> float:
    """The rivals in turns, and what ours is to each; seconds of ours."""
    ways = {
        "ours": ("ours", url, str(n), "snapshot"),
        "bare": ("bare", "bare", str(n)),
        "row_number": ("bare", "row_number", str(n)),
        "by row": ("ours", url, str(n), "row"),
    }
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, arguments in ways.items():
            time.sleep(SETTLE_S)
            results[way].append(child(folder, *arguments))
    rates = {way: show(way, n, found) for way, found in results.items()}
    assert len({found[0]["rows"] for found in results.values()}) == 1, "they do not answer the same"
    if (feasts := feast(folder, n)) is None:
        print(f"| feast | {n:,} | not within {PATIENCE_S:.0f} s and its memory | | | | |", flush=True)
    else:
        rates["feast"] = show("feast", n, [feasts])
    for way, rate in rates.items():
        if way != "ours":
            clock, cpu = (mine / other for mine, other in zip(rates["ours"], rate, strict=True))
            told.append(f"{n:,} spine rows: ours is {clock:.2f} x {way}{goal(way)}, {cpu:.2f} x by CPU")
    seconds: float = statistics.median(result["s"] for result in results["ours"])
    return seconds


AS_OF = """
    CREATE INDEX feature_rows_as_of ON store.feature_rows (feature_set, entity_id, event_time DESC, created_at DESC, seq DESC);
    ANALYZE store.feature_rows
"""


async def change_indexes(owner: str, *statements: str) -> None:
    """Neither sealing nor snapshots use them; without, loading takes less time."""
    connection = await asyncpg.connect(owner)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        act(Path(sys.argv[2]), *sys.argv[3:])
