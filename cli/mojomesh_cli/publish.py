"""Publishing the rows of a file as events."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from mojomesh_chassis.definitions import read_definitions
from mojomesh_chassis.errors import PermanentError
from mojomesh_chassis.publishing import Publisher
from mojomesh_cli.connection import DEFAULT_STATE, State, mesh_env, need
from mojomesh_cli.console import AsJson, out, print_json
from mojomesh_cli.rows import Columns, Table, make_event, read_table, settle_columns
from mojomesh_contracts.definitions import FeatureSet
from mojomesh_contracts.events import EventReceived

CHUNK = 5_000
SHOWN = 10  # refused rows that are shown; all are counted


@dataclass
class Outcome:
    """What became of a file's rows."""

    published: int = 0
    refused: int = 0
    reasons: list[str] = field(default_factory=list)  # of the first refused rows
    ignored_columns: list[str] = field(default_factory=list)
    missing_features: list[str] = field(default_factory=list)

    def refuse(self, place: str, reason: str) -> None:
        """Count a row that is not published."""
        self.refused += 1
        if len(self.reasons) < SHOWN:
            self.reasons.append(f"{place}: {reason}")


def publish(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="CSV, JSONL (both also gzipped) or Parquet.")],
    feature_set: Annotated[str, typer.Option("--feature-set", "-f", help="What the rows are facts of.")],
    entity_column: Annotated[str, typer.Option(help="Column of the entity.", show_default="the feature set's entity")] = "",
    time_column: Annotated[str, typer.Option(help="Column of when it was true; without a zone it is UTC.")] = "event_time",
    id_column: Annotated[str, typer.Option(help="Column of event ids; where there is none, they come from the content.")] = "event_id",
    reported_column: Annotated[str, typer.Option(help="Column of when the source knew it, where there is one.")] = "reported_at",
    missing: Annotated[list[str] | None, typer.Option(help="Text of a CSV that means missing.", show_default="nothing, NA")] = None,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Publish the rows of a file as events; published twice they are stored once.

    Columns that are no feature of the set are left out. A row that breaks the feature set is not published, and said so.
    """
    kafka = need(mesh_env(state), "MOJOMESH_KAFKA")
    defined = asyncio.run(_feature_set(kafka, feature_set))
    table = read_table(file, frozenset(missing or ("", "NA")))
    wanted = Columns(entity_column or defined.entity, time_column, id_column, reported_column)
    columns = settle_columns(table, wanted, defined, file.name)
    outcome = Outcome(
        ignored_columns=[name for name in table.columns if name not in {*defined.features, *defined.vectors, *vars(columns).values()}],
        missing_features=[name for name in (*defined.features, *defined.vectors) if name not in table.columns],
    )
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=out, disable=as_json) as progress:
        task = progress.add_task("publishing")

        def tell() -> None:
            progress.update(task, description=f"{outcome.published:,} published, {outcome.refused:,} refused")

        asyncio.run(_send(kafka, _events(table, columns, defined, outcome), outcome, tell))
    if as_json:
        print_json(vars(outcome))
    else:
        _show(outcome)
    if outcome.refused:
        raise typer.Exit(1)


async def _feature_set(kafka: str, name: str) -> FeatureSet:
    return (await read_definitions(kafka)).feature_set(name)


def _events(table: Table, columns: Columns, feature_set: FeatureSet, outcome: Outcome) -> Iterator[list[EventReceived]]:
    """The file's events in chunks; what cannot be one is counted."""
    chunk: list[EventReceived] = []
    for place, row in table.rows:
        try:
            chunk.append(make_event(row, columns, feature_set))
        except PermanentError as error:
            outcome.refuse(place, str(error))
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _send(kafka: str, chunks: Iterator[list[EventReceived]], outcome: Outcome, tell: Callable[[], None]) -> None:
    publisher = Publisher(kafka)
    try:
        for chunk in chunks:
            await publisher.publish(chunk)
            outcome.published += len(chunk)
            tell()
    finally:
        await publisher.close()


def _show(outcome: Outcome) -> None:
    out.print(f"[bold]{outcome.published:,}[/] events published.")
    if outcome.ignored_columns:
        out.print(f"Left out, as they are no features: {', '.join(outcome.ignored_columns)}.", markup=False)
    if outcome.missing_features:
        out.print(f"Features that the file does not have: {', '.join(outcome.missing_features)}.", markup=False)
    if outcome.refused:
        out.print(f"[bold red]{outcome.refused:,}[/] rows refused:")
        for reason in outcome.reasons:
            out.print(f"  {reason}", markup=False)
        if outcome.refused > len(outcome.reasons):
            out.print(f"  and {outcome.refused - len(outcome.reasons):,} more")
