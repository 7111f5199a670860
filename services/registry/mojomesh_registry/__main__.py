"""`python -m mojomesh_registry`."""

from mojomesh_chassis.serving import serve
from mojomesh_registry.app import build
from mojomesh_registry.settings import RegistrySettings

if __name__ == "__main__":
    serve("registry", build, RegistrySettings)
