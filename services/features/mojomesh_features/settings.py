"""Configuration of features."""

from pathlib import Path
from tempfile import gettempdir

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from mojomesh_chassis.settings import MeshSettings


class FeaturesSettings(MeshSettings):
    """Features verifies the bundles whose baselines it measures against, so it needs the public key."""

    model_config = SettingsConfigDict(env_prefix="FEATURES_", frozen=True)

    public_key: Path = Field(validation_alias="MOJOMESH_PUBLIC_KEY")
    work_folder: Path = Field(
        default=Path(gettempdir()) / "mojomesh-features", description="Where snapshots are built and bundles unpacked; may be lost"
    )
    memory_limit: str = Field(default="2GB", description="DuckDB's, for one snapshot; beyond it spills into the work folder")
