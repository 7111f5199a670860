"""What came in and was not as expected, and what is held back because of it."""

from typing import Annotated
from urllib.parse import quote
from uuid import UUID

import typer
from rich.markup import escape
from rich.table import Column, Table

from mojomesh_chassis.errors import PermanentError
from mojomesh_cli.calls import call
from mojomesh_cli.connection import DEFAULT_STATE, State, calling, mesh_env
from mojomesh_cli.console import AsJson, out, print_json

quarantine = typer.Typer(help="Look at events that are held back, and let them go.", no_args_is_help=True)

OfSet = Annotated[str | None, typer.Option("--feature-set", help="Only events of this feature set.")]


def quality(
    feature_set: Annotated[str, typer.Argument(help="Name of the feature set.", show_default=False)],
    windows: Annotated[int, typer.Option("--windows", min=1, help="How many of the last windows.")] = 20,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Show what came in of a feature set, window by window, and what of it was not as its definition expects."""
    with calling(mesh_env(state), "features") as features:
        found = call(features, "GET", f"/v1/quality/{quote(feature_set, safe='')}", params={"limit": windows})["windows"]
    if as_json:
        print_json(found)
    elif not found:
        out.print(f"No window of '{feature_set}' is over yet, or its definition expects nothing (`quality:`).")
    else:
        table = Table("until", "rows", "held", Column("not as expected", overflow="fold"), box=None, padding=(0, 2, 0, 0))
        for window in found:
            reasons = "\n".join(breach["reason"] for breach in window["breaches"])
            table.add_row(window["window_to"], f"{window['n_rows']:,}", f"{window['n_held']:,}", escape(reasons) or "[dim]-[/]")
        out.print(table)


@quarantine.command("list")
def list_held(
    feature_set: OfSet = None,
    limit: Annotated[int, typer.Option(help="Show only the oldest.")] = 50,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """List held events and why they are held, oldest first."""
    asked = {"limit": limit} | ({"feature_set": feature_set} if feature_set else {})
    with calling(mesh_env(state), "ingest") as ingest:
        held = call(ingest, "GET", "/v1/quarantine", params=asked)["events"]
    if as_json:
        print_json(held)
    elif not held:
        out.print("Nothing is held back.")
    else:
        table = Table(Column("event", no_wrap=True), "feature set", "entity", "held at", Column("why", overflow="fold"))
        for event in held:
            why = "; ".join(f"'{feature}' {problem}" for feature, problem in event["problems"].items())
            table.add_row(event["event_id"], event["feature_set"], escape(event["entity_id"]), event["held_at"][:19], escape(why))
        out.print(table)


@quarantine.command("release")
def release(
    event_ids: Annotated[
        list[UUID] | None, typer.Argument(metavar="[ID]...", help="Which ones; none: all that --feature-set leaves.")
    ] = None,
    feature_set: OfSet = None,
    everything: Annotated[bool, typer.Option("--all", help="All that are held.")] = False,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Let held events go: they are stored as they are, and known from then on."""
    if not event_ids and not everything and feature_set is None:
        raise PermanentError("name the events to release (`mojomesh quarantine list` shows them), or a --feature-set, or --all")
    asked = {"event_ids": [str(event_id) for event_id in event_ids] if event_ids else None, "feature_set": feature_set}
    released: list[str] = []
    with calling(mesh_env(state), "ingest") as ingest:
        while some := call(ingest, "POST", "/v1/quarantine:release", json=asked)["released"]:
            released += some
    if as_json:
        print_json(released)
    else:
        out.print(f"[bold]{len(released):,}[/] released.")
