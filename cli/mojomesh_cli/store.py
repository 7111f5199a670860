"""The feature store's history."""

import typer
from rich.table import Table

from mojomesh_cli.calls import call
from mojomesh_cli.connection import DEFAULT_STATE, State, calling, mesh_env
from mojomesh_cli.console import AsJson, out, print_json

SEALING_S = 3600.0  # a large backlog takes its time

store = typer.Typer(help="Look after the feature store's history.", no_args_is_help=True)


@store.callback()
def _store() -> None:
    """Make `seal` a command of its own although it is the only one."""


@store.command()
def seal(state: State = DEFAULT_STATE, as_json: AsJson = False) -> None:
    """Seal every row that is known now into segments, instead of when it is due."""
    with calling(mesh_env(state), "features", SEALING_S) as features:
        sealed = call(features, "POST", "/v1/segments:seal")["segments"]
    if as_json:
        print_json(sealed)
    elif not sealed:
        out.print("Everything is sealed.")
    else:
        table = Table("feature set", "rows", "segment", box=None, padding=(0, 2, 0, 0))
        for segment in sealed:
            table.add_row(segment["feature_set"], f"{segment['n_rows']:,}", segment["path"])
        out.print(table)
