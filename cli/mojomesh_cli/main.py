"""The `mojomesh` command. Each family of commands is a module of plain functions; here they get their names."""

import logging
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

import typer

from mojomesh_chassis.errors import MeshError, TransientError
from mojomesh_chassis.telemetry import log_beside_answers
from mojomesh_cli import dead_letters, definitions, features, models, publish, quality, scoring, stack, store, traffic
from mojomesh_cli.console import complain
from mojomesh_local.errors import LocalError

app = typer.Typer(
    name="mojomesh",
    help="Turn a stream of events into live predictions, and keep the model behind them honest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "The mesh on this machine": (stack.up, stack.down, stack.status, stack.logs, stack.doctor, stack.reset, stack.migrate),
    "Definitions and models": (definitions.apply, models.train, models.models, models.promote, models.rollback, traffic.traffic),
    "Data": (publish.publish, quality.quality),
    "Predictions": (scoring.score, features.why, scoring.replay, features.drift),
}

for panel, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)

app.add_typer(dead_letters.dlt, name="dlt", rich_help_panel="Data")
app.add_typer(quality.quarantine, name="quarantine", rich_help_panel="Data")
app.add_typer(store.store, name="store", rich_help_panel="Data")

# Other packages add commands of their own, as the demo does.
for added in entry_points(group="mojomesh.commands"):
    app.command(name=added.name, rich_help_panel="More")(added.load())


def main() -> None:
    """Run a command; what a person can act on is told in one line and no traceback."""
    log_beside_answers()
    logging.getLogger("aiokafka").addHandler(logging.NullHandler())  # the error that follows says the same
    try:
        app()
    except TransientError as error:
        complain(f"{error}. Look with `mojomesh status`, start with `mojomesh up`.")
        sys.exit(1)
    except (MeshError, LocalError) as error:
        complain(str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
