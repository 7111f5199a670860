"""Runs the benchmark. Results go into docs/benchmarks.md, between two marks, or with `--quick` only to the terminal."""

import argparse
import asyncio
import logging
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.scorer.blocks import measure_blocks
from bench.scorer.deaths import measure_deaths
from bench.scorer.load import closed_loop, compare_grpc, grpc_loop, open_loop, require_tools
from bench.scorer.model import N_REQUESTS, Known, know
from bench.scorer.report import OURS, WITHOUT_RECEIPTS, Cell, Results, page
from bench.scorer.servers import Mesh, Serving, make_environments, open_mesh, serving_echo, serving_peer
from bench.scorer.soak import soak
from bench.scorer.stream import measure_stream
from bench.scorer.swaps import measure_swaps
from tests.scorer.making import Scorer

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- by make bench-scorer -->", "<!-- /by make bench-scorer -->"
PEERS = ("mlserver", "bentoml", "fastapi", "undertow")
RATES = (1000, 5000)


def log(*words: object) -> None:
    print(*words, flush=True)


@dataclass(frozen=True)
class Extent:
    """How much is measured, and for how long."""

    cells: list[Cell]
    rates_of_peers: bool
    rounds: int
    seconds: int
    warm_up: int
    messages: int
    swaps: int
    deaths: int


QUICK = Extent([Cell(1), Cell(1000)], rates_of_peers=False, rounds=1, seconds=4, warm_up=2, messages=60_000, swaps=2, deaths=2)
WHOLE = Extent(
    [Cell(n_rows, connections) for n_rows in N_REQUESTS for connections in (64, 16, 1)],
    rates_of_peers=True,
    rounds=3,
    seconds=5,
    warm_up=5,
    messages=300_000,
    swaps=10,
    deaths=6,
)


async def measure(extent: Extent, known: Known, folder: Path) -> Results:
    """All that is measured, in one run."""
    bodies = folder / "bodies.txt"
    bodies.write_bytes(b"\n".join(body for body, _ in known.requests(1)) + b"\n")
    blocks = await asyncio.to_thread(measure_blocks, known, folder, extent.rounds, extent.seconds)
    log(blocks)
    stream = []
    for number in range(extent.rounds):  # each on a Kafka of its own, whose topics are empty
        async with open_mesh(folder / f"stream-{number}", known.trained) as mesh:
            stream.append(await measure_stream(mesh, known, extent.messages))
            log(stream[-1])
    async with open_mesh(folder / "mesh", known.trained) as mesh:
        async with mesh.scorer("alone") as (serving, scorer):
            swaps = await measure_swaps(mesh, serving, known, bodies, extent.swaps, before_s=5.0)
            log(swaps)
            deaths = await measure_deaths(mesh, serving, scorer, known, bodies, extent.deaths)
            log(deaths)
            results = Results(extent.warm_up, extent.seconds, extent.rounds, blocks, stream, swaps, deaths)
            await measure_grpc(serving, scorer, known, extent, folder, results)
        await measure_http(mesh, known, extent, bodies, results)
    return results


async def measure_grpc(serving: Serving, scorer: Scorer, known: Known, extent: Extent, folder: Path, results: Results) -> None:
    """gRPC beside a server that does nothing; while both warm up, answers of ours are compared."""
    request = known.write_grpc_request(folder / "request.bin")
    with serving_echo(folder) as echo:
        rivals = [Serving(f"{OURS} gRPC", scorer.grpc_port, serving.pid), echo]
        warming = asyncio.to_thread(grpc_loop, rivals[0], request, extent.warm_up)
        _, results.checked[rivals[0].name] = await asyncio.gather(warming, compare_grpc(rivals[0], known, extent.warm_up))
        await asyncio.to_thread(grpc_loop, echo, request, extent.warm_up)
        results.grpc = {server.name: [] for server in rivals}
        for server in turns(rivals, extent.rounds):
            run = await asyncio.to_thread(grpc_loop, server, request, extent.seconds)
            results.grpc[server.name].append(run)
            log(run)


async def measure_http(mesh: Mesh, known: Known, extent: Extent, bodies: Path, results: Results) -> None:
    """This scorer, with receipts and without, and its peers, in turns."""
    files = {cell.n_rows: known.write_requests(cell.n_rows, mesh.folder / f"{cell.n_rows}.txt") for cell in extent.cells}
    async with AsyncExitStack() as stack:
        ours, scorer = await stack.enter_async_context(mesh.scorer(OURS))
        without, _ = await stack.enter_async_context(mesh.scorer(WITHOUT_RECEIPTS, SCORER_RECEIPTS_WAITING="0", MOJOMESH_REPLICA="1"))
        servers = [ours, without, *(stack.enter_context(serving_peer(peer, known.mojo, mesh.folder)) for peer in PEERS)]
        for server in servers:
            await warm_up(server, files, extent.warm_up, results)
        for cell in extent.cells:
            of_cell = results.closed[cell] = {server.name: [] for server in servers}
            for server in turns(servers, extent.rounds):
                run = await asyncio.to_thread(closed_loop, server, files[cell.n_rows], cell.connections, extent.seconds)
                of_cell[server.name].append(run)
                log(cell, run)
        for rate in RATES:
            measured = servers if extent.rates_of_peers else [ours]
            of_cell = results.open[Cell(1, rate=rate)] = {server.name: [] for server in measured}
            for server in turns(measured, extent.rounds):
                run = await asyncio.to_thread(open_loop, server, bodies, rate, extent.seconds * 2)
                of_cell[server.name].append(run)
                log(rate, run)
        results.receipts_dropped = await dropped(scorer)


async def warm_up(server: Serving, files: dict[int, Path], seconds: int, results: Results) -> None:
    """Load of each size, every answer compared."""
    checked = wrong = 0
    for n_rows, requests in files.items():
        run = await asyncio.to_thread(closed_loop, server, requests, 64, seconds, check=True)
        checked, wrong = checked + run.checked, wrong + run.wrong
        log("warm-up:", n_rows, "rows a request,", run)
    results.checked[server.name] = checked, wrong


def turns(servers: list[Serving], rounds: int) -> list[Serving]:
    """Each server once a round, in another order each time."""
    return [servers[(turn + number) % len(servers)] for number in range(rounds) for turn in range(len(servers))]


async def dropped(scorer: Scorer) -> int:
    """Receipts that Kafka did not take."""
    metrics = (await scorer.admin.get("/metrics")).text.splitlines()
    return sum(int(float(line.split()[-1])) for line in metrics if line.startswith("mojomesh_scorer_receipts_dropped_total"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-scorer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round of the main figures, under three minutes; writes no page")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="only load one scorer for so long, and print how its memory grows")
    asked = parser.parse_args()
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # new topics have no leader for a moment
    require_tools("wrk", "oha", "ghz")
    make_environments()
    known = know()
    with tempfile.TemporaryDirectory(prefix="mojomesh-bench-") as folder:
        if asked.soak:
            asyncio.run(soak(known, Path(folder), asked.soak))
            return
        written = page(asyncio.run(measure(QUICK if asked.quick else WHOLE, known, Path(folder))))
    log(written)
    if not asked.quick:
        before, _, after = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{written}\n{END}{after.partition(END)[2]}")
        log(f"written to {PAGE}")


if __name__ == "__main__":
    main()
