"""Why a row got its score: SHAP contributions from the MOJO. Imported by workers only, as `mojo` is."""

from pathlib import Path

import jpype
import jpype.nio
import numpy as np

from mojomesh_chassis.errors import TooLarge
from mojomesh_scorer.encoding import Matrix
from mojomesh_scorer.errors import NotExplained

MAX_EXPLAINED = 100
"""Most rows of a request with reasons: a row costs some 0.2 ms a hundred shallow trees, and that many times more where they are deep."""


class Explainer:
    """The contributions of one model's columns; not shared between threads."""

    def __init__(self, mojo: Path, n_columns: int) -> None:
        """Load the model once more, its training weights included; takes some 0.3 s.

        Raises:
            NotExplained: Models of this kind have no contributions.
        """
        try:
            self._contributions = jpype.JClass("mojomesh.Contributions")(str(mojo))
        except jpype.JClass("java.lang.UnsupportedOperationException") as error:
            raise NotExplained(str(error.getMessage())) from None
        rows, contributions = bytearray(MAX_EXPLAINED * n_columns * 8), bytearray(MAX_EXPLAINED * (n_columns + 1) * 8)
        self._contributions.attach(jpype.nio.convertToDirectBuffer(rows), jpype.nio.convertToDirectBuffer(contributions))
        self._rows = np.frombuffer(rows, dtype=np.float64).reshape(MAX_EXPLAINED, n_columns)
        self._found = np.frombuffer(contributions, dtype=np.float64).reshape(MAX_EXPLAINED, n_columns + 1)

    def explain(self, block: Matrix) -> Matrix:
        """What each column adds to the raw score (before the link) of encoded rows, and in the last place the bias.

        Shape (n_rows, n_columns + 1); a row sums to the raw score. Of two classes the second one's is explained.

        Raises:
            TooLarge: More rows than a request may have explained.
        """
        if len(block) > MAX_EXPLAINED:
            raise TooLarge(f"{len(block)} rows; at most {MAX_EXPLAINED} a request are explained")
        self._rows[: len(block)] = block
        self._contributions.explain(len(block))
        return self._found[: len(block)].copy()
