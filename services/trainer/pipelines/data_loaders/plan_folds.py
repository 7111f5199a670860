"""The dynamic parent: one child per fold of the task. Trainer planned them; here they only fan out."""

from mojomesh_trainer import blocks

if "data_loader" not in globals():  # Mage puts its own there, which collects the function
    from mage_ai.data_preparation.decorators import data_loader


@data_loader
def plan_folds(*args: object, **kwargs: object) -> list[list[dict[str, object]]]:
    """The folds' numbers, and the names of their blocks, as in `train_fold:fold_0`."""
    return blocks.plan_folds(str(kwargs["task"]))
