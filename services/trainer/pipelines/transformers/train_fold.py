"""A dynamic child: trains one fold as one H2O job and leaves its result beside the run."""

from obstore.store import from_url

from mojomesh_trainer.training import TrainingTask, predictions_key, result_key, train_fold

if "transformer" not in globals():  # Mage puts its own there, which collects the function
    from mage_ai.data_preparation.decorators import transformer


@transformer
def train_one_fold(planned: dict[str, int], *args: object, **kwargs: object) -> dict[str, object]:
    """Train the fold; the result is written after the predictions, so whoever finds it finds both."""
    task = TrainingTask.model_validate_json(str(kwargs["task"]))
    fold = planned["fold"]
    result, predictions = train_fold(task, fold)
    objects = from_url(task.objects_url)
    objects.put(predictions_key(task.results, fold), predictions.to_bytes())
    objects.put(result_key(task.results, fold), result.model_dump_json().encode())
    return {"fold": fold, "h2o_job": result.h2o_job}
