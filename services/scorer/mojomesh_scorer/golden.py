"""Golden rows: what every load of a bundle must score as H2O did."""

import numpy as np

from mojomesh_contracts.bundles import BundleSchema, Golden
from mojomesh_scorer.encoding import Matrix
from mojomesh_scorer.errors import LoadFailed


def golden_rows(golden: Golden, schema: BundleSchema) -> tuple[Matrix, Matrix]:
    """Encoded rows, shape (n_rows, n_columns), and the scores they must get, shape (n_rows, n_scores).

    Raises:
        LoadFailed: There are none, or a row has another number of inputs or scores than the schema.
    """
    n_columns, n_scores = len(schema.columns), len(schema.classes or [schema.label])
    if not golden.rows or any((len(row.inputs), len(row.scores)) != (n_columns, n_scores) for row in golden.rows):
        raise LoadFailed(f"golden.json must have rows, each of {n_columns} inputs and {n_scores} scores")
    inputs = np.array([row.inputs for row in golden.rows], dtype=np.float64)
    return inputs, np.array([row.scores for row in golden.rows], dtype=np.float64)


def check_golden(scores: Matrix, wanted: Matrix, tolerance: float) -> float:
    """Greatest difference between the scores of the golden rows and what they must be.

    Raises:
        LoadFailed: It is over the tolerance.
    """
    difference = float(np.abs(scores - wanted).max())
    if not difference <= tolerance:
        raise LoadFailed(f"golden rows: a score differs by {difference:.3g} from what H2O wrote, the tolerance is {tolerance:g}")
    return difference
