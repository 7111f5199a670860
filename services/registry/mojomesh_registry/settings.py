"""Configuration of registry."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mojomesh_chassis.settings import MeshSettings


class RegistrySettings(MeshSettings):
    """Registry needs the public key: it verifies every bundle."""

    model_config = SettingsConfigDict(env_prefix="REGISTRY_", frozen=True)

    public_key: Path = Field(validation_alias="MOJOMESH_PUBLIC_KEY")
