"""Training models, looking at their versions, promoting one or rolling back."""

import time
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from rich.markup import escape
from rich.table import Column, Table

from mojomesh_chassis.errors import MeshError, PermanentError
from mojomesh_cli.calls import call
from mojomesh_cli.connection import DEFAULT_STATE, State, calling, mesh_env
from mojomesh_cli.console import AsJson, out, print_json

Json = dict[str, Any]
Model = Annotated[str, typer.Argument(help="Name of the model.", show_default=False)]
Reason = Annotated[str | None, typer.Option("--reason", help="Why; kept with it.")]

POLL_S = 1.0
_COLOURS = {"champion": "green", "retired": "dim", "rejected": "red"}


class TrainingFailed(MeshError):
    """A run ended without a model; the text is the trainer's reason."""


def train(
    model: Model,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the model's lineage.")] = "asked for by hand",
    snapshot_time: Annotated[
        datetime | None, typer.Option("--snapshot-time", help="What was known then, UTC.", show_default="when the run starts")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the run's progress, and return when its version was judged.")] = False,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Ask for a new version of a model; with --wait, ends with status 1 unless it becomes the champion."""
    env = mesh_env(state)
    asked: Json = {"reason": reason}
    if snapshot_time is not None:
        asked["snapshot_time"] = snapshot_time.replace(tzinfo=UTC).isoformat()
    with calling(env, "registry") as registry, calling(env, "trainer") as trainer:
        event = call(registry, "POST", f"{path_of(model)}:train", json=asked)
        if not wait:
            _tell(event, as_json, f"Training of {model} is requested; `mojomesh models {model}` shows its versions.")
            return
        version = _until_judged(registry, trainer, model, event["event_id"], quiet=as_json)
    _tell(version, as_json, _verdict(model, version))
    if version["state"] != "champion":
        raise typer.Exit(1)


def models(
    model: Annotated[str | None, typer.Argument(help="One model, with its versions.", show_default="all of them")] = None,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Show the models, or one model with its versions and why each serves or does not."""
    with calling(mesh_env(state), "registry") as registry:
        answer = call(registry, "GET", path_of(model) if model else "/v1/models")
    if as_json:
        print_json(answer)
    elif model is None:
        out.print(_models_table(answer["models"]) if answer["models"] else "No model is defined. `mojomesh apply FOLDER` defines some.")
    else:
        _print_model(answer)


def promote(
    model: Model,
    version: Annotated[int, typer.Argument(help="Number of the version.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Past the gate's refusal; needs --reason.")] = False,
    reason: Reason = None,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion by hand."""
    if force and not reason:
        raise PermanentError("--force passes the gate, so say why: add --reason '...'")
    with calling(mesh_env(state), "registry") as registry:
        seen = call(registry, "GET", path_of(model))["champion"]
        asked = {"force": force, "reason": reason, "expected_promotion": seen["promotion"] if seen else None}
        promoted = call(registry, "POST", f"{path_of(model)}/versions/{version}:promote", json=asked)
    before = "It was before, too." if seen and seen["version"] == promoted["version"] else _before(seen)
    _tell(promoted, as_json, f"Version {promoted['version']} of {model} is the champion. {before}")


def rollback(model: Model, reason: Reason = None, state: State = DEFAULT_STATE, as_json: AsJson = False) -> None:
    """Return to the version that was champion before the present one."""
    with calling(mesh_env(state), "registry") as registry:
        seen = call(registry, "GET", path_of(model))["champion"]
        asked = {"reason": reason, "expected_promotion": seen["promotion"] if seen else None}
        promoted = call(registry, "POST", f"{path_of(model)}:rollback", json=asked)
    _tell(promoted, as_json, f"Version {promoted['version']} of {model} is the champion again. {_before(seen)}")


def path_of(model: str) -> str:
    """Where registry has the model."""
    return f"/v1/models/{quote(model, safe='')}"


def _until_judged(registry: httpx.Client, trainer: httpx.Client, model: str, event_id: str, *, quiet: bool) -> Json:
    """Wait for the version that the request led to.

    Raises:
        TrainingFailed: The run failed.
    """
    with out.status(f"{model}: waiting for trainer") as shown:
        if quiet:
            shown.stop()
        while True:
            run = next((run for run in call(trainer, "GET", "/v1/runs", params={"model": model})["runs"] if _caused(run, event_id)), None)
            version = _version_caused_by(registry, model, event_id)
            if version is not None:
                return version
            if run is not None and run["state"] == "failed":
                raise TrainingFailed(f"run {run['run_id']} of {model} failed: {run.get('reason') or 'trainer gave no reason'}")
            if run is not None:
                shown.update(f"{model}: {_progress(run)}")
            time.sleep(POLL_S)


def _version_caused_by(registry: httpx.Client, model: str, event_id: str) -> Json | None:
    versions: list[Json] = call(registry, "GET", path_of(model))["versions"]
    return next((version for version in versions if version["cause"]["event_id"] == event_id), None)


def _caused(run: Json, event_id: str) -> bool:
    return bool(run["cause"]["event_id"] == event_id)


def _progress(run: Json) -> str:
    done = len(run.get("folds") or [])
    return f"{run['state']}, {done} folds done" if done else str(run["state"])


def _verdict(model: str, version: Json) -> str:
    if version["state"] == "champion":
        return f"Version {version['version']} of {model} is the champion: {_metrics(version['metrics'])}."
    reasons = "; ".join(version["reasons"]) or "another version was promoted since"
    return (
        f"Version {version['version']} of {model} does not serve: {escape(reasons)}.\n"
        f"To serve it all the same: mojomesh promote {model} {version['version']} --force --reason '...'"
    )


def _before(seen: Json | None) -> str:
    return f"Before it was version {seen['version']}." if seen else "There was none before."


def _tell(answer: Json, as_json: bool, text: str) -> None:
    if as_json:
        print_json(answer)
    else:
        out.print(text)


def _models_table(rows: list[Json]) -> Table:
    table = Table("model", "champion", "versions", "definition", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        champion = f"[green]version {row['champion']['version']}[/]" if row["champion"] else "[dim]none yet[/]"
        table.add_row(row["model"], champion, str(row["n_versions"]), f"version {row['definition_version']}")
    return table


def _print_model(answer: Json) -> None:
    definition = answer["definition"]
    label = definition["label"]
    out.print(
        f"[bold]{answer['model']}[/] predicts {label['column']} of {label['feature_set']} for {definition['spine']}, "
        f"by {definition['algorithm']['name']} from {', '.join(definition['feature_sets'])}"
    )
    if not answer["versions"]:
        out.print(f"It has no version yet: mojomesh train {answer['model']} --wait")
        return
    columns = ("version", "is", Column("metrics", overflow="fold"), Column("snapshot", no_wrap=True), "because", "reasons")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    beside = {one["version"]: "shadow" if one["share"] is None else f"challenger, {one['share']:.1%}" for one in answer["challengers"]}
    for version in answer["versions"]:
        table.add_row(
            str(version["version"]),
            beside.get(version["version"]) or f"[{_COLOURS[version['state']]}]{version['state']}[/]",
            _metrics(version["metrics"]),
            version["snapshot_time"][:16],
            escape(f"{version['cause']['kind']}: {version['cause']['reason']}"),
            escape("; ".join(version["reasons"])),
        )
    out.print(table)


def _metrics(metrics: Json) -> str:
    shown = [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float) and name != "lift"]
    return ", ".join(shown) or "none"
