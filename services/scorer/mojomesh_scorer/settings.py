"""What the scorer is told by its environment."""

from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from mojomesh_chassis.settings import MeshSettings


class Settings(MeshSettings):
    """The scorer's own settings, `SCORER_*`."""

    model_config = SettingsConfigDict(env_prefix="SCORER_", frozen=True)

    port: int = Field(default=0, validation_alias="SCORER_ADMIN_PORT", description="The supervisor's, which the chassis serves")
    data_port: int = Field(default=0, validation_alias="SCORER_PORT", description="The workers'")
    grpc_port: int = 0
    workers: int = Field(default=2, ge=1, le=64, description="Processes that score; one a core")
    heap_mb: int = Field(default=256, ge=64, description="Java heap of a worker, and of the probe")
    max_in_flight: int = Field(default=256, ge=1, description="Requests in a worker beyond which it answers 429")
    receipts_waiting: int = Field(
        default=100_000,
        ge=0,
        description="Predictions in a worker whose receipts wait for Kafka; more are dropped, and counted. 0 keeps none",
    )
    shadows_waiting: int = Field(
        default=10_000, ge=0, description="Rows in a worker that wait for shadows to score them; more are dropped, and counted"
    )
    shadows_every_s: float = Field(default=60.0, gt=0, description="How often a worker tells what its shadows made of the rows")
    folder: Path | None = Field(default=None, description="Its own, for fetched bundles and counters; by default one that goes with it")
    drain_s: float = Field(default=10.0, gt=0, description="How long a swap waits for requests that the old version is answering")

    @property
    def verifying_key(self) -> Path:
        """The public key that every bundle must be signed for."""
        if self.public_key is None:
            raise ValueError("MOJOMESH_PUBLIC_KEY is not set")
        return self.public_key

    @model_validator(mode="after")
    def _need_a_key(self) -> "Settings":
        if self.public_key is None or not self.public_key.is_file():
            raise ValueError("MOJOMESH_PUBLIC_KEY must name the file of the key that bundles are signed for")
        return self
