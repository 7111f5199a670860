"""Trains in H2O: one fold, and the final model. Used under Mage too: contracts, numpy and h2o only."""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import numpy as np

from mojomesh_contracts.bundles import Column, FoldPlan, FoldResult
from mojomesh_contracts.definitions import Model
from mojomesh_contracts.events import Frozen
from mojomesh_trainer.cluster import Cluster, ColumnType, H2OFailed, Trained, open_cluster
from mojomesh_trainer.folds import scored_from, to_ms
from mojomesh_trainer.metrics import Floats, measure, naive_scores

DEFAULT_SEED = 42


class TrainingTask(Frozen):
    """What the training of one run needs to know; the same for all folds."""

    run_id: UUID
    model: Model
    columns: list[Column]
    snapshot_url: str
    h2o_url: str
    objects_url: str
    plans: list[FoldPlan]
    results: str
    """Folder of the run in the object store."""
    timeout_s: float
    """For one fold."""


class FoldFailure(Frozen):
    """Why a fold, or what goes before the folds, failed."""

    reason: str
    h2o_away: bool
    """It may succeed when H2O is back."""


@dataclass(frozen=True)
class FoldPredictions:
    """What a fold's model said of its test rows, in the snapshot's order."""

    labels: Floats
    """Shape (n,): 0 or 1, the class's index, or the number."""
    label_ms: Floats
    scores: Floats
    """Shape (n, n_classes) or (n, 1)."""
    naive: Floats

    def to_bytes(self) -> bytes:
        """As a .npz file."""
        buffer = io.BytesIO()
        np.savez(buffer, labels=self.labels, label_ms=self.label_ms, scores=self.scores, naive=self.naive)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> "FoldPredictions":
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return FoldPredictions(**{name: arrays[name] for name in ("labels", "label_ms", "scores", "naive")})


def result_key(results: str, fold: int) -> str:
    """Where a fold's FoldResult lies; it is written last, so it is there only when all of the fold is."""
    return f"{results}/fold-{fold}.json"


def predictions_key(results: str, fold: int) -> str:
    """Where a fold's FoldPredictions lie."""
    return f"{results}/fold-{fold}.npz"


def failure_key(results: str, block: str) -> str:
    """Where a block of Mage that failed leaves its FoldFailure."""
    return f"{results}/{block.replace(':', '-')}.failed.json"


def key_prefix(run_id: UUID) -> str:
    """What the names of all frames and models of a run begin with."""
    return f"run_{run_id.hex}_"


def seed_of(model: Model) -> int:
    """The definition's seed, or the default: every training has one."""
    return int(model.algorithm.params.get("seed", DEFAULT_SEED))


def params_of(model: Model) -> dict[str, Any]:
    """The definition's parameters with the seed that is used when it names none."""
    return {**model.algorithm.params, "seed": seed_of(model)}


def train_fold(task: TrainingTask, fold: int, stopped: Callable[[], bool] = lambda: False) -> tuple[FoldResult, FoldPredictions]:
    """Train on the fold's past, test on what followed; nothing is left behind in the cluster.

    Raises:
        H2OFailed: H2O refused the parameters or the data, with its reason.
        H2OUnreachable: H2O is gone, or not ready within `timeout_s`.
        Stopped: `stopped` became true.
    """
    started = time.monotonic()
    plan = task.plans[fold]
    with open_cluster(task.h2o_url, task.timeout_s, stopped) as cluster, loaded(cluster, task, f"f{fold}") as data:
        train = data.rows("train", plan.train_from, plan.train_to)
        test = data.rows("test", plan.test_from, plan.test_to, scored_from(plan, task.model.walk_forward))
        if not (n_train := cluster.n_rows(train)) or not (n_test := cluster.n_rows(test)):
            raise H2OFailed(f"fold {fold} has no rows to {'test' if n_train else 'train'} on")
        trained = data.train(train)
        predictions = data.predictions(trained, train, test)
    metrics = measure(task.model.label.type, predictions.labels, predictions.scores, predictions.naive)
    result = FoldResult(
        **plan.model_dump(),
        n_train=n_train,
        n_test=n_test,
        metrics=metrics,
        h2o_job=trained.job,
        seconds=time.monotonic() - started,
    )
    return result, predictions


