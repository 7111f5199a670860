"""Every kind of model that is served scores as H2O's own cluster does."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mojomesh_contracts.bundles import SCHEMA_FILE, BundleSchema

N_ROWS = 100_000
TOLERANCE = 1e-6
REPOSITORY = Path(__file__).parents[2]
KINDS = ("binomial", "multinomial", "regression")
FLAT = [
    *(f"{algorithm}-{kind}" for algorithm in ("gbm", "drf", "xgboost") for kind in KINDS),
    "drf_single-binomial",
    "gbm_log-regression",
    "isolationforest-anomaly",
    "xgboost_dart-binomial",
    "xgboost_log-regression",
]
BY_GENMODEL = [
    *(f"{algorithm}-{kind}" for algorithm in ("glm", "stackedensemble") for kind in KINDS),
    "deeplearning-regression",
    "xgboost_linear-binomial",
]


@dataclass(frozen=True)
class Zoo:
    folder: Path
    scored_by: dict[str, list[str | None]]


def child(*arguments: object) -> str:
    argv = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(argv, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, h2o_url: str) -> Zoo:
    folder = tmp_path_factory.mktemp("zoo")
    child("tests.scorer.train_zoo", h2o_url, folder, N_ROWS)
    return Zoo(folder, json.loads(child("tests.scorer.score_zoo", folder)))


@pytest.mark.parametrize("name", [*FLAT, *BY_GENMODEL])
def test_scores_are_those_of_the_cluster_with_missing_values_and_unseen_levels(zoo: Zoo, name: str) -> None:
    wanted, found = (np.load(zoo.folder / name / file) for file in ("scores.npy", "found.npy"))

    assert wanted.shape == found.shape
    assert len(found) == N_ROWS
    assert len(np.unique(found[:, -1])) > 100
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_trees_are_unpacked_and_whatever_else_is_served_goes_by_genmodel(zoo: Zoo) -> None:
    assert sorted(zoo.scored_by) == sorted([*FLAT, *BY_GENMODEL])
    assert {name: zoo.scored_by[name] for name in FLAT} == {name: ["flat_trees", None] for name in FLAT}
    assert {name: zoo.scored_by[name][0] for name in BY_GENMODEL} == dict.fromkeys(BY_GENMODEL, "genmodel")
    assert zoo.scored_by["glm-regression"][1] == "it has no trees"
    assert zoo.scored_by["xgboost_linear-binomial"][1] == "its booster is gblinear, which is no tree"


Link = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def identity(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    return raw


def logistic(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-raw)))


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("gbm-binomial", logistic),
        ("gbm-regression", identity),
        ("gbm_log-regression", np.exp),
        ("drf-regression", identity),
        ("drf_single-binomial", identity),
        ("xgboost-binomial", logistic),
    ],
)
def test_contributions_and_bias_sum_to_the_raw_score(zoo: Zoo, name: str, link: Link) -> None:
    explained, scores = np.load(zoo.folder / name / "explained.npy"), np.load(zoo.folder / name / "found.npy")[:100, -1]

    assert np.ptp(explained[:, :-1], axis=0).max() > 0.01
    np.testing.assert_allclose(link(explained.sum(axis=1)), scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gbm-binomial", "gbm-regression", "gbm_log-regression", "xgboost-binomial"])
def test_contributions_are_those_of_the_cluster_as_exactly_as_its_floats_are(zoo: Zoo, name: str) -> None:
    schema = BundleSchema.model_validate_json((zoo.folder / name / SCHEMA_FILE).read_bytes())
    with (zoo.folder / name / "contributions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = np.array([[float(row[place]) for place in (*(column.name for column in schema.columns), "BiasTerm")] for row in rows])

    np.testing.assert_allclose(np.load(zoo.folder / name / "explained.npy"), wanted, rtol=0, atol=1e-3)
