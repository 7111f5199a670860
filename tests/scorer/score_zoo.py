"""A child of the test session, since a JVM cannot be ended within one: scores the rows of `train_zoo.py` with each of its models.

Writes `found.npy`, and `explained.npy` where H2O explained its scores too, beside a model's MOJO, and prints, as JSON, what scored it by
its name. Usage: python -m tests.scorer.score_zoo FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np

from mojomesh_contracts.bundles import MOJO_FILE, SCHEMA_FILE, BundleSchema
from mojomesh_scorer.contributions import Explainer
from mojomesh_scorer.encoding import Encoder
from mojomesh_scorer.mojo import Mojo, start_jvm
from mojomesh_scorer.tensors import Tensor, from_values

N_CHECKED = 20


def main(folder: Path) -> None:
    start_jvm(500)
    columns = json.loads((folder / "rows.json").read_bytes())
    scored_by = {}
    for home in (path.parent for path in folder.glob(f"*/{MOJO_FILE}")):
        schema = BundleSchema.model_validate_json((home / SCHEMA_FILE).read_bytes())
        tensors = [tensor_of(column.name, column.levels is not None, columns[column.name]) for column in schema.columns]
        rows = Encoder(schema).encode_tensors(tensors, len(tensors[0].data)).matrix
        mojo = Mojo(home / MOJO_FILE, schema, rows[:N_CHECKED])
        np.save(home / "found.npy", mojo.score(rows))
        if (home / "contributions.csv").exists():
            np.save(home / "explained.npy", Explainer(home / MOJO_FILE, len(schema.columns)).explain(rows[:100]))
        scored_by[home.name] = [mojo.scored_by, mojo.not_flat_because]
    sys.stdout.write(json.dumps(scored_by))


def tensor_of(name: str, is_text: bool, cells: list[str | float | None]) -> Tensor:
    if is_text:
        return from_values(name, "BYTES", [len(cells)], [cell or "" for cell in cells])
    return from_values(name, "FP64", [len(cells)], [np.nan if cell is None else cell for cell in cells])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
