"""Ingest's configuration."""

from pydantic_settings import SettingsConfigDict

from mojomesh_chassis.settings import MeshSettings


class Settings(MeshSettings):
    """Read from `INGEST_…`, the mesh's own from `MOJOMESH_…`."""

    model_config = SettingsConfigDict(env_prefix="INGEST_", frozen=True)

    port: int = 8001
