"""How every command talks: tables and colour for people, JSON for machines, complaints on standard error."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

# Into a pipe or a file goes every column whole: only a terminal has an edge.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 1_000)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)

AsJson = Annotated[bool, typer.Option("--json", help="Answer in JSON, for machines.")]


def print_json(answer: Any) -> None:
    """An answer for a machine: one JSON document, no colours, times as ISO text."""
    out.print(json.dumps(answer, indent=2, default=str), markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """What went wrong and what to do, for a person."""
    _errors.print(f"[bold red]mojomesh:[/] {escape(text)}")
