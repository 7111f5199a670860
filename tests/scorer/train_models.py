"""A child of the test session: trains small models on an H2O cluster, and writes each as MOJO, schema, rows and H2O's own scores of them.

The rows contain missing values and levels that training never saw. Usage: python train_models.py H2O_URL FOLDER
"""

import csv
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import h2o
from h2o.estimators import H2OGeneralizedLinearEstimator, H2OGradientBoostingEstimator, H2OXGBoostEstimator

CARRIERS = ["AA", "B6", "DL", "UA", "WN"]
ORIGINS = ["EWR", "JFK", "LGA"]
COLUMNS = {
    "carrier": "category",
    "origin": "category",
    "distance": "number",
    "hour": "number",
    "holiday": "boolean",
    "weather.wind": "number",
}
TYPES = {"category": "enum", "number": "numeric", "boolean": "numeric"}
UNSEEN = "ZZ"


def make_rows(n_rows: int, seed: int, carriers: list[str]) -> list[dict[str, str | float | None]]:
    rng = random.Random(seed)
    rows: list[dict[str, str | float | None]] = []
    for _ in range(n_rows):
        row: dict[str, str | float | None] = {
            "carrier": rng.choice(carriers),
            "origin": rng.choice(ORIGINS),
            "distance": round(rng.uniform(80, 3000), 1),
            "hour": rng.randrange(5, 24),
            "holiday": rng.randrange(2),
            "weather.wind": round(rng.expovariate(0.1), 3),
        }
        rows.append({name: None if rng.random() < 0.07 else value for name, value in row.items()})
    return rows


def label(row: dict[str, str | float | None], rng: random.Random) -> dict[str, str | float | None]:
    late = -2 + 0.08 * float(row["hour"] or 12) + 0.05 * float(row["weather.wind"] or 10) + (1.0 if row["carrier"] in ("B6", "WN") else 0.0)
    p = 1 / (1 + math.exp(-late))
    delay = 30 * p + rng.gauss(0, 5)
    return {
        "late": str(int(rng.random() < p)),
        "never_late": str(int(rng.random() > p)),
        "delay": delay,
        "kind": "abc"[min(2, max(0, int(delay / 9)))],
    }


def as_event(row: dict[str, str | float | None]) -> dict[str, str | float | bool | None]:
    """The row as clients send it: a boolean is one, which H2O's file has as 0 or 1."""
    return row | {"holiday": None if row["holiday"] is None else bool(row["holiday"])}


def write_csv(path: Path, rows: list[dict[str, str | float | None]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def save_model(model: Any, target: str | None, home: Path) -> list[str] | None:
    """Write MOJO and schema into a new folder; returns the classes. Scoring order and levels are the model's own."""
    home.mkdir()
    Path(model.download_mojo(path=str(home))).rename(home / "model.mojo.zip")
    names, domains = model._model_json["output"]["names"], model._model_json["output"]["domains"]
    levels = dict(zip(names, domains, strict=True))
    columns = [
        {
            "name": column,
            "feature_set": "weather" if "." in column else "flights",
            "feature": column.rpartition(".")[2],
            "type": COLUMNS[column],
            "levels": levels[column],  # a level's number is its place
        }
        for column in names
        if column != target
    ]
    classes: list[str] | None = levels[target] if target else None
    (home / "schema.json").write_text(json.dumps({"columns": columns, "label": target or "anomaly", "classes": classes}))
    return classes


def main(url: str, folder: Path) -> None:
    h2o.connect(url=url, verbose=False, strict_version_check=False)
    h2o.no_progress()
    rng = random.Random(7)
    training = [row | label(row, rng) for row in make_rows(3000, 1, CARRIERS)]
    asked = make_rows(2000, 2, [*CARRIERS, UNSEEN])
    write_csv(folder / "training.csv", training)
    write_csv(folder / "asked.csv", asked)
    types = {name: TYPES[type_] for name, type_ in COLUMNS.items()}
    frame = h2o.import_file(
        str(folder / "training.csv"), col_types=types | {"late": "enum", "never_late": "enum", "kind": "enum", "delay": "numeric"}
    )
    rows = h2o.import_file(str(folder / "asked.csv"), col_types=types)
    gbm = {"ntrees": 20, "max_depth": 4, "seed": 42}
    models = {
        "binomial": (H2OGradientBoostingEstimator(**gbm), "late"),
        "reversed": (H2OGradientBoostingEstimator(**gbm), "never_late"),
        "multinomial": (H2OGradientBoostingEstimator(**gbm), "kind"),
        "xgboost": (H2OXGBoostEstimator(ntrees=20, max_depth=4, seed=42), "late"),
        "regression": (H2OGeneralizedLinearEstimator(seed=42), "delay"),
    }
    for name, (model, target) in models.items():
        model.train(x=list(COLUMNS), y=target, training_frame=frame)
        home = folder / name
        classes = save_model(model, target, home)
        scores = [
            [float(cell) for cell in (line[1:] if classes else line)]
            for line in model.predict(rows).as_data_frame(use_pandas=False, header=False)
        ]
        (home / "asked.json").write_text(json.dumps({"rows": [as_event(row) for row in asked], "scores": scores}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
