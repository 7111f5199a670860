"""Training in a real H2O: what the folds report, that it is repeatable, and that nothing is left behind."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mojomesh_chassis.objects import open_objects
from mojomesh_trainer.cluster import H2OFailed, H2OUnreachable, Stopped, open_cluster
from mojomesh_trainer.errors import RunFailed, RunInterrupted
from mojomesh_trainer.runners import LocalRunner
from mojomesh_trainer.training import (
    FoldPredictions,
    TrainingTask,
    key_prefix,
    load_snapshot,
    predictions_key,
    result_key,
    train_fold,
    unload_snapshot,
)
from tests.trainer.making import make_model, make_snapshot, make_task, stumbling


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    path = tmp_path / "snapshot.parquet"
    make_snapshot(path)
    return path


def left_behind(task: TrainingTask) -> list[str]:
    with open_cluster(task.h2o_url, 10) as cluster:
        frames = [frame["frame_id"]["name"] for frame in cluster.ask("GET /3/Frames")["frames"]]
        models = [model["model_id"]["name"] for model in cluster.ask("GET /3/Models")["models"]]
    return [key for key in frames + models if key.startswith(key_prefix(task.run_id)) or task.snapshot_url in key]


def test_a_fold_learns_something_and_leaves_only_the_snapshot(snapshot: Path, h2o_url: str) -> None:
    task = make_task(make_model(), snapshot, h2o_url)

    result, predictions = train_fold(task, 1)

    assert result.metrics.auc is not None and result.metrics.auc > 0.65
    assert result.metrics.lift == result.metrics.auc - 0.5
    assert result.n_test == len(predictions.labels) == len(predictions.scores) == result.metrics.n_rows
    assert np.allclose(predictions.scores.sum(axis=1), 1)
    assert sorted(left_behind(task)) == [f"{key_prefix(task.run_id)}read", f"{key_prefix(task.run_id)}snapshot"]
    unload_snapshot(task)
    assert left_behind(task) == []


@pytest.mark.parametrize("algorithm", ["gbm", "drf", "glm", "xgboost"])
def test_the_same_snapshot_gives_the_same_predictions(snapshot: Path, h2o_url: str, algorithm: str) -> None:
    params = {} if algorithm == "glm" else {"ntrees": 4}
    model = make_model(algorithm={"name": algorithm, "params": params})
    tasks = [make_task(model, snapshot, h2o_url) for _ in range(2)]

    (_, first), (_, second) = (train_fold(task, 0) for task in tasks)

    assert first.scores.tobytes() == second.scores.tobytes()
    for task in tasks:
        unload_snapshot(task)


def test_automl_is_bounded_by_models_and_repeatable_and_clears_them_away(snapshot: Path, h2o_url: str) -> None:
    task = make_task(make_model(algorithm={"name": "automl", "params": {"max_models": 2, "nfolds": 2}}), snapshot, h2o_url)

    first, second = (train_fold(task, 0)[1] for _ in range(2))

    assert first.scores.tobytes() == second.scores.tobytes()
    unload_snapshot(task)
    with open_cluster(h2o_url, 10) as cluster:
        models = [model["model_id"]["name"] for model in cluster.ask("GET /3/Models")["models"]]
    assert [name for name in models if "AutoML" in name] == []


@pytest.mark.parametrize("label", ["number", "multiclass"])
def test_other_labels_train_too(tmp_path: Path, h2o_url: str, label: str) -> None:
    path = tmp_path / "snapshot.parquet"
    make_snapshot(path, label=label)
    task = make_task(make_model(label={"feature_set": "arrivals", "column": "x", "type": label}), path, h2o_url)

    result, predictions = train_fold(task, 0)

    assert predictions.scores.shape == (result.n_test, {"number": 1, "multiclass": 3}[label])
    naive = {"number": result.metrics.lift or 0, "multiclass": 1.1 - (result.metrics.logloss or 2)}[label]
    assert naive > 0
    unload_snapshot(task)


def test_folds_train_at_the_same_time_once_the_snapshot_is_loaded(snapshot: Path, h2o_url: str) -> None:
    """Two that import one file pull it away from each other, so it is imported before."""
    task = make_task(make_model(walk_forward={"n_windows": 3, "train": "expanding", "test": "10d", "step": "10d"}), snapshot, h2o_url)
    with open_cluster(h2o_url, 30) as cluster:
        load_snapshot(cluster, task)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda fold: train_fold(task, fold)[0], range(3)))

    assert [result.fold for result in results] == [0, 1, 2]
    unload_snapshot(task)


def test_a_refusal_is_told_in_h2os_words(snapshot: Path, h2o_url: str) -> None:
    task = make_task(make_model(algorithm={"name": "gbm", "params": {"ntrees": -5}}), snapshot, h2o_url)

    with pytest.raises(H2OFailed, match="ntrees"):
        train_fold(task, 0)

    unload_snapshot(task)
    assert left_behind(task) == []


def test_an_unwanted_training_is_cancelled_in_the_cluster(snapshot: Path, h2o_url: str) -> None:
    task = make_task(make_model(algorithm={"name": "gbm", "params": {"ntrees": 5000, "max_depth": 12}}), snapshot, h2o_url)
    begun: list[str] = []

    def unwanted() -> bool:
        begun.append("asked")
        return len(begun) > 10

    with pytest.raises(Stopped):
        train_fold(task, 0, unwanted)
    unload_snapshot(task)


def test_a_job_that_takes_too_long_is_given_up(snapshot: Path, h2o_url: str) -> None:
    task = make_task(make_model(algorithm={"name": "gbm", "params": {"ntrees": 5000, "max_depth": 12}}), snapshot, h2o_url)

    with pytest.raises(H2OUnreachable, match="did not end in time"):
        train_fold(task.model_copy(update={"timeout_s": 3.0}), 0)
    unload_snapshot(task)


def test_nobody_at_the_address_is_told_with_the_address(snapshot: Path) -> None:
    with pytest.raises(H2OUnreachable, match=r"http://127\.0\.0\.1:9"):
        train_fold(make_task(make_model(), snapshot, "http://127.0.0.1:9"), 0)


def test_predictions_survive_their_file() -> None:
    predictions = FoldPredictions(np.array([0.0, 1]), np.array([5.0, 6]), np.array([[0.1, 0.9], [0.3, 0.7]]), np.full((2, 2), 0.5))

    again = FoldPredictions.from_bytes(predictions.to_bytes())

    assert again.scores.tobytes() == predictions.scores.tobytes()
    assert again.labels.tolist() == [0, 1]


async def nothing_to_keep(_: str) -> None:
    return None


async def test_the_local_runner_trains_only_the_folds_that_have_no_result(snapshot: Path, h2o_url: str, mesh_env: Any) -> None:
    objects = open_objects(mesh_env["MOJOMESH_OBJECTS"])
    task = make_task(make_model(), snapshot, h2o_url)
    await objects.put(result_key(task.results, 0), b"trained before")

    await LocalRunner(objects).train(task, None, nothing_to_keep)

    assert await objects.get(result_key(task.results, 0)) == b"trained before"
    assert await objects.exists(predictions_key(task.results, 1))
    await asyncio.to_thread(unload_snapshot, task)


@pytest.mark.parametrize(("failures", "trained"), [(2, True), (3, False)])
async def test_a_failed_fold_is_trained_again_three_times_in_all(
    snapshot: Path, h2o_url: str, mesh_env: Any, failures: int, trained: bool
) -> None:
    objects = open_objects(mesh_env["MOJOMESH_OBJECTS"])
    async with stumbling(h2o_url, failures) as url:
        task = make_task(make_model(walk_forward={"n_windows": 1, "train": "expanding", "test": "10d", "step": "10d"}), snapshot, url)
        training = LocalRunner(objects).train(task, None, nothing_to_keep)
        if trained:
            await training
        else:
            with pytest.raises(RunFailed, match="fold 0 failed 3 times: stumbled on purpose"):
                await training

    assert await objects.exists(result_key(task.results, 0)) == trained
    await asyncio.to_thread(unload_snapshot, task.model_copy(update={"h2o_url": h2o_url}))


async def test_a_cluster_that_is_away_interrupts_and_does_not_fail(snapshot: Path, mesh_env: Any) -> None:
    runner = LocalRunner(open_objects(mesh_env["MOJOMESH_OBJECTS"]))

    with pytest.raises(RunInterrupted):
        await runner.train(make_task(make_model(), snapshot, "http://127.0.0.1:9"), None, nothing_to_keep)
