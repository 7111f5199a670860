"""Runs the benchmark. Results go to docs/benchmarks.md, or with `--quick` only to the terminal."""

import argparse
import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from bench.scorer.blocks import measure_blocks
from bench.scorer.load import closed_loop, grpc_loop, open_loop, require_tools
from bench.scorer.model import N_REQUESTS, Known, know
from bench.scorer.report import OURS, Cell, Results, page
from bench.scorer.servers import Mesh, Serving, make_environments, open_mesh, serving_echo, serving_peer
from bench.scorer.soak import soak
from bench.scorer.stream import measure_stream
from bench.scorer.swaps import measure_swaps
from tests.scorer.making import Scorer

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
PEERS = ("mlserver", "bentoml", "fastapi", "undertow")
RATES = (1000, 5000)


def log(*words: object) -> None:
    print(*words, flush=True)


@asynccontextmanager
async def everybody(mesh: Mesh, known: Known, folder: Path) -> AsyncIterator[tuple[list[Serving], Scorer]]:
    """All servers, ours first."""
    async with AsyncExitStack() as stack:
        ours, scorer = await stack.enter_async_context(mesh.scorer(OURS))
        yield [ours, *(stack.enter_context(serving_peer(peer, known.mojo, folder)) for peer in PEERS)], scorer


async def measure(wanted: argparse.Namespace, known: Known, folder: Path) -> Results:
    results = Results(warm_up_s=wanted.warm_up, run_s=wanted.seconds, rounds=wanted.rounds)
    files = {n_rows: known.write_requests(n_rows, folder / f"{n_rows}.txt") for n_rows in N_REQUESTS}
    bodies = folder / "bodies.txt"
    bodies.write_bytes(b"\n".join(body for body, _ in known.requests(1)) + b"\n")
    cells = [Cell(n_rows, connections) for n_rows in N_REQUESTS for connections in (64, 16, 1)]
    if wanted.quick:
        cells = [Cell(1), Cell(1000)]
    async with open_mesh(folder, known.trained) as mesh:
        async with everybody(mesh, known, folder) as (servers, scorer):
            for server in servers:
                await warm_up(server, sorted({cell.n_rows for cell in cells}), files, wanted.warm_up, results)
            for cell in cells:
                of_cell = results.closed[cell] = {server.name: [] for server in servers}
                for server in turns(servers, wanted.rounds):
                    run = await asyncio.to_thread(closed_loop, server, files[cell.n_rows], cell.connections, wanted.seconds)
                    of_cell[server.name].append(run)
                    log(cell, run)
            for cell in (Cell(1, rate=rate) for rate in RATES):
                measured = servers[:1] if wanted.quick else servers
                of_cell = results.open[cell] = {server.name: [] for server in measured}
                for server in turns(measured, wanted.rounds):
                    run = await asyncio.to_thread(open_loop, server, bodies, cell.rate or 0, wanted.seconds * 2)
                    of_cell[server.name].append(run)
                    log(cell, run)
            results.receipts_dropped = await dropped(scorer)
            with serving_echo(folder) as echo:
                rivals = [Serving(f"{OURS} gRPC", scorer.grpc_port, servers[0].pid), echo]
                request = known.write_grpc_request(folder / "request.bin")
                results.grpc = {server.name: [] for server in rivals}
                for server in rivals:
                    await asyncio.to_thread(grpc_loop, server, request, wanted.warm_up)
                for server in turns(rivals, wanted.rounds):
                    run = await asyncio.to_thread(grpc_loop, server, request, wanted.seconds)
                    results.grpc[server.name].append(run)
                    log(run)
            results.swaps = await measure_swaps(mesh, servers[0], known, bodies, wanted.swaps, before_s=5.0)
            log(results.swaps)
        results.blocks = await asyncio.to_thread(measure_blocks, known, folder, wanted.rounds, wanted.seconds)
        log(results.blocks)
    for number in range(wanted.rounds):  # each on a Kafka of its own, whose topics are empty
        home = folder / f"stream-{number}"
        home.mkdir()
        async with open_mesh(home, known.trained) as mesh:
            results.stream.append(await measure_stream(mesh, known, wanted.messages))
            log(results.stream[-1])
    return results


async def warm_up(server: Serving, sizes: list[int], files: dict[int, Path], seconds: float, results: Results) -> None:
    """Load of each size, every answer compared."""
    checked = wrong = 0
    for n_rows in sizes:
        run = await asyncio.to_thread(closed_loop, server, files[n_rows], 64, seconds, check=True)
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
    require_tools()
    make_environments()
    known = know()
    wanted = argparse.Namespace(quick=False, rounds=3, seconds=6.0, warm_up=5.0, messages=300_000, swaps=10)
    if asked.quick:
        wanted = argparse.Namespace(quick=True, rounds=1, seconds=4.0, warm_up=2.0, messages=60_000, swaps=2)
    with tempfile.TemporaryDirectory(prefix="mojomesh-bench-") as folder:
        if asked.soak:
            asyncio.run(soak(known, Path(folder), asked.soak))
            return
        written = page(asyncio.run(measure(wanted, known, Path(folder))))
    log(written)
    if not asked.quick:
        PAGE.write_text(written)
        log(f"written to {PAGE}")


if __name__ == "__main__":
    main()
