"""A child of the test session: trains one small model of each kind that is served, and lets H2O itself score many rows with it.

The rows contain missing values and levels that training never saw. Writes each model's MOJO, schema and scores (`scores.npy`), of some
models H2O's contributions of the first 100 rows (`contributions.csv`), and the rows once (`rows.json`).
Usage: python -m tests.scorer.train_zoo H2O_URL FOLDER N_ROWS
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import h2o
import numpy as np
from h2o.estimators import (
    H2ODeepLearningEstimator,
    H2OGeneralizedLinearEstimator,
    H2OGradientBoostingEstimator,
    H2OIsolationForestEstimator,
    H2ORandomForestEstimator,
    H2OStackedEnsembleEstimator,
    H2OXGBoostEstimator,
)

from tests.scorer.train_models import CARRIERS, COLUMNS, TYPES, UNSEEN, label, make_rows, save_model, write_csv

TREES = {"ntrees": 10, "max_depth": 5, "seed": 42}
FOLDS = {"nfolds": 2, "fold_assignment": "Modulo", "keep_cross_validation_predictions": True, "seed": 42}
TARGETS = {"binomial": "late", "multinomial": "kind", "regression": "delay"}
FAMILIES = {"binomial": "binomial", "multinomial": "multinomial", "regression": "gaussian"}


EXPLAINED = ("gbm-binomial", "gbm-regression", "gbm_log-regression", "drf-regression", "drf_single-binomial", "xgboost-binomial")


def estimators(kind: str) -> dict[str, Any]:
    family = FAMILIES[kind]
    made = {
        "gbm": H2OGradientBoostingEstimator(**TREES, balance_classes=kind == "multinomial"),
        "drf": H2ORandomForestEstimator(ntrees=10, max_depth=12, seed=42, binomial_double_trees=kind == "binomial"),
        "xgboost": H2OXGBoostEstimator(**TREES),
        "glm": H2OGeneralizedLinearEstimator(family=family, seed=42),
    }
    if kind == "regression":
        made["gbm_log"] = H2OGradientBoostingEstimator(**TREES, distribution="poisson")
        made["xgboost_log"] = H2OXGBoostEstimator(**TREES, distribution="poisson", dmatrix_type="sparse")
        made["deeplearning"] = H2ODeepLearningEstimator(hidden=[8], epochs=1, seed=42, reproducible=True)
    if kind == "binomial":
        made["drf_single"] = H2ORandomForestEstimator(ntrees=10, max_depth=12, seed=42)
        made["xgboost_dart"] = H2OXGBoostEstimator(**TREES, booster="dart", rate_drop=0.3, one_drop=True)
        made["xgboost_linear"] = H2OXGBoostEstimator(ntrees=5, booster="gblinear", seed=42)
    return made


def ensemble(kind: str, frame: Any) -> Any:
    bases = [H2OGradientBoostingEstimator(ntrees=5, **FOLDS), H2OGeneralizedLinearEstimator(family=FAMILIES[kind], **FOLDS)]
    for base in bases:
        base.train(x=list(COLUMNS), y=TARGETS[kind], training_frame=frame)
    return H2OStackedEnsembleEstimator(base_models=bases, seed=42)


def save(name: str, model: Any, target: str | None, asked: Any, folder: Path) -> None:
    home = folder / name
    classes = save_model(model, target, home)
    predicted = home / "predicted.csv"
    h2o.export_file(model.predict(asked), str(predicted))
    if name in EXPLAINED:
        h2o.export_file(model.predict_contributions(asked[:100, :], output_format="compact"), str(home / "contributions.csv"))
    places = range(1, 1 + len(classes)) if classes else [0]
    np.save(home / "scores.npy", np.loadtxt(predicted, delimiter=",", skiprows=1, usecols=places, ndmin=2))


def main(url: str, folder: Path, n_rows: int) -> None:
    h2o.connect(url=url, verbose=False, strict_version_check=False)
    h2o.no_progress()
    rng = random.Random(7)
    write_csv(folder / "training.csv", [row | label(row, rng) | {"n": rng.randrange(9)} for row in make_rows(3000, 1, CARRIERS)])
    rows = make_rows(n_rows, 2, [*CARRIERS, UNSEEN])
    write_csv(folder / "asked.csv", rows)
    (folder / "rows.json").write_text(json.dumps({name: [row[name] for row in rows] for name in COLUMNS}))
    types = {name: TYPES[type_] for name, type_ in COLUMNS.items()}
    labels = {"late": "enum", "never_late": "enum", "kind": "enum", "delay": "numeric", "n": "numeric"}
    frame = h2o.import_file(str(folder / "training.csv"), col_types=types | labels)
    asked = h2o.import_file(str(folder / "asked.csv"), col_types=types)
    for kind, target in TARGETS.items():
        for name, model in [*estimators(kind).items(), ("stackedensemble", ensemble(kind, frame))]:
            y = "n" if name.endswith("_log") else target
            model.train(x=list(COLUMNS), y=y, training_frame=frame)
            save(f"{name}-{kind}", model, y, asked, folder)
    forest = H2OIsolationForestEstimator(ntrees=20, seed=42)
    forest.train(x=list(COLUMNS), training_frame=frame)
    save("isolationforest-anomaly", forest, None, asked, folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
