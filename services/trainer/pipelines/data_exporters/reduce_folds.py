"""The reduce: the pipeline run succeeds only when every fold has its result."""

from mojomesh_trainer.training import TrainingTask

if "data_exporter" not in globals():  # Mage puts its own there, which collects the function
    from mage_ai.data_preparation.decorators import data_exporter


@data_exporter
def reduce_folds(trained: list[dict[str, object]], *args: object, **kwargs: object) -> None:
    """Fail, naming the folds, when some are absent."""
    task = TrainingTask.model_validate_json(str(kwargs["task"]))
    absent = {plan.fold for plan in task.plans} - {fold["fold"] for fold in trained}
    if absent:
        raise ValueError(f"folds {sorted(absent)} have no result")
