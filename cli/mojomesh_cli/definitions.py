"""Putting feature sets and models in force."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from mojomesh_chassis.errors import PermanentError
from mojomesh_cli.calls import call
from mojomesh_cli.connection import DEFAULT_STATE, State, calling, mesh_env
from mojomesh_cli.console import AsJson, out, print_json
from mojomesh_contracts.definitions import DefinitionError, definition_id, parse_definitions

Json = dict[str, Any]

_MARKS = {"created": "[green]+[/]", "changed": "[yellow]~[/]", "unchanged": "[dim]=[/]"}


class BadDefinitions(PermanentError):
    """What is wrong with files, found before anything was sent."""


def apply(
    path: Annotated[Path, typer.Argument(help="A YAML file, or a folder: all *.yaml and *.yml below it, together.", show_default=False)],
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Put feature sets and models in force, all or none."""
    text = read_documents(path)
    with calling(mesh_env(state), "registry") as registry:
        before = _in_force(registry)
        applied = call(registry, "PUT", "/v1/definitions", content=text, headers={"Content-Type": "application/yaml"})["applied"]
        after = _in_force(registry)
    for one in applied:
        one["changes"] = list(changes(before.get(one["definition_id"], {}), after[one["definition_id"]])) if _is_change(one) else []
    if as_json:
        print_json({"applied": applied})
        return
    for one in applied:
        out.print(f"{_MARKS[one['outcome']]} {one['definition_id']} version {one['version']} [dim]{one['outcome']}[/]")
        for change in one["changes"]:
            out.print(f"    {escape(change)}")


def read_documents(path: Path) -> str:
    """The YAML stream of a file, or of all files below a folder, each document read once to find what is wrong with it.

    Raises:
        BadDefinitions: There is no such file, no document, or something is wrong; the text names file and field.
    """
    if not path.exists():
        raise BadDefinitions(f"there is no {path}. Name a YAML file or a folder of them.")
    files = sorted(file for file in path.rglob("*") if file.suffix in (".yaml", ".yml")) if path.is_dir() else [path]
    problems, seen, texts = [], dict[str, Path](), []
    for file in files:
        text = file.read_text()
        try:
            names = [definition_id(definition) for definition in parse_definitions(text)]
        except DefinitionError as error:
            problems.append(f"{file}: {error}")
            continue
        problems += [f"{file}: {name} is also in {seen[name]}" for name in names if name in seen]
        seen |= dict.fromkeys(names, file)
        texts.append(text)
    if problems:
        raise BadDefinitions("nothing was applied.\n  " + "\n  ".join(problems))
    if not seen:
        raise BadDefinitions(f"{path} holds no definition; a document begins with `kind: FeatureSet` or `kind: Model`.")
    return "\n---\n".join(texts)


def changes(old: Json, new: Json) -> Iterator[str]:
    """What differs between two documents, a line per field, in the new one's order; what is gone comes last."""
    before, now = dict(_fields(old, "")), dict(_fields(new, ""))
    for name, value in now.items():
        if name not in before:
            yield f"+ {name}: {value}"
        elif before[name] != value:
            yield f"~ {name}: {before[name]} → {value}"
    yield from (f"- {name}: {value}" for name, value in before.items() if name not in now)


def _fields(document: Json, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_change(one: Json) -> bool:
    return bool(one["outcome"] == "changed")


def _in_force(registry: Any) -> dict[str, Json]:
    return {row["definition_id"]: row["definition"] for row in call(registry, "GET", "/v1/definitions")["definitions"]}
