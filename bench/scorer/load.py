"""Load from tools made for it, each in a process of its own: wrk (closed loop), oha (fixed rates), ghz (gRPC)."""

import asyncio
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc as pb_grpc

from bench.scorer.model import Known
from bench.scorer.servers import Serving
from bench.steal import Steal

_HOW = {"wrk": "apt-get install wrk", "oha": "cargo install oha --locked", "ghz": "go install github.com/bojand/ghz/cmd/ghz@latest"}
_LUA = Path(__file__).with_name("infer.lua")
_PROTO = Path(__file__).parents[2] / "services" / "scorer" / "mojomesh_scorer" / "open_inference.proto"


def require_tools(*tools: str) -> None:
    """End with a line per tool that is missing, and how to get it."""
    missing = [f"  {tool} is not installed: {_HOW[tool]}" for tool in tools if shutil.which(tool) is None]
    if missing:
        sys.exit("load generators are needed:\n" + "\n".join(missing))


@dataclass(frozen=True)
class Measured:
    """One run against one server."""

    server: str
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int
    """Answers other than 200, broken connections, time-outs."""
    cpu_us: float
    """CPU time of the server's processes, per request."""
    rss_mb: float
    """Memory of the server's processes at the end."""
    stolen: float
    """Share of this machine's CPU time that its host gave to others."""
    checked: int = 0
    wrong: int = 0


@contextmanager
def _spending(serving: Serving) -> Iterator[dict[str, float]]:
    spent: dict[str, float] = {}
    before, steal = serving.cpu_s(), Steal()
    yield spent
    spent |= {"cpu_s": serving.cpu_s() - before, "rss_mb": serving.rss_mb(), "stolen": steal.share}


def closed_loop(serving: Serving, requests: Path, connections: int, seconds: int, check: bool = False) -> Measured:
    """As many requests as `connections` clients get answered, each asking again at once."""
    argv = [
        "wrk",
        "--connections",
        str(connections),
        "--threads",
        str(min(2, connections)),
        "--duration",
        f"{seconds:g}s",
        "--timeout",
        "30s",
    ]
    argv += ["--script", str(_LUA), serving.url, "--", str(requests), *(["check"] if check else [])]
    with _spending(serving) as spent:
        found = json.loads(_output_of(argv).splitlines()[-1])
    return Measured(
        serving.name,
        found["requests"] / found["seconds"],
        found["p50_ms"],
        found["p99_ms"],
        found["not_ok"] + found["broken"] + found["timeouts"],
        spent["cpu_s"] / max(1, found["requests"]) * 1e6,
        spent["rss_mb"],
        spent["stolen"],
        found["checked"],
        found["wrong"],
    )


def open_loop(serving: Serving, bodies: Path, rate: int, seconds: float) -> Measured:
    """`rate` requests a second whatever becomes of them, over 64 connections; times count from when a request was due."""
    argv = ["oha", "-c", "64", "-q", str(rate), "-z", f"{seconds:g}s", "--latency-correction", "--no-tui", "--output-format", "json"]
    argv += ["-m", "POST", "-T", "application/json", "-Z", str(bodies), serving.url]
    with _spending(serving) as spent:
        found = json.loads(_output_of(argv))
    n_answers = sum(found["statusCodeDistribution"].values())
    not_ok = n_answers - found["statusCodeDistribution"].get("200", 0)
    # What was still due when the time was over is no error.
    broken = sum(n for reason, n in found["errorDistribution"].items() if reason != "aborted due to deadline")
    return Measured(
        serving.name,
        found["summary"]["requestsPerSec"],
        found["latencyPercentiles"]["p50"] * 1000,
        found["latencyPercentiles"]["p99"] * 1000,
        not_ok + broken,
        spent["cpu_s"] / max(1, n_answers) * 1e6,
        spent["rss_mb"],
        spent["stolen"],
    )


@asynccontextmanager
async def steady_load(serving: Serving, bodies: Path, rate: int, table: Path) -> AsyncIterator[float]:
    """Load at a fixed rate meanwhile, after which `table` holds a line a request. Yields when it began, seconds since the epoch."""
    argv = ["-c", "64", "-q", str(rate), "-z", "1h", "--latency-correction", "--no-tui", "--output-format", "csv", "-o", str(table)]
    argv += ["-m", "POST", "-T", "application/json", "-Z", str(bodies), serving.url]
    process = await asyncio.create_subprocess_exec("oha", *argv)
    try:
        yield time.time()
    finally:
        process.send_signal(signal.SIGINT)  # it then writes what it has
        await process.wait()


def grpc_loop(serving: Serving, request: Path, seconds: float) -> Measured:
    """ModelInfer over 16 channels with 64 calls in flight; `serving.port` is that of gRPC."""
    argv = [
        "ghz",
        "--insecure",
        "--proto",
        str(_PROTO),
        "--call",
        "inference.GRPCInferenceService.ModelInfer",
        "--binary-file",
        str(request),
    ]
    argv += ["--connections", "16", "--concurrency", "64", "--duration", f"{seconds:g}s", "--duration-stop", "wait", "--format", "json"]
    with _spending(serving) as spent:
        started = time.perf_counter()
        found = json.loads(_output_of([*argv, f"127.0.0.1:{serving.port}"]))
    n_ok = found["statusCodeDistribution"].get("OK", 0)
    assert time.perf_counter() - started >= seconds
    percentiles = {each["percentage"]: each["latency"] / 1e6 for each in found["latencyDistribution"]}
    return Measured(
        serving.name,
        found["rps"],
        percentiles[50],
        percentiles[99],
        found["count"] - n_ok,
        spent["cpu_s"] / max(1, found["count"]) * 1e6,
        spent["rss_mb"],
        spent["stolen"],
    )


async def compare_grpc(serving: Serving, known: Known, seconds: float) -> tuple[int, int]:
    """Ask for one row after the other; how many answers were compared with genmodel's score, and how many were another."""
    checked = wrong = 0
    give_up = time.monotonic() + seconds
    async with grpc.aio.insecure_channel(f"127.0.0.1:{serving.port}") as channel:
        infer = pb_grpc.GRPCInferenceServiceStub(channel).ModelInfer
        while time.monotonic() < give_up:
            place = checked % len(known.scores)
            reply = await infer(known.grpc_request(place))
            checked += 1
            wrong += struct.unpack("<d", reply.raw_output_contents[0])[0] != known.scores[place]
    return checked, wrong


def _output_of(argv: list[str]) -> Any:
    made = subprocess.run(argv, capture_output=True, text=True, check=False)
    if made.returncode or not made.stdout:
        sys.exit(f"{' '.join(argv)} failed:\n{made.stdout}{made.stderr}")
    return made.stdout
