"""Looking behind predictions: why one was made, and how far live data has moved."""

from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

import httpx
import typer
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from mojomesh_chassis.errors import NotFound
from mojomesh_cli.calls import call
from mojomesh_cli.connection import DEFAULT_STATE, State, calling, mesh_env
from mojomesh_cli.console import AsJson, out, print_json

Json = dict[str, Any]
PredictionId = Annotated[UUID, typer.Argument(help="Id of the prediction, as the answer gave it.", show_default=False)]
SHOWN_COLUMNS = 3  # a window


def why(prediction_id: PredictionId, state: State = DEFAULT_STATE, as_json: AsJson = False) -> None:
    """Show what a prediction was made of: model version, signature, snapshot, cause, and the feature rows used."""
    env = mesh_env(state)
    with calling(env, "features") as features, calling(env, "registry") as registry:
        prediction = receipt(features, prediction_id)
        path = f"/v1/models/{quote(prediction['model'], safe='')}/versions/{prediction['version']}"
        version = call(registry, "GET", path)
        manifest = version["manifest"]
        asked = {"model": manifest["definition"], "snapshot_time": manifest["snapshot_time"]}
        erasures = call(features, "POST", "/v1/snapshots:erasures", json=asked)["erasures"]
        rows = [_row_then(features, key) for key in prediction["rows"]]
    if as_json:
        print_json({"prediction": prediction, "version": version, "snapshot_erasures": erasures, "rows": rows})
    else:
        out.print(_lineage(prediction, version, erasures, rows))


def drift(
    model: Annotated[str, typer.Argument(help="Name of the model.", show_default=False)],
    windows: Annotated[int, typer.Option("--windows", min=1, help="How many of the last windows.")] = 20,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Show the last windows of live data against the champion's baseline: PSI, KL, and what was over its threshold."""
    with calling(mesh_env(state), "features") as features:
        report = call(features, "GET", f"/v1/drift/{quote(model, safe='')}", params={"limit": windows})
    if as_json:
        print_json(report)
    elif not report["windows"]:
        out.print(f"No window of {escape(model)} is full yet: only predictions for an entity count, each entity and event time once.")
    else:
        out.print(_windows_table(report["windows"]))
        for alert in report["alerts"]:
            out.print(
                f"[red]alert[/] {alert['event_id']}: {escape(alert['feature'])} {alert['measure']} {alert['value']:.3f} over "
                f"{alert['threshold']:.3f} in {alert['windows']} windows to {alert['window_to'][:16]}, version {alert['version']}"
            )


def receipt(features: httpx.Client, prediction_id: UUID) -> Json:
    """The receipt of a prediction, as features keeps it.

    Raises:
        CallFailed: There is none.
        NotFound: Nothing is left in it.
    """
    found: Json = call(features, "GET", f"/v1/predictions/{prediction_id}")
    if found["forgotten_at"]:
        raise NotFound(f"the receipt of {prediction_id} was emptied at {found['forgotten_at'][:19]}: whom it was about has been forgotten")
    return found


def _row_then(features: httpx.Client, key: Json) -> Json:
    """A feature row as it was known when it was used: a correction since does not show."""
    path = f"/v1/features/{quote(key['feature_set'], safe='')}/{quote(key['entity_id'], safe='')}"
    row: Json = call(features, "GET", path, params={"at": key["event_time"], "snapshot_time": key["created_at"]})
    return row


def _lineage(prediction: Json, version: Json, erasures: list[str], rows: list[Json]) -> Tree:
    manifest = version["manifest"]
    tree = Tree(f"[bold]prediction {prediction['prediction_id']}[/]")
    tree.add(f"scores {', '.join(f'{score:.6f}' for score in prediction['scores'])}, made at {prediction['made_at'][:19]}")
    tree.add(f"of {escape(prediction['entity_id'] or 'values that the caller gave')} as of {prediction['event_time'][:19]}")
    model = tree.add(f"by [bold]{escape(prediction['model'])}[/] version {prediction['version']}, {version['state']}")
    model.add(f"bundle {prediction['bundle_digest']}")
    model.add(f"signature verified by registry, {version['registered_at'][:19]}, and by each scorer before it loaded the model")
    model.add(f"because of {version['cause']['kind']}: {escape(version['cause']['reason'])} (event {version['cause']['event_id']})")
    snapshot = model.add(f"snapshot of what was known at {manifest['snapshot_time'][:19]}: {manifest['n_rows']:,} rows")
    snapshot.add(f"digest {manifest['snapshot_digest']}")
    snapshot.add(f"labels known from {manifest['train_from'][:10]} to {manifest['train_to'][:10]}")
    for erased_at in erasures:
        snapshot.add(f"[yellow]affected[/]: facts in it were erased at {erased_at[:19]}; taken again it has another digest")
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in version["metrics"].items() if isinstance(value, float))
    folds = model.add(f"{manifest['algorithm']}, {len(manifest['folds'])} folds: {metrics}")
    for fold in manifest["folds"]:
        folds.add(f"fold {fold['fold']}: tested on {fold['test_from'][:10]} to {fold['test_to'][:10]}, H2O job {escape(fold['h2o_job'])}")
    used = tree.add("from the feature rows" if rows else "from values that the caller gave; the receipt keeps them encoded")
    for row in rows:
        head = f"{row['feature_set']} of {escape(row['entity_id'])}, true at {row['event_time'][:19]}, known at {row['created_at'][:19]}"
        used.add(head).add(escape(", ".join(f"{name} {value}" for name, value in row["values"].items())))
    return tree


def _windows_table(windows: list[Json]) -> Table:
    table = Table("window", "version", "event times", "farthest from the baseline", box=None, padding=(0, 2, 0, 0))
    for window in windows:
        worst = sorted(window["columns"].items(), key=lambda item: -_excess(item[1]))[:SHOWN_COLUMNS]
        shown = [f"[red]{_distance(*item)}[/]" if _excess(item[1]) > 1 else _distance(*item) for item in worst]
        times = f"{window['window_from'][:16]} … {window['window_to'][:16]}"
        table.add_row(f"{window['promotion']}.{window['number']}", str(window["version"]), times, "  ".join(shown))
    return table


def _excess(measured: Json) -> float:
    return float(max(measured["psi"] / measured["psi_threshold"], measured["kl"] / measured["kl_threshold"]))


def _distance(column: str, measured: Json) -> str:
    return f"{escape(column)} psi {measured['psi']:.3f} of {measured['psi_threshold']:.2f}, kl {measured['kl']:.3f}"
