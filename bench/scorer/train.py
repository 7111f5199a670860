"""A child of the benchmark: trains its model on an H2O cluster. Usage: python train.py H2O_URL FOLDER

Flights made up from a fixed seed; 14 columns, of which three are categories, 100 trees of depth 5. Written are the MOJO, the bundle's
schema and 1,000 rows as clients send them, with H2O's own scores.
"""

import csv
import json
import math
import random
import sys
from pathlib import Path

import h2o
from h2o.estimators import H2OGradientBoostingEstimator

CATEGORIES = {
    "carrier": [f"C{n:02}" for n in range(16)],
    "origin": ["EWR", "JFK", "LGA"],
    "dest": [f"D{n:03}" for n in range(100)],
}
NUMBERS = {
    "distance": (80, 5000),
    "hour": (0, 23),
    "month": (1, 12),
    "day": (1, 31),
    "seats": (2, 450),
    "year_built": (1956, 2013),
    "temperature": (-10, 38),
    "wind_speed": (0, 60),
    "humidity": (10, 100),
    "visibility": (0, 10),
    "pressure": (980, 1045),
}
N_TRAINING, N_ASKED = 20_000, 1_000


def make_row(rng: random.Random) -> dict[str, str | float]:
    row: dict[str, str | float] = {name: rng.choice(levels) for name, levels in CATEGORIES.items()}
    return row | {name: round(rng.uniform(*bounds), 3) for name, bounds in NUMBERS.items()}


def late(row: dict[str, str | float], rng: random.Random) -> str:
    odds = -3 + 0.1 * float(row["hour"]) + 0.04 * float(row["wind_speed"]) - 0.1 * float(row["visibility"])
    odds += (hash_of(row["carrier"]) + hash_of(row["dest"]) - 1) * 2 + 0.5 * math.sin(float(row["month"]))
    return "yes" if rng.random() < 1 / (1 + math.exp(-odds)) else "no"


def hash_of(level: str | float) -> float:
    """A number between 0 and 1 that only depends on the level."""
    return random.Random(level).random()


def main(url: str, folder: Path) -> None:
    h2o.connect(url=url, verbose=False, strict_version_check=False)
    h2o.no_progress()
    rng = random.Random(1)
    training = [make_row(rng) for _ in range(N_TRAINING)]
    asked = [make_row(rng) for _ in range(N_ASKED)]
    columns = list(asked[0])
    for name, rows in {"training": [{**row, "late": late(row, rng)} for row in training], "asked": asked}.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    types = {column: "enum" if column in CATEGORIES else "numeric" for column in columns}
    frame = h2o.import_file(str(folder / "training.csv"), col_types=types | {"late": "enum"})
    model = H2OGradientBoostingEstimator(ntrees=100, max_depth=5, seed=42)
    model.train(x=columns, y="late", training_frame=frame)
    Path(model.download_mojo(path=str(folder))).rename(folder / "model.mojo.zip")
    domains = dict(zip(model._model_json["output"]["names"], model._model_json["output"]["domains"], strict=True))
    schema = [
        {
            "name": name,
            "feature_set": "flights",
            "feature": name,
            "type": "category" if name in CATEGORIES else "number",
            "levels": domains[name],
        }
        for name in model._model_json["output"]["names"]
        if name != "late"
    ]
    (folder / "schema.json").write_text(json.dumps({"columns": schema, "label": "late", "classes": domains["late"]}))
    predicted = model.predict(h2o.import_file(str(folder / "asked.csv"), col_types=types)).as_data_frame(use_pandas=False, header=False)
    # Last, since its being there says that the rest is.
    (folder / "asked.json").write_text(json.dumps({"rows": asked, "scores": [[float(cell) for cell in line[1:]] for line in predicted]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
