"""Runs the parts of the benchmark, each on servers of its own, one after the other."""

import argparse
import os
import platform

import psutil

from bench.scorer.load import require_tools
from bench.store import freshness, ingest, join, online

PARTS = {"ingest": ingest.main, "freshness": freshness.main, "online": online.main, "join": join.main}

parser = argparse.ArgumentParser(prog="make bench-store ARGS=...")
parser.add_argument("--quick", action="store_true", help="a tenth of it")
parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
asked = parser.parse_args()
if "online" in asked.only:  # said before the other parts have taken their minutes
    require_tools("wrk", "oha")
for part in asked.only:
    memory = psutil.virtual_memory().total / 1e9
    print(f"\n# {part}: {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GB, load {os.getloadavg()[0]:.1f}, ", end="")
    print(f"Python {platform.python_version()}\n", flush=True)
    PARTS[part](asked.quick)
