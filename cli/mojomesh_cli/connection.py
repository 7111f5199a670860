"""How a command finds its mesh: the environment first, then the state folder of a mesh on this machine."""

import os
from pathlib import Path
from typing import Annotated

import httpx
import typer

from mojomesh_local.errors import NotRunning
from mojomesh_local.state import StateFolder

State = Annotated[
    Path, typer.Option("--state", envvar="MOJOMESH_STATE", help="The state folder of the mesh.", show_default=".mojomesh in this folder")
]
DEFAULT_STATE = Path(".mojomesh")


def mesh_env(state: Path) -> dict[str, str]:
    """The variables of the mesh: those of its state folder, where there is one, overridden by the environment."""
    folder = StateFolder.at(state)
    kept = folder.read_env() if folder.env_file.exists() else {}
    return kept | {name: value for name, value in os.environ.items() if name.startswith("MOJOMESH_")}


def need(env: dict[str, str], variable: str) -> str:
    """One variable of `mesh_env`.

    Raises:
        NotRunning: Neither the environment nor a state folder names it.
    """
    if variable not in env:
        raise NotRunning(
            f"No mesh found: {variable} is not set and there is no state folder here. Run `mojomesh up`, or name one with --state."
        )
    return env[variable]


def calling(env: dict[str, str], service: str, timeout_s: float = 30.0) -> httpx.Client:
    """A client of one service, with the mesh's token; to be used as a context manager."""
    token = {"Authorization": f"Bearer {env['MOJOMESH_TOKEN']}"} if "MOJOMESH_TOKEN" in env else {}
    return httpx.Client(base_url=need(env, f"MOJOMESH_{service.upper()}_URL"), headers=token, timeout=timeout_s)
