"""Predicting, and predicting again what was predicted."""

from datetime import UTC, datetime
from math import isfinite, nan
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from rich.markup import escape

from mojomesh_chassis.errors import PermanentError
from mojomesh_cli.calls import call
from mojomesh_cli.connection import DEFAULT_STATE, State, calling, mesh_env
from mojomesh_cli.console import AsJson, out, print_json
from mojomesh_cli.features import PredictionId, receipt

Json = dict[str, Any]


class NotTheSame(PermanentError):
    """A replay gave other scores than the receipt says."""


def score(
    model: Annotated[str, typer.Argument(help="Name of the model.", show_default=False)],
    values: Annotated[
        list[str] | None, typer.Argument(help="Values by column, as in `carrier=UA distance=1400`; the others are missing.")
    ] = None,
    more_values: Annotated[list[str] | None, typer.Option("--values", help="The same, as an option.")] = None,
    entity: Annotated[str | None, typer.Option("--entity", help="Whose features are looked up.")] = None,
    at: Annotated[datetime | None, typer.Option("--at", help="As of when, UTC.", show_default="now")] = None,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Predict for an entity, whose features are looked up, or for given values."""
    pairs = [*(more_values or []), *(values or [])]
    if bool(pairs) == (entity is not None):
        raise PermanentError("say what to predict for: --entity ID, or values by column as in `carrier=UA distance=1400`")
    with calling(mesh_env(state), "scorer") as scorer:
        asked: Json = {"entity_id": entity} if entity else {"values": read_values(pairs, _columns(scorer, model))}
        if at is not None:
            asked["event_time"] = at.replace(tzinfo=UTC).isoformat()
        answer = call(scorer, "POST", f"/v1/models/{quote(model, safe='')}:score", json=asked)
    if as_json:
        print_json(answer)
        return
    of_classes = ", ".join(f"{name}: {value:.4f}" for name, value in (answer["scores"] or {}).items())
    out.print(f"[bold]{answer['score']:.6f}[/]  {escape(of_classes)}")
    out.print(f"by {escape(model)} version {answer['version']}; why: mojomesh why {answer['prediction_id']}", soft_wrap=True)


def replay(prediction_id: PredictionId, state: State = DEFAULT_STATE, as_json: AsJson = False) -> None:
    """Compute a prediction anew from its bundle and inputs; ends with status 1 unless it is the same to the last bit."""
    env = mesh_env(state)
    with calling(env, "features") as features, calling(env, "scorer_admin", timeout_s=120) as scorer:
        made = receipt(features, prediction_id)
        asked = {"bundle_digest": made["bundle_digest"], "inputs": made["inputs"]}
        scores = call(scorer, "POST", "/admin/replay", json=asked)["scores"]
    same = scores == made["scores"]  # JSON carries the shortest text of a double, which reads back as that double
    if as_json:
        print_json({"prediction_id": str(prediction_id), "then": made["scores"], "now": scores, "same": same})
    elif same:
        out.print(f"[green]The same to the last bit[/]: {', '.join(map(repr, scores))}, by bundle {made['bundle_digest']}")
    if not same:
        raise NotTheSame(f"bundle {made['bundle_digest']} gives {scores} now, and gave {made['scores']}")


def read_values(pairs: list[str], columns: dict[str, str]) -> Json:
    """`column=value` texts as the values that a model takes, by the type of each of its `columns`; an empty value is missing.

    Raises:
        PermanentError: A text is no pair, names no column, or its value is not of the column's type.
    """
    values: Json = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise PermanentError(f"'{pair}' is not column=value")
        if name not in columns:
            raise PermanentError(f"the model has no column '{name}'; it has {', '.join(columns)}")
        values[name] = _read_value(name, columns[name], value) if value else None
    return values


def _read_value(name: str, kind: str, value: str) -> float | bool | str:
    truths = {"true": True, "1": True, "false": False, "0": False}
    if kind == "category":
        return value
    if kind == "boolean" and value.lower() in truths:
        return truths[value.lower()]
    try:
        number = float(value)
    except ValueError:
        number = nan
    if kind == "boolean" or not isfinite(number):
        raise PermanentError(f"'{name}' is a {kind}, which '{value}' is not")
    return number


def _columns(scorer: httpx.Client, model: str) -> dict[str, str]:
    served: list[Json] = call(scorer, "GET", "/v1/models")
    for found in served:
        if found["model"] == model:
            return {column["name"]: column["type"] for column in found["columns"]}
    names = ", ".join(found["model"] for found in served)
    raise PermanentError(f"no model '{model}' is served; served are: {names or 'none, train one first'}")
