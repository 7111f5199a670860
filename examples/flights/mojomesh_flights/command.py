"""`mojomesh demo`."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer


def demo(
    pace: Annotated[int, typer.Option(min=1, help="Facts told a second, once there is a model.")] = 4_000,
    load: Annotated[int, typer.Option(min=1, help="HTTP requests a second; more around a swap.")] = 60,
    drift: Annotated[bool, typer.Option(help="--no-drift is the control: the model is never retrained by itself.")] = True,
    until: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Stop before the end of the year.")] = None,
    reports: Annotated[Path, typer.Option(help="Where demo.json and demo.html go.")] = Path("reports"),
    state: Annotated[Path, typer.Option(help="State folder of the demo's own mesh; emptied first.")] = Path(".mojomesh/demo"),
    keep: Annotated[bool, typer.Option(help="Leave the state folder, for `mojomesh up --state` to go on from.")] = False,
) -> None:
    """Carry a year of real flights through a whole mesh: train, score, drift, retrain, swap, and show the evidence."""
    # Imported here: matplotlib and H2O would slow down every other command.
    from mojomesh_flights.dataset import WHOLE_YEAR
    from mojomesh_flights.demo import run_demo
    from mojomesh_flights.replay import Plan

    end = until.replace(tzinfo=UTC) if until else WHOLE_YEAR
    page = run_demo(Plan(until=end, pace=pace, load=load, drift=drift), reports, state, keep=keep)
    typer.echo(f"The evidence: {page} and {page.with_suffix('.json')}")
