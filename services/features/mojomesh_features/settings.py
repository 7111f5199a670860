"""Configuration of features."""

from datetime import timedelta
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mojomesh_chassis.settings import MeshSettings
from mojomesh_contracts.definitions import Duration
from mojomesh_features.work_folder import WORK_FOLDER


class FeaturesSettings(MeshSettings):
    """Features verifies the bundles whose baselines it measures against, so it needs the public key."""

    model_config = SettingsConfigDict(env_prefix="FEATURES_", frozen=True)

    public_key: Path = Field(validation_alias="MOJOMESH_PUBLIC_KEY")
    work_folder: Path = Field(default=WORK_FOLDER, description="Where snapshots are built and bundles unpacked; not NFS, may be lost")
    memory_limit: str = Field(default="2GB", description="DuckDB's, for one snapshot or segment; beyond it spills into the work folder")
    seal_rows: int = Field(default=1_000_000, ge=1, description="A feature set with so many unsealed rows is sealed")
    seal_age: Duration = Field(default=timedelta(days=1), description="And one with an unsealed row of this age")
    compare_every: Duration = Field(
        default=timedelta(minutes=10),
        gt=timedelta(0),
        description="How often the skew monitor computes logged online vectors again, offline",
    )
    keep: Duration | None = Field(
        default=None,
        description="How long rows stay in PostgreSQL after their event time; older ones are in segments only, but for each entity's last",
    )
