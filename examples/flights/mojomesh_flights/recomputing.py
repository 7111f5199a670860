"""Scores computed once more, by H2O itself from a version's MOJO: what the scorer answered must be the same."""

from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mojomesh_contracts.bundles import BundleSchema
from mojomesh_trainer.cluster import Cluster, ColumnType

Floats = NDArray[np.float64]


def decode(inputs: Floats, schema: BundleSchema) -> pa.Table:
    """Encoded rows, shape (n_rows, n_columns), as the values they stand for; a level unseen in training has become missing."""
    columns = {}
    for place, column in enumerate(schema.columns):
        values, absent = inputs[:, place], np.isnan(inputs[:, place])
        if column.type == "category":
            indices = pa.array(np.where(absent, 0, values).astype(np.int32), mask=absent)
            columns[column.name] = pa.DictionaryArray.from_arrays(indices, pa.array(column.levels or [], pa.string())).cast(pa.string())
        else:
            columns[column.name] = pa.array(values, mask=absent)
    return pa.table(columns)


class Recomputer:
    """Scores tables in the cluster, through H2O's generic model; what it put there it takes away again."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self._prefix = f"demo_{uuid4().hex}"
        self._models: dict[Path, str] = {}

    def scores(self, rows: pa.Table, schema: BundleSchema, *mojos: Path) -> list[Floats]:
        """The last score (the probability of the label, or the number) that each of `mojos` gives to each row, in order."""
        path, frame = self._folder / f"{self._prefix}.parquet", f"{self._prefix}_rows"
        types: dict[str, ColumnType] = {column.name: "Enum" if column.type == "category" else "Numeric" for column in schema.columns}
        pq.write_table(rows, path)
        try:
            self._cluster.import_parquet(str(path), frame, types)
            return [self._predict(mojo, frame) for mojo in mojos]
        finally:
            path.unlink()

    def clear(self) -> None:
        self._cluster.remove_all(self._prefix)

    def _predict(self, mojo: Path, frame: str) -> Floats:
        if mojo not in self._models:
            self._models[mojo] = f"{self._prefix}_{len(self._models)}"
            started = self._cluster.ask("POST /3/ModelBuilders/generic", {"path": str(mojo), "model_id": self._models[mojo]})
            self._cluster.wait(started["job"]["key"]["name"])
        predictions = f"{self._prefix}_predictions"
        self._cluster.predict(self._models[mojo], frame, predictions)
        *_, last = self._cluster.read_columns(predictions).values()
        return np.array(last, dtype=np.float64)
