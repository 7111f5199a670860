from collections.abc import Iterator
from typing import Any

import yaml

from mojomesh_contracts.asyncapi import DOCUMENT, MESH, WRITE_COMMAND, document, text
from mojomesh_contracts.events import EVENTS


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from ([node["$ref"]] if "$ref" in node else [])
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from references(part)


def test_the_document_checked_in_is_current() -> None:
    assert DOCUMENT.read_text() == text(), f"run `{WRITE_COMMAND}` and commit the file"


def test_every_reference_of_the_document_leads_somewhere() -> None:
    whole = yaml.safe_load(text())
    for reference in references(whole):
        node = whole
        for name in reference.removeprefix("#/").split("/"):
            assert name in node, reference
            node = node[name]


def test_every_event_is_published_and_consumed_by_somebody() -> None:
    published = {event for part in MESH for event in part.publishes}
    consumed = {event for part in MESH for event in (*part.work, *part.broadcast, *part.reads)}
    assert published == consumed == set(EVENTS)


def test_what_every_replica_reads_from_the_beginning_is_compacted() -> None:
    broadcast = {event for part in MESH for event in part.broadcast}
    assert broadcast
    assert all(event.topic.compacted for event in broadcast)


def test_the_document_names_every_topic() -> None:
    assert set(document()["channels"]) == {event.topic.name for event in EVENTS}
