"""Mage, from its own environment, on the trainer's pipelines; how it must be configured stands in their `serve.py`."""

from dataclasses import dataclass
from pathlib import Path

from .ports import LOOPBACK, says_ok
from .processes import Command, Server

REPOSITORY = Path(__file__).parents[3]
PYTHON = REPOSITORY / ".venv-mage" / "bin" / "python"
PROJECT = REPOSITORY / "services" / "trainer" / "pipelines"
EMAIL = "owner@mojomesh.invalid"


@dataclass(frozen=True)
class Mage:
    """One server with its scheduler; `folder` keeps its runs and logs."""

    folder: Path
    port: int
    password: str
    log: Path

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """What the trainer must be told to reach it."""
        return {"MOJOMESH_MAGE": self.url, "MOJOMESH_MAGE_EMAIL": EMAIL, "MOJOMESH_MAGE_PASSWORD": self.password}

    @property
    def server(self) -> Server:
        env = {
            "MOJOMESH_MAGE_STATE": str(self.folder),
            "MOJOMESH_MAGE_EMAIL": EMAIL,
            "MOJOMESH_MAGE_PASSWORD": self.password,
            "MAGE_HOST": LOOPBACK,
            "MAGE_PORT": str(self.port),
        }
        return Server(
            Command("mage", [str(PYTHON), str(PROJECT / "serve.py")], self.log, env),
            ports=(self.port,),
            ready=self.ready,
        )

    def ready(self) -> bool:
        return says_ok(f"{self.url}/api/status")
