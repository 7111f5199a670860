"""Whether memory grows: one scorer under steady load, the resident memory of each worker over time."""

import asyncio
import time
from pathlib import Path

import numpy as np

from bench.scorer.load import open_loop
from bench.scorer.model import Known
from bench.scorer.servers import open_mesh

RATE = 2000
PART_S = 15.0


async def soak(known: Known, folder: Path, minutes: float) -> None:
    """Print memory four times a minute, and for each worker the slope of a line through the second half, in MB an hour."""
    bodies = folder / "bodies.txt"
    bodies.write_bytes(b"\n".join(body for body, _ in known.requests(1)) + b"\n")
    times: list[float] = []
    memory: list[list[float]] = []
    async with open_mesh(folder / "mesh", known.trained) as mesh, mesh.scorer("soaked") as (serving, scorer):
        started = time.monotonic()
        while time.monotonic() - started < minutes * 60:
            run = await asyncio.to_thread(open_loop, serving, bodies, RATE, PART_S)
            workers = sorted(scorer.workers(), key=lambda worker: worker.pid)
            times.append(time.monotonic() - started)
            memory.append([worker.memory_info().rss / 2**20 for worker in workers])
            print(f"{times[-1]:6.0f} s  {'  '.join(f'{each:7.1f} MB' for each in memory[-1])}  errors {run.errors}", flush=True)
    half = len(times) // 2
    for worker, values in enumerate(np.array(memory).T):
        slope, _ = np.polyfit(times[half:], values[half:], 1)
        print(f"worker {worker}: {slope * 3600:+.1f} MB an hour over the last {times[-1] - times[half]:.0f} s")
