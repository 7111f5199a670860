"""Online reads over HTTP: one vector from two feature sets, ours beside Feast's Python server, on one Redis and the same rows.

Ours is the service as it is shipped: validated requests, metrics, the age of rows checked, its consumers running. Feast is `feast serve`
in an environment of its own with what makes it fastest here: two workers (gunicorn with uvicorn, uvloop, httptools), hiredis, no access
log, no metrics, workers that are not replaced, a registry that is not read again, and a feature service instead of a list of names.

    same    both feature sets are the account's: one round trip to Redis
    joined  the second is that of the place which the account's row names. We find it out, in a second round trip; Feast must be told it

Rivals take turns: closed loops of 16 and 64 connections, and at last of requests for many entities. At 1,000 requests a second whatever
becomes of them Feast would fall behind; there a server takes turns that does no work (no_work.py): what the machine lets nobody go below.
Of those runs, up to twelve, the three count in which its host gave least of the machine to others (`bench/steal.py`); when three are below
1 %, there are no more. Printed: medians, CPU time per request of the server's processes, each run's requests/s, p99 and share that was
given to others, and the ratios.
"""

import asyncio
import logging
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from bench.scorer.load import Measured, closed_loop, open_loop
from bench.scorer.servers import CACHE, Serving, install
from bench.steal import CALM
from mojomesh_chassis.publishing import Publisher
from mojomesh_chassis.topics import ensure_topics
from mojomesh_contracts.definitions import definition_id, parse_definitions
from mojomesh_contracts.events import DefinitionApplied, EventReceived
from mojomesh_local import ports
from mojomesh_local.kafka import Kafka
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, Cluster, Postgres
from mojomesh_local.processes import Command, Server
from mojomesh_local.redis import Redis
from mojomesh_store import rows
from mojomesh_store.shards import open_feature_store

PINS = ["feast[redis]==0.67.0", "httptools==0.9.0", "uvloop==0.23.0"]
HERE = Path(__file__).parent
FEAST = CACHE / "feast"
N_OF_KIND = 3  # numbers and as many categories a feature set
FEATURES = {name: [f"{name[0]}{kind}{n}" for kind in "nc" for n in range(N_OF_KIND)] for name in ("accounts", "payments", "places")}
KEYS = {"accounts": "account", "payments": "account", "places": "place"}
N_ROWS = 10  # an entity
N_BODIES = 2_000
RATE = 1_000
DEFINITIONS = (
    "\n---\n".join(
        f"kind: FeatureSet\nname: {name}\nentity: {KEYS[name]}\nfeatures: {{"
        + ", ".join(f"{feature}: {{type: {'number' if feature[1] == 'n' else 'category'}}}" for feature in features)
        + ("" if name != "accounts" else ", place: {type: category}")
        + "}"
        for name, features in FEATURES.items()
    )
    + "\n---\nkind: FeatureSet\nname: outcomes\nentity: account\nfeatures: {late: {type: boolean}}"
    + "".join(
        f"""
---
kind: Model
name: {name}
spine: accounts
label: {{feature_set: outcomes, column: late, type: binary}}
features: [{{feature_set: accounts, columns: [{", ".join(FEATURES["accounts"])}]}}, {{feature_set: {second}, max_age: 30d}}]
algorithm: {{name: gbm}}
walk_forward: {{n_windows: 2, train: expanding, test: 15d, step: 15d}}
"""
        for name, second in (("same", "payments"), ("joined", "places, join: place"))
    )
)


@dataclass(frozen=True)
class Extent:
    n_accounts: int
    rounds: int
    seconds: int


def place_of(account: int) -> str:
    return f"place-{account % 500}"


