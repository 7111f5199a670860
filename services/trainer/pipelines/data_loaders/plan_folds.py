"""The dynamic parent: one child per fold of the task. Trainer planned them; here they only fan out."""

from mojomesh_trainer.cluster import open_cluster
from mojomesh_trainer.training import TrainingTask, load_snapshot

if "data_loader" not in globals():  # Mage puts its own there, which collects the function
    from mage_ai.data_preparation.decorators import data_loader


@data_loader
def plan_folds(*args: object, **kwargs: object) -> list[list[dict[str, object]]]:
    """The folds' numbers, and the names of their blocks, as in `train_fold:fold_0`."""
    task = TrainingTask.model_validate_json(str(kwargs["task"]))
    with open_cluster(task.h2o_url, task.timeout_s) as cluster:
        load_snapshot(cluster, task)  # once, before several need it
    folds = [plan.fold for plan in task.plans]
    return [[{"fold": fold} for fold in folds], [{"block_uuid": f"fold_{fold}"} for fold in folds]]
