"""The throw-away process: loads the MOJO of a folder and scores the rows that come on standard input.

Rows and scores are in numpy's own file format, so they are the same to the last bit on both sides.
"""

import io
import os
import sys
from pathlib import Path

import numpy as np

from mojomesh_contracts.bundles import MOJO_FILE, SCHEMA_FILE, BundleSchema
from mojomesh_scorer.mojo import Mojo, start_jvm
from mojomesh_scorer.parent import die_with


def main(folder: Path, heap_mb: int, parent: int) -> None:
    """Load, score, answer; any failure ends the process with its reason as the last line of standard error."""
    die_with(parent)
    os.nice(10)  # requests go first
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Java prints must not get among the scores
    inputs = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    start_jvm(heap_mb)
    mojo = Mojo(folder / MOJO_FILE, BundleSchema.model_validate_json((folder / SCHEMA_FILE).read_bytes()), inputs)
    scores = io.BytesIO()  # numpy writes to files at their positions, and a pipe has none
    np.save(scores, mojo.score(inputs), allow_pickle=False)
    answer.write(scores.getvalue())
    answer.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