def events_of(extent: Extent) -> Iterator[EventReceived]:
    """Rows of the last hours, in the order of their event times."""
    now = datetime.now(UTC)
    for n in range(N_ROWS):
        for name, features in FEATURES.items():
            for account in range(extent.n_accounts if KEYS[name] == "account" else 500):
                values: dict[str, Any] = {
                    feature: (account * 31 + n * 7 + place) / 8 if feature[1] == "n" else f"level {(account + n + place) % 20}"
                    for place, feature in enumerate(features)
                }
                if name == "accounts":
                    values["place"] = place_of(account)
                at = now - timedelta(hours=N_ROWS - n, microseconds=account)
                entity_id = f"{KEYS[name]}-{account}"
                yield EventReceived(event_id=uuid4(), feature_set=name, entity_id=entity_id, event_time=at, values=values)


async def fill(postgres: str, kafka: str, folder: Path, extent: Extent) -> None:
    """Rows into PostgreSQL, the newest of them into a file a feature set, definitions into Kafka."""
    newest: dict[str, dict[str, EventReceived]] = {name: {} for name in FEATURES}
    async with open_feature_store([postgres]) as store:
        batch: list[EventReceived] = []
        for event in events_of(extent):
            newest[event.feature_set][event.entity_id] = event
            batch.append(event)
            if len(batch) == 5_000:
                await append(store, batch)
                batch = []
        await append(store, batch)
    for name, events in newest.items():
        table = {KEYS[name]: list(events), **{feature: [event.values[feature] for event in events.values()] for feature in FEATURES[name]}}
        pq.write_table(pa.table(table | {"event_time": [event.event_time for event in events.values()]}), folder / f"{name}.parquet")
    publisher = Publisher(kafka)
    documents = [definition.model_dump(mode="json", by_alias=True, exclude_unset=True) for definition in parse_definitions(DEFINITIONS)]
    await publisher.publish(
        [
            DefinitionApplied(event_id=UUID(int=n), definition_id=definition_id(definition), version=1, definition=document)
            for n, (definition, document) in enumerate(zip(parse_definitions(DEFINITIONS), documents, strict=True))
        ]
    )
    await publisher.close()


async def append(store: Any, batch: Sequence[EventReceived]) -> None:
    for shard, part in store.split(batch):
        async with shard.begin() as db:
            await rows.append(db, part)


@contextmanager
def running(server: Server) -> Iterator[int]:
    child = server.start()
    try:
        yield child.pid
    finally:
        child.stop()


@contextmanager
def features(env: dict[str, str], folder: Path) -> Iterator[Serving]:
    port = ports.choose()
    command = Command("features", [sys.executable, "-m", "mojomesh_features"], folder / "features.log", {**env, "FEATURES_PORT": str(port)})
    with running(Server(command, (port,), ready=lambda: ports.says_ok(f"http://127.0.0.1:{port}/health/ready"))) as pid:
        yield Serving("mojomesh", port, pid, "/v1/features:lookup")


@contextmanager
def no_work(folder: Path) -> Iterator[Serving]:
    port = ports.choose()
    command = Command("no work", [sys.executable, str(HERE / "no_work.py"), str(port)], folder / "no_work.log")
    with running(Server(command, (port,), ready=lambda: ports.answers(port))) as pid:
        yield Serving("no work", port, pid)


@contextmanager
def feast(redis: Redis, folder: Path) -> Iterator[Serving]:
    home = folder / "feast"
    home.mkdir()
    store = {"type": "redis", "connection_string": f"127.0.0.1:{redis.port},db=1,password={redis.password}"}
    settings = {"project": "bench", "provider": "local", "registry": "registry.db", "entity_key_serialization_version": 3}
    (home / "feature_store.yaml").write_bytes(orjson.dumps(settings | {"online_store": store, "offline_store": {"type": "dask"}}))
    quiet = {"FEAST_USAGE": "False", "PYTHONWARNINGS": "ignore"}
    files = [folder / f"{name}.parquet" for name in FEATURES]
    subprocess.run([FEAST / "bin" / "python", HERE / "feast_online.py", home, *files], check=True, stdout=subprocess.DEVNULL)
    port = ports.choose()
    argv = [str(FEAST / "bin" / "feast"), "--chdir", str(home), "serve", "--port", str(port), "--no-access-log", "--workers", "2"]
    argv += ["--max-requests", "0", "--max-requests-jitter", "0", "--registry_ttl_sec", "86400"]
    command = Command("feast", argv, folder / "feast.log", quiet)
    with running(Server(command, (port,), ready=lambda: ports.says_ok(f"http://127.0.0.1:{port}/health"))) as pid:
        yield Serving("feast", port, pid, "/get-online-features")


