"""A dynamic child: trains one fold as one H2O job and leaves its result beside the run."""

from mojomesh_trainer import blocks

if "transformer" not in globals():  # Mage puts its own there, which collects the function
    from mage_ai.data_preparation.decorators import transformer


@transformer
def train_fold(planned: dict[str, int], *args: object, **kwargs: object) -> dict[str, object]:
    """The fold's number and the key of its H2O job."""
    return blocks.train_one_fold(str(kwargs["task"]), planned["fold"])
