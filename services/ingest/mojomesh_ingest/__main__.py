"""`python -m mojomesh_ingest` runs the service."""

from mojomesh_chassis.serving import serve
from mojomesh_ingest.app import build
from mojomesh_ingest.settings import Settings

serve("ingest", build, Settings)