def asked_of(server: Serving, model: str, accounts: Sequence[int]) -> bytes:
    names = [f"account-{account}" for account in accounts]
    if server.name == "feast":
        entities = {"account": names, **({"place": [place_of(account) for account in accounts]} if model == "joined" else {})}
        return orjson.dumps({"feature_service": model, "entities": entities})
    return orjson.dumps({"model": model, "rows": [{"entity_id": name} for name in names]})


def vectors_of(server: Serving, answer: Any) -> list[dict[str, Any]]:
    """The values of each entity by feature."""
    if server.name == "feast":
        columns = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
        columns = {name: column["values"] for name, column in columns.items() if name not in ("account", "place")}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{name.partition(".")[2] or name: value for name, value in row["values"].items()} for row in answer["rows"]]


def check_alike(servers: Sequence[Serving], n_accounts: int) -> int:
    """Ask all for all accounts, which also warms them up; how many vectors were compared.

    Raises:
        AssertionError: They do not answer the same.
    """
    n_compared = 0
    with httpx.Client(timeout=60, trust_env=False) as client:
        for model in ("same", "joined"):
            for first in range(0, n_accounts, 200):
                accounts = range(first, min(n_accounts, first + 200))
                found = []
                for server in servers:
                    reply = client.post(server.url, content=asked_of(server, model, accounts), headers={"Content-Type": "application/json"})
                    assert reply.status_code == 200, reply.text
                    found.append(vectors_of(server, reply.json()))
                assert all(other == found[0] for other in found), (found[0][0], found[1][0])
                assert len(found[0]) == len(accounts) and None not in found[0][0].values()
                n_compared += len(accounts)
    return n_compared


