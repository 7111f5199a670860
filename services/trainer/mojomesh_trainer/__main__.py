"""`python -m mojomesh_trainer`."""

from mojomesh_chassis.serving import serve
from mojomesh_trainer.app import build
from mojomesh_trainer.settings import TrainerSettings

if __name__ == "__main__":
    serve("trainer", build, TrainerSettings)
