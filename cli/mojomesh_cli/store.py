"""The feature store's history."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mojomesh_chassis.definitions import read_definitions
from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.redis import open_redis
from mojomesh_cli.calls import call
from mojomesh_cli.connection import DEFAULT_STATE, State, calling, mesh_env, need
from mojomesh_cli.console import AsJson, out, print_json
from mojomesh_store import rebalancing
from mojomesh_store.online import OnlineStore
from mojomesh_store.rebalancing import Rebalanced
from mojomesh_store.shards import open_feature_store

SEALING_S = 3600.0  # a large backlog takes its time

store = typer.Typer(help="Look after the feature store's history.", no_args_is_help=True)


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


@store.command()
def forget(
    entity_id: Annotated[str, typer.Argument(metavar="ENTITY", help="The entity_id to forget.", show_default=False)],
    feature_sets: Annotated[
        list[str] | None, typer.Option("--feature-set", help="Only as an entity of this feature set; may be repeated. By default of all.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    work_folder: Annotated[
        Path | None,
        typer.Option(
            envvar="FEATURES_WORK_FOLDER",
            help="That of features on this machine: what killed processes left there goes too.",
            show_default="where it is by default",
        ),
    ] = None,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Erase an entity for ever: its rows, from segments and Redis too, its predictions, and snapshots that hold it."""
    if not yes:
        typer.confirm(f"Erase all that is known of '{entity_id}'? Nobody can bring it back.", abort=True)
    erased = asyncio.run(_forget(mesh_env(state), entity_id, feature_sets, work_folder))
    if as_json:
        print_json(erased)
        return
    rows = ", ".join(f"{n:,} of {escape(feature_set)}" for feature_set, n in erased["rows"].items() if n)
    out.print(f"Erased rows: {rows or 'none'}. Held events: {erased['held_events']:,}. Receipts emptied: {erased['predictions']:,}.")
    out.print(f"Segments written anew: {erased['segments']:,}. Snapshots removed: {erased['snapshots']:,}.")
    out.print("Kafka keeps what it was told until its retention ends, and models what they learned: docs/decisions/0017-erasure.md.")


@store.command()
def rebalance(state: State = DEFAULT_STATE, as_json: AsJson = False) -> None:
    """Place entities on all shards, while the mesh writes and reads: after a shard was added, and `mojomesh migrate` was run."""
    done = asyncio.run(_rebalance(mesh_env(state)))
    if as_json:
        print_json(done._asdict())
        return
    out.print(f"Added: shard {', '.join(map(str, done.added))}, with {done.copied:,} rows." if done.added else "Every shard has its share.")
    if done.cleaned:
        out.print(f"Taken away where they were copied from: {done.cleaned:,} rows.")
    if done.left:
        out.print(f"{done.left:,} rows stay there until they are sealed: run `mojomesh store seal`, and this again.")


async def _rebalance(env: dict[str, str]) -> Rebalanced:
    async with open_feature_store(need(env, "MOJOMESH_POSTGRES_OWNER").split(",")) as feature_store:
        return await rebalancing.rebalance(feature_store)


async def _forget(env: dict[str, str], entity_id: str, feature_sets: list[str] | None, work_folder: Path | None) -> dict[str, Any]:
    from mojomesh_cli.forgetting import Places, forget  # here: what it brings takes a second to import
    from mojomesh_features.work_folder import WORK_FOLDER

    definitions = await read_definitions(need(env, "MOJOMESH_KAFKA"))
    named = [definitions.feature_set(name).name for name in feature_sets or definitions.feature_sets]
    owners = need(env, "MOJOMESH_POSTGRES_OWNER").split(",")
    async with open_feature_store(owners) as feature_store, open_redis(need(env, "MOJOMESH_REDIS"), timeout_s=5) as redis:
        places = Places(feature_store, OnlineStore(redis), open_objects(need(env, "MOJOMESH_OBJECTS")), work_folder or WORK_FOLDER)
        return asdict(await forget(places, definitions, entity_id, named))