def write_bodies(server: Serving, model: str, n_entities: int, extent: Extent, folder: Path) -> tuple[Path, Path]:
    """Requests for `wrk` (each with a line that it does not use), and for `oha`."""
    n_bodies = max(20, N_BODIES // n_entities)
    asked = [
        asked_of(server, model, [(body * n_entities + n) * 7919 % extent.n_accounts for n in range(n_entities)]) for body in range(n_bodies)
    ]
    requests, bodies = (folder / f"{server.name}-{model}-{n_entities}.{of}" for of in ("wrk", "oha"))
    requests.write_bytes(b"".join(body + b"\n0\n" for body in asked))
    bodies.write_bytes(b"\n".join(asked) + b"\n")
    return requests, bodies


def told(run: Measured) -> str:
    return f"{run.requests_per_s:,.0f}/{run.p99_ms:.2f}/{run.stolen:.1%}"


Loop = Callable[[Serving, Path, int, int], Measured]
"""Of how many connections or requests a second, and for how many seconds."""


def in_turns(loop: Loop, files: dict[Serving, Path], much: int, extent: Extent, most: int) -> dict[str, list[Measured]]:
    """As many runs of each as there are to be rounds: if `most` is more, the calmest of up to so many."""
    runs: dict[str, list[Measured]] = {server.name: [] for server in files}
    for number in range(most):
        for server in files if number % 2 else reversed(files):
            runs[server.name].append(loop(server, files[server], much, extent.seconds))
        if all(sum(run.stolen < CALM for run in found) >= extent.rounds for found in runs.values()):
            break
    if most > extent.rounds:
        print("all runs: " + "; ".join(f"{name} {', '.join(map(told, found))}" for name, found in runs.items()), flush=True)
    return {name: sorted(found, key=lambda run: run.stolen)[: extent.rounds] for name, found in runs.items()}


def show(what: str, runs: dict[str, list[Measured]]) -> None:
    """A line a server, and the ratios."""
    medians = []
    for name, found in runs.items():
        rate, p50, p99, cpu = (
            statistics.median(getattr(run, field) for run in found) for field in ("requests_per_s", "p50_ms", "p99_ms", "cpu_us")
        )
        medians.append((name, rate, p99))
        print(
            f"{what:38}{name:10}{rate:>10,.0f} requests/s   p50 {p50:7.2f}   p99 {p99:7.2f} ms   {cpu:8.1f} us of CPU"
            f"   {sum(run.errors for run in found)} failed   ({', '.join(map(told, found))})",
            flush=True,
        )
    (_, rate, p99), (peer, peer_rate, peer_p99) = medians
    print(f"{'':38}{rate / peer_rate:.1f} x the requests/s of {peer}, {p99 / peer_p99:.3f} x its p99\n", flush=True)


def compare(servers: Sequence[Serving], idle: Serving, extent: Extent, folder: Path) -> None:
    for model in ("same", "joined"):
        files = {server: write_bodies(server, model, 1, extent, folder) for server in servers}
        for connections in (16, 64):
            asked = {server: files[server][0] for server in servers}
            show(f"{model}, {connections} connections", in_turns(closed_loop, asked, connections, extent, most=extent.rounds))
        bodies = {servers[0]: files[servers[0]][1], idle: files[servers[0]][1]}  # Feast would fall behind
        show(f"{model}, {RATE:,} requests/s", in_turns(open_loop, bodies, RATE, extent, most=4 * extent.rounds))
    for n_entities in (1, 10, 100, 1_000):
        runs = {}
        for server in servers:
            requests, _ = write_bodies(server, "same", n_entities, extent, folder)
            runs[server.name] = [closed_loop(server, requests, 4, extent.seconds)]
        show(f"same, {n_entities:,} entities, 4 connections", runs)


def main(quick: bool) -> None:
    """Measure, with `quick` one short round."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    install("feast", PINS)
    extent = Extent(1_000, 1, 3) if quick else Extent(4_000, 3, 8)
    with tempfile.TemporaryDirectory(prefix="mojomesh-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        first = ports.choose(4)
        cluster = Cluster(first, secrets.token_hex(8))
        kafka = Kafka(folder / "kafka", first + 1, folder / "kafka.log")  # and the port after it
        redis = Redis(folder / "redis", first + 3, secrets.token_hex(8), folder / "redis.log")
        for server in (Postgres(folder / "postgres", cluster, folder / "postgres.log").server, kafka.server):
            stack.enter_context(running(server))
        stack.enter_context(running(redis.server))
        asyncio.run(ensure_topics(kafka.bootstrap))
        asyncio.run(migrate_tables([cluster.url(OWNER)]))
        asyncio.run(fill(cluster.url(SERVICE), kafka.bootstrap, folder, extent))
        (folder / "objects").mkdir()
        env = {
            "MOJOMESH_KAFKA": kafka.bootstrap,
            "MOJOMESH_POSTGRES": cluster.url(SERVICE),
            "MOJOMESH_REDIS": redis.url,
            "MOJOMESH_OBJECTS": (folder / "objects").as_uri(),
            "MOJOMESH_TOKEN": secrets.token_hex(16),
            "MOJOMESH_PUBLIC_KEY": str(folder / "none.pem"),
            "FEATURES_WORK_FOLDER": str(folder / "work"),
        }
        servers = [stack.enter_context(features(env, folder)), stack.enter_context(feast(redis, folder))]
        print(f"{check_alike(servers, extent.n_accounts):,} vectors are alike\n", flush=True)
        compare(servers, stack.enter_context(no_work(folder)), extent, folder)
