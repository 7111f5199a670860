"""Versions that score beside the champion: challengers with a share of the entities, and shadows."""

from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mojomesh_chassis.errors import PermanentError
from mojomesh_cli.calls import call
from mojomesh_cli.connection import DEFAULT_STATE, State, calling, mesh_env
from mojomesh_cli.console import AsJson, out, print_json
from mojomesh_cli.models import Model, Reason, path_of

Json = dict[str, Any]


def traffic(
    model: Model,
    versions: Annotated[
        list[str] | None, typer.Argument(metavar="[VERSION=SHARE | VERSION=shadow]...", help="All of them, as in 3=0.05 4=shadow.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Leave everything to the champion.")] = False,
    reason: Reason = None,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Let versions score beside the champion; without any, show which do, and what shadows made of the champion's rows."""
    if clear and versions:
        raise PermanentError("either --clear or versions")
    asked = {"challengers": [_asked(text) for text in versions or []], "reason": reason}
    with calling(mesh_env(state), "registry") as registry:
        change = clear or versions
        answer = (
            call(registry, "PUT", f"{path_of(model)}/traffic", json=asked) if change else call(registry, "GET", f"{path_of(model)}/traffic")
        )
        answer |= call(registry, "GET", f"{path_of(model)}/shadows")
    if as_json:
        print_json(answer)
    else:
        _print(answer)


def _asked(text: str) -> Json:
    version, _, share = text.partition("=")
    try:
        return {"version": int(version), "share": None if share == "shadow" else str(Decimal(share))}
    except (ValueError, InvalidOperation):
        raise PermanentError(f"'{text}' is neither VERSION=SHARE nor VERSION=shadow, as in 3=0.05") from None


def _print(answer: Json) -> None:
    challengers = answer["challengers"]
    rest = 1 - sum(one["share"] or 0 for one in challengers)
    out.print(f"[green]version {answer['champion']}[/] is the champion of {answer['model']} and scores {rest:.1%} of the entities")
    for one in challengers:
        share = "is a shadow" if one["share"] is None else f"scores {one['share']:.1%} of the entities"
        out.print(f"version {one['version']} {share}")
    for scorer in answer["followers"]:
        for left_out in scorer["left_out"]:
            out.print(f"[red]scorer {scorer['replica']} leaves version {left_out['version']} out:[/] {escape(left_out['reason'])}")
        if scorer["setting"] < answer["setting"]:
            out.print(f"[yellow]scorer {scorer['replica']}[/] still follows setting {scorer['setting']} of {answer['setting']}")
    if not answer["shadows"]:
        return
    table = Table("shadow", "of", "rows", "not scored", "PSI", "mean difference", "agree", box=None, padding=(0, 2, 0, 0))
    for shadow in answer["shadows"]:
        table.add_row(
            f"version {shadow['shadow_version']}",
            f"version {shadow['version']}",
            str(shadow["n_rows"]),
            str(shadow["n_dropped"]),
            f"{shadow['psi']:.4f}",
            f"{shadow['mean_absolute_difference']:.4f}",
            "" if shadow["agreement"] is None else f"{shadow['agreement']:.1%}",
        )
    out.print(table)
