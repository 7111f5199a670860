"""Configuration of trainer."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mojomesh_chassis.settings import MeshSettings


class TrainerSettings(MeshSettings):
    """Trainer alone holds the signing key."""

    model_config = SettingsConfigDict(env_prefix="TRAINER_", frozen=True)

    signing_key: Path = Field(validation_alias="MOJOMESH_SIGNING_KEY")
    public_key: Path = Field(validation_alias="MOJOMESH_PUBLIC_KEY")
    fold_runner: Literal["mage", "local"] = "mage"
    lease_s: float = Field(default=15.0, gt=0, description="How long a run stays with a trainer that no longer renews its lease")
    timeout_s: float = Field(default=900.0, gt=0, description="For one fold, and for the final model")
    tries: int = Field(default=5, ge=1, description="How often a run is begun, when its trainer dies of it, before it has failed")
    pause_s: float = Field(default=3.0, gt=0, description="How long a run waits when something it needs is away")
    patience_s: float = Field(default=1800.0, gt=0, description="How long a run is tried, from its request, while something is away")
