"""`python -m mojomesh_scorer`: the supervisor, which starts the workers."""

from mojomesh_chassis.serving import serve
from mojomesh_scorer.app import build
from mojomesh_scorer.settings import Settings

if __name__ == "__main__":
    serve("scorer", build, Settings)
