"""Who tells whom what: the mesh as data, and the AsyncAPI 3.0 document generated from it.

Run as a program it writes the document: `python -m mojomesh_contracts.asyncapi --write`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic.json_schema import models_json_schema

from mojomesh_contracts.events import (
    EVENTS,
    DefinitionApplied,
    DriftDetected,
    Event,
    EventParked,
    EventReceived,
    FeaturesWritten,
    FoldTrained,
    ModelDeployed,
    ModelPromoted,
    ModelReady,
    PredictionsMade,
    QualityBreached,
    ScoreRequested,
    ShadowCompared,
    TrafficFollowed,
    TrafficSet,
    TrainingRequested,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "asyncapi.yaml"
WRITE_COMMAND = "python -m mojomesh_contracts.asyncapi --write"


@dataclass(frozen=True)
class Part:
    """One member of the mesh and its subscriptions: `work` is shared by its replicas, `broadcast` reaches each, `reads` is as it likes."""

    name: str
    work: tuple[type[Event], ...] = ()
    broadcast: tuple[type[Event], ...] = ()
    reads: tuple[type[Event], ...] = ()
    publishes: tuple[type[Event], ...] = ()


MESH: tuple[Part, ...] = (
    Part("clients", reads=(QualityBreached,), publishes=(EventReceived, ScoreRequested)),
    Part(
        "ingest",
        work=(EventReceived, EventParked),
        broadcast=(DefinitionApplied,),
        publishes=(EventReceived, EventParked, FeaturesWritten),
    ),
    Part(
        "features",
        work=(FeaturesWritten, PredictionsMade),
        broadcast=(ModelPromoted, DefinitionApplied),
        publishes=(DriftDetected, QualityBreached),
    ),
    Part(
        "trainer",
        work=(TrainingRequested, DriftDetected),
        broadcast=(DefinitionApplied,),
        publishes=(FoldTrained, ModelReady),
    ),
    Part(
        "registry",
        work=(ModelReady, FoldTrained, ModelDeployed, ShadowCompared, TrafficFollowed),
        publishes=(DefinitionApplied, TrainingRequested, ModelPromoted, TrafficSet),
    ),
    Part(
        "scorer",
        work=(ScoreRequested,),
        broadcast=(DefinitionApplied, ModelPromoted, TrafficSet),
        publishes=(PredictionsMade, ModelDeployed, ShadowCompared, TrafficFollowed),
    ),
)
"""The services' routers are tested against this table."""


def document() -> dict[str, Any]:
    """The whole mesh as one AsyncAPI 3.0 document: a channel a topic, an operation a subscription or publication."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "mojomesh",
            "version": "1.0.0",
            "description": "Every event of the mesh, who publishes it and who consumes it. Generated: " + WRITE_COMMAND,
            "license": {"name": "Apache-2.0"},
            "tags": [{"name": part.name} for part in MESH],
        },
        "defaultContentType": "application/json",
        "channels": {event.topic.name: _channel(event) for event in EVENTS},
        "operations": dict(_operation(part, verb, event) for part in MESH for verb, event in _doings(part)),
        "components": {"messages": {event.__name__: _message(event) for event in EVENTS}, "schemas": _schemas()},
    }


def _doings(part: Part) -> list[tuple[str, type[Event]]]:
    doings = [("work", event) for event in part.work] + [("broadcast", event) for event in part.broadcast]
    doings += [("read", event) for event in part.reads]
    return doings + [("publish", event) for event in part.publishes]


def _channel(event: type[Event]) -> dict[str, Any]:
    topic = event.topic
    configuration: dict[str, Any] = {"cleanup.policy": ["compact" if topic.compacted else "delete"]}
    if not topic.compacted:
        configuration["retention.ms"] = int(topic.retention.total_seconds() * 1000)
    return {
        "address": topic.name,
        "description": f"Records no consumer could handle go to {topic.dead_letters.name}, bytes and headers as they came.",
        "messages": {event.__name__: {"$ref": f"#/components/messages/{event.__name__}"}},
        "bindings": {"kafka": {"partitions": topic.partitions, "topicConfiguration": configuration, "bindingVersion": "0.5.0"}},
    }


def _operation(part: Part, verb: str, event: type[Event]) -> tuple[str, dict[str, Any]]:
    channel = f"#/channels/{event.topic.name}"
    operation: dict[str, Any] = {
        "action": "send" if verb == "publish" else "receive",
        "channel": {"$ref": channel},
        "tags": [{"name": part.name}],
        "messages": [{"$ref": f"{channel}/messages/{event.__name__}"}],
    }
    if verb == "work":
        operation["summary"] = f"Shared by the replicas of {part.name}: each record is handled by one of them."
        group = {"type": "string", "enum": [f"{part.name}.{event.topic.name}"]}
        operation["bindings"] = {"kafka": {"groupId": group, "bindingVersion": "0.5.0"}}
    elif verb == "broadcast":
        operation["summary"] = f"Every replica of {part.name} reads all records from the beginning."
    return f"{part.name}.{verb}.{event.topic.name}", operation


def _message(event: type[Event]) -> dict[str, Any]:
    return {
        "name": event.__name__,
        "summary": (event.__doc__ or "").splitlines()[0],
        "payload": {"$ref": f"#/components/schemas/{event.__name__}"},
        "bindings": {
            "kafka": {"key": {"type": "string", "description": f"From `{event.keyed_by}`: keeps order"}, "bindingVersion": "0.5.0"}
        },
    }


def _schemas() -> dict[str, Any]:
    _, schema = models_json_schema([(event, "validation") for event in EVENTS], ref_template="#/components/schemas/{model}")
    return dict(schema["$defs"])


def text() -> str:
    """The document as YAML, as it is checked in."""
    return yaml.safe_dump(document(), sort_keys=False, width=140, allow_unicode=True)


def main(arguments: list[str]) -> int:
    """Write the document, or print it."""
    if "--write" in arguments:
        DOCUMENT.write_text(text())
    else:
        sys.stdout.write(text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
