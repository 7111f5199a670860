from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mojomesh_contracts.bundles import BundleSchema, Column
from mojomesh_flights.recomputing import Recomputer, decode
from mojomesh_trainer.cluster import open_cluster

SCHEMA = BundleSchema(
    columns=[
        Column(name="carrier", feature_set="flights", feature="carrier", type="category", levels=["AA", "DL", "UA"]),
        Column(name="hour", feature_set="flights", feature="hour", type="number"),
    ],
    label="late",
    classes=["0", "1"],
)


def test_encoded_rows_decode_to_what_they_stand_for() -> None:
    rows = decode(np.array([[2.0, 5.5], [np.nan, np.nan]]), SCHEMA)

    assert rows.to_pylist() == [{"carrier": "UA", "hour": 5.5}, {"carrier": None, "hour": None}]


def test_h2o_scores_decoded_rows_as_it_did_when_it_had_the_model(h2o_url: str, tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    inputs = np.column_stack([chance.integers(0, 3, 2_000).astype(float), chance.integers(0, 24, 2_000).astype(float)])
    inputs[::7, 0], inputs[::11, 1] = np.nan, np.nan
    rows = decode(inputs, SCHEMA)
    late = pa.array(np.where(chance.random(2_000) < np.nan_to_num(inputs[:, 1]) / 30, "1", "0"))
    pq.write_table(rows.append_column("label", late), tmp_path / "training.parquet")
    with open_cluster(h2o_url, 120) as cluster:
        cluster.import_parquet(str(tmp_path / "training.parquet"), "recomputing_rows", {"carrier": "Enum", "label": "Enum"})
        cluster.train("gbm", {"ntrees": 10, "seed": 1}, "recomputing_rows", ["carrier", "hour"], "recomputing_model")
        cluster.predict("recomputing_model", "recomputing_rows", "recomputing_predictions")
        wanted = np.array(cluster.read_columns("recomputing_predictions")["p1"], dtype=np.float64)
        cluster.download_mojo("recomputing_model", tmp_path / "model.zip")

        recomputer = Recomputer(cluster, tmp_path)
        (found,) = recomputer.scores(rows, SCHEMA, tmp_path / "model.zip")
        recomputer.clear()
        cluster.remove_all("recomputing_")

    assert len(set(wanted)) > 20
    assert float(np.abs(found - wanted).max()) <= 1e-6