class LoadedSnapshot:
    """The snapshot as a frame of the cluster, with the frames and models made of it."""

    def __init__(self, cluster: Cluster, task: TrainingTask, frame: str, prefix: str) -> None:
        self._cluster = cluster
        self._task = task
        self._prefix = prefix
        self.frame = frame

    def rows(self, name: str, label_from: datetime, label_to: datetime, scored_from: datetime | None = None) -> str:
        """The frame of those rows whose label became known in [label_from, label_to), scored not before `scored_from`."""
        key = f"{self._prefix}{name}"
        wanted = f'(& (>= (cols {self.frame} "label_time") {to_ms(label_from)}) (< (cols {self.frame} "label_time") {to_ms(label_to)}))'
        if scored_from is not None:
            wanted = f'(& {wanted} (>= (cols {self.frame} "event_time") {to_ms(scored_from)}))'
        self._cluster.assign(key, f"(rows {self.frame} {wanted})")
        return key

    def train(self, frame: str) -> Trained:
        model = self._task.model
        inputs = [column.name for column in self._task.columns]
        return self._cluster.train(model.algorithm.name, params_of(model), frame, inputs, f"{self._prefix}model")

    def score(self, trained: Trained, frame: str) -> Floats:
        """What the model says of the frame's rows, shape (n, n_classes) or (n, 1)."""
        key = f"{self._prefix}scores"
        self._cluster.predict(trained.key, frame, key)
        cells = self._cluster.read_columns(key)
        wanted = [name for name in cells if name != "predict"] if trained.classes else ["predict"]
        return np.array([cells[name] for name in wanted], dtype=np.float64).T

    def labels(self, trained: Trained, frame: str) -> tuple[Floats, Floats]:
        """Labels as numbers or class indices, and when they became known."""
        key = f"{self._prefix}labels"
        self._cluster.assign(key, f'(cols {frame} ["label" "label_time"])')
        cells = self._cluster.read_columns(key)
        classes = {name: float(index) for index, name in enumerate(trained.classes or [])}
        labels = [classes[cell] for cell in cells["label"]] if classes else cells["label"]
        return np.array(labels, dtype=np.float64), np.array(cells["label_time"], dtype=np.float64)

    def predictions(self, trained: Trained, train: str, test: str) -> FoldPredictions:
        labels, label_ms = self.labels(trained, test)
        scores = self.score(trained, test)
        train_labels, _ = self.labels(trained, train)
        naive = naive_scores(self._task.model.label.type, train_labels, scores.shape[1], len(labels))
        return FoldPredictions(labels, label_ms, scores, naive)


@contextmanager
def loaded(cluster: Cluster, task: TrainingTask, name: str) -> Iterator[LoadedSnapshot]:
    """The snapshot in the cluster; everything made of it is removed at the end, under names of its own.

    Two tries of one fold never share a name, since the first may still be running somewhere.
    """
    frame = load_snapshot(cluster, task)
    with cluster.removing():
        yield LoadedSnapshot(cluster, task, frame, f"{key_prefix(task.run_id)}{name}_{uuid4().hex[:8]}_")


def load_snapshot(cluster: Cluster, task: TrainingTask) -> str:
    """The frame that holds the snapshot, the same for all folds of a run; imported if it is not there.

    Folds that train at the same time need it to be there before, since two cannot import one file at once. A class is made a category
    here: the parser keeps whole numbers numbers.
    """
    frame, read = f"{key_prefix(task.run_id)}snapshot", f"{key_prefix(task.run_id)}read"
    if not cluster.is_there(frame):
        cluster.import_parquet(task.snapshot_url, read, column_types(task))
        names = " ".join(f'"{name}"' for name in ["event_time", "label_time", *(column.name for column in task.columns)])
        label = f'(cols {read} "label")'
        if task.model.label.type != "number":
            label = f"(as.factor {label})"
        cluster.assign(frame, f'(append (cols {read} [{names}]) {label} "label")')
    return frame


def unload_snapshot(task: TrainingTask) -> None:
    """Remove whatever the cluster still holds of a run, also what a killed process left there."""
    with open_cluster(task.h2o_url, task.timeout_s) as cluster:
        cluster.remove_all(key_prefix(task.run_id))


def column_types(task: TrainingTask) -> dict[str, ColumnType]:
    """Types of the snapshot's columns in H2O: times are plain numbers."""
    types: dict[str, ColumnType] = {"entity_id": "String", "event_time": "Numeric", "label_time": "Numeric"}
    for column in task.columns:
        types[column.name] = "Enum" if column.type == "category" else "Numeric"
    return types
