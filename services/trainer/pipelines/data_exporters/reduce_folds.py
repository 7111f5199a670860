"""The reduce: the pipeline run succeeds only when every fold has its result."""

from mojomesh_trainer import blocks

if "data_exporter" not in globals():  # Mage puts its own there, which collects the function
    from mage_ai.data_preparation.decorators import data_exporter


@data_exporter
def reduce_folds(trained: list[dict[str, object]], *args: object, **kwargs: object) -> None:
    """Fail, naming the folds, when some are absent."""
    blocks.reduce_folds(str(kwargs["task"]), trained)
