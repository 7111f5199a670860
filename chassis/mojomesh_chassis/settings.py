"""What every service is told by its environment. Read once, at the entry point; nothing else reads the environment."""

import sys
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _mesh(name: str) -> str:
    return f"MOJOMESH_{name}"


class MeshSettings(BaseSettings):
    """Addresses and secrets that are the same all over the mesh. A service adds its own fields under its own prefix."""

    model_config = SettingsConfigDict(frozen=True)

    kafka: str = Field(validation_alias=_mesh("KAFKA"), description="Bootstrap servers")
    postgres: str = Field(validation_alias=_mesh("POSTGRES"), description="URLs, comma-separated: the feature store's shards")
    redis: str = Field(default="redis://127.0.0.1:6379/0", validation_alias=_mesh("REDIS"))
    h2o: str = Field(default="http://127.0.0.1:54321", validation_alias=_mesh("H2O"))
    mage: str = Field(default="http://127.0.0.1:6789", validation_alias=_mesh("MAGE"))
    mage_email: str = Field(default="", validation_alias=_mesh("MAGE_EMAIL"))
    mage_password: str = Field(default="", validation_alias=_mesh("MAGE_PASSWORD"))
    objects: str = Field(validation_alias=_mesh("OBJECTS"), description="file:///folder or s3://bucket/prefix")
    token: str = Field(min_length=16, validation_alias=_mesh("TOKEN"), description="Bearer token of admin and control calls")
    public_key: Path | None = Field(default=None, validation_alias=_mesh("PUBLIC_KEY"))
    environment: Literal["development", "production"] = Field(default="development", validation_alias=_mesh("ENVIRONMENT"))
    fault: Path | None = Field(default=None, validation_alias=_mesh("FAULT"), description="Folder of armed fault points, for tests")
    traces: Path | None = Field(default=None, validation_alias=_mesh("TRACES"), description="Folder for spans as JSON lines")
    otlp_endpoint: str | None = Field(default=None, validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT")
    replica: str = Field(default="0", pattern=r"^[A-Za-z0-9._-]+$", validation_alias=_mesh("REPLICA"))
    ingest_url: str = Field(default="http://127.0.0.1:8001", validation_alias=_mesh("INGEST_URL"))
    features_url: str = Field(default="http://127.0.0.1:8002", validation_alias=_mesh("FEATURES_URL"))
    trainer_url: str = Field(default="http://127.0.0.1:8003", validation_alias=_mesh("TRAINER_URL"))
    registry_url: str = Field(default="http://127.0.0.1:8004", validation_alias=_mesh("REGISTRY_URL"))
    scorer_url: str = Field(default="http://127.0.0.1:8005", validation_alias=_mesh("SCORER_URL"))
    scorer_grpc: str = Field(default="127.0.0.1:8006", validation_alias=_mesh("SCORER_GRPC"))
    scorer_admin_url: str = Field(default="http://127.0.0.1:8007", validation_alias=_mesh("SCORER_ADMIN_URL"))

    host: str = "127.0.0.1"
    port: int = 0

    @property
    def postgres_urls(self) -> list[str]:
        return self.postgres.split(",")

    @model_validator(mode="after")
    def _refuse_faults_in_production(self) -> "MeshSettings":
        if self.environment == "production" and self.fault:
            raise ValueError("MOJOMESH_FAULT kills processes on purpose, for tests; unset it in production")
        return self


AnySettings = TypeVar("AnySettings", bound=MeshSettings)


def read_settings(settings: type[AnySettings]) -> AnySettings:
    """The settings from the environment, or an end of the process with a line per variable that is missing or wrong."""
    try:
        return settings()
    except ValidationError as error:
        lines = [f"  {'.'.join(str(part) for part in fault['loc']) or 'settings'}: {fault['msg']}" for fault in error.errors()]
        sys.exit("mojomesh: the environment is incomplete or wrong:\n" + "\n".join(lines))
