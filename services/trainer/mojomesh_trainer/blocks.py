"""What the blocks of the Mage project do. Used under Mage only, and with its libraries: contracts, numpy and obstore."""

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from obstore.store import ObjectStore, from_url

from mojomesh_trainer.cluster import H2OFailed, H2OUnreachable, open_cluster
from mojomesh_trainer.training import (
    FoldFailure,
    TrainingTask,
    failure_key,
    load_snapshot,
    predictions_key,
    result_key,
    train_fold,
)


def plan_folds(task_json: str) -> list[list[dict[str, object]]]:
    """Bring the snapshot into H2O, once, then fan out: Mage's form of the folds' numbers and the names of their blocks."""
    task = TrainingTask.model_validate_json(task_json)
    with alone(task, "plan_folds"), telling_why(task, "plan_folds"), open_cluster(task.h2o_url, task.timeout_s) as cluster:
        load_snapshot(cluster, task)
    folds = [plan.fold for plan in task.plans]
    return [[{"fold": fold} for fold in folds], [{"block_uuid": f"fold_{fold}"} for fold in folds]]


def train_one_fold(task_json: str, fold: int) -> dict[str, object]:
    """Train the fold as one H2O job. The result is written after the predictions, so whoever finds it finds both."""
    task = TrainingTask.model_validate_json(task_json)
    block = f"train_fold:fold_{fold}"
    with alone(task, block), telling_why(task, block) as objects:
        if not is_there(objects, result_key(task.results, fold)):
            result, predictions = train_fold(task, fold)
            objects.put(predictions_key(task.results, fold), predictions.to_bytes())
            objects.put(result_key(task.results, fold), result.model_dump_json().encode())
    return {"fold": fold}


def is_there(objects: ObjectStore, key: str) -> bool:
    """Whether the object store has it."""
    try:
        objects.head(key)
    except FileNotFoundError:
        return False
    return True


def reduce_folds(task_json: str, trained: list[dict[str, object]]) -> None:
    """Fail, naming the folds, when some are absent: the pipeline run succeeds only when every fold has its result."""
    task = TrainingTask.model_validate_json(task_json)
    absent = {plan.fold for plan in task.plans} - {fold["fold"] for fold in trained}
    if absent:
        raise ValueError(f"folds {sorted(absent)} have no result")


@contextmanager
def alone(task: TrainingTask, block: str) -> Iterator[None]:
    """Let one process at a time do a block of a run; the next finds it done.

    Mage 0.9.80 at times makes two block runs of one block: its look at what there is and its making are not one step, and its lock
    needs a Redis of its own. Two imports of one file then pull it away from each other.
    """
    with (Path(tempfile.gettempdir()) / f"mojomesh-{task.run_id}-{block.replace(':', '-')}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def telling_why(task: TrainingTask, block: str) -> Iterator[ObjectStore]:
    """Leave the reason of a failure beside the run, where trainer finds it: Mage keeps it in its log."""
    objects = from_url(task.objects_url)
    try:
        yield objects
    except (H2OFailed, H2OUnreachable) as error:
        failure = FoldFailure(reason=str(error), h2o_away=isinstance(error, H2OUnreachable))
        objects.put(failure_key(task.results, block), failure.model_dump_json().encode())
        raise
