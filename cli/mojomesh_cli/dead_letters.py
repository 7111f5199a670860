"""Dead letters: what no consumer could handle, why, and sending it again."""

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from mojomesh_chassis.dead_letters import DeadLetter, read_dead_letters
from mojomesh_chassis.dead_letters import replay as replay_letters
from mojomesh_chassis.errors import NotFound, PermanentError
from mojomesh_chassis.publishing import Publisher
from mojomesh_cli.connection import DEFAULT_STATE, State, mesh_env, need
from mojomesh_cli.console import AsJson, out, print_json
from mojomesh_contracts.events import EVENTS

dlt = typer.Typer(help="Look at records that could not be handled, and send them again.", no_args_is_help=True)

OfTopic = Annotated[str | None, typer.Option("--topic", help="Only letters that came by this topic.")]
LetterId = Annotated[str, typer.Argument(metavar="ID", help="topic/partition/offset, as `dlt list` shows it.")]


@dlt.command("list")
def list_letters(
    topic: OfTopic = None,
    replayed: Annotated[bool, typer.Option("--replayed", help="Those that were sent again, too.")] = False,
    limit: Annotated[int, typer.Option(help="Show only the newest.")] = 50,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """List dead letters, oldest first."""
    letters = [letter for letter in _letters(_kafka(state), topic) if replayed or letter.replayed_at is None]
    shown = letters[-limit:]
    if as_json:
        print_json([_as_document(letter) for letter in shown])
        return
    if not letters:
        out.print("No dead letters.")
        return
    table = Table(Column("id", no_wrap=True), "failed at", "service", Column("reason", overflow="fold"))  # an id is there to be copied
    for letter in shown:
        done = " [dim](replayed)[/]" if letter.replayed_at else ""
        table.add_row(letter.letter_id, f"{letter.failed_at:%Y-%m-%d %H:%M:%S}", letter.service, escape(letter.reason) + done)
    out.print(table)
    if len(letters) > limit:
        out.print(f"{len(letters) - limit:,} older ones are not shown; see --limit.")


@dlt.command("show")
def show_letter(letter_id: LetterId, state: State = DEFAULT_STATE, as_json: AsJson = False) -> None:
    """Show one dead letter: the record as it came, and why it could not be handled."""
    letter = _named([letter_id], _letters(_kafka(state), _topic_of(letter_id)))[0]
    if as_json:
        print_json(_as_document(letter))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in _as_document(letter).items():
        text = json.dumps(value, indent=2, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
        table.add_row(f"[bold]{name}[/]", escape(text))
    out.print(table)


@dlt.command("replay")
def replay(
    letter_ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Which ones; none: all that --topic leaves.")] = None,
    topic: OfTopic = None,
    everything: Annotated[bool, typer.Option("--all", help="All that were not replayed yet.")] = False,
    state: State = DEFAULT_STATE,
    as_json: AsJson = False,
) -> None:
    """Send dead letters to the topic they came from, byte for byte, once their cause is mended."""
    if not letter_ids and not everything and topic is None:
        raise PermanentError("name the letters to replay (`mojomesh dlt list` shows them), or a --topic, or --all")
    kafka = _kafka(state)
    letters = _letters(kafka, topic)
    chosen = _named(letter_ids, letters) if letter_ids else [letter for letter in letters if letter.replayed_at is None]
    asyncio.run(_replay(kafka, chosen))
    if as_json:
        print_json([letter.letter_id for letter in chosen])
    else:
        out.print(f"[bold]{len(chosen):,}[/] replayed. What fails again comes back as a new dead letter.")


def _kafka(state: Path) -> str:
    return need(mesh_env(state), "MOJOMESH_KAFKA")


def _letters(kafka: str, topic: str | None) -> list[DeadLetter]:
    topics = {event.topic.name: event.topic for event in EVENTS}
    if topic is not None and topic not in topics:
        raise NotFound(f"no topic '{topic}'; there are: {', '.join(topics)}")
    return asyncio.run(read_dead_letters(kafka, list(topics.values()) if topic is None else [topics[topic]]))


async def _replay(kafka: str, letters: list[DeadLetter]) -> None:
    publisher = Publisher(kafka)
    try:
        await replay_letters(publisher, letters)
    finally:
        await publisher.close()


def _named(letter_ids: list[str], letters: list[DeadLetter]) -> list[DeadLetter]:
    by_id = {letter.letter_id: letter for letter in letters}
    if unknown := [letter_id for letter_id in letter_ids if letter_id not in by_id]:
        raise NotFound(f"no dead letter {', '.join(unknown)}; `mojomesh dlt list` shows those there are")
    return [by_id[letter_id] for letter_id in letter_ids]


def _topic_of(letter_id: str) -> str:
    return letter_id.partition("/")[0]


def _as_document(letter: DeadLetter) -> dict[str, Any]:
    """A letter for people and JSON: bytes as JSON or text where they are that, else as Python writes them."""
    return {
        "id": letter.letter_id,
        "reason": letter.reason,
        "service": letter.service,
        "failed_at": letter.failed_at.isoformat(),
        "replayed_at": letter.replayed_at.isoformat() if letter.replayed_at else None,
        "key": _readable(letter.key),
        "headers": {name: _readable(value) for name, value in letter.headers},
        "value": _readable(letter.value),
    }


def _readable(raw: bytes | None) -> Any:
    if raw is None:
        return None
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return repr(raw)
    try:
        return json.loads(text)
    except ValueError:
        return text
