"""What is declared: every definition in force, kept current by the compacted topic that registry writes."""

from collections.abc import Sequence

from mojomesh_chassis.consuming import CatchesUp, MeshRouter
from mojomesh_chassis.errors import NotFound
from mojomesh_chassis.reading import read_topics
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.definitions import DefinitionError, FeatureSet, Model, definition_id, parse_definition
from mojomesh_contracts.events import DefinitionApplied, Event


class Definitions(CatchesUp):
    """Feature sets and models by name."""

    event = DefinitionApplied

    def __init__(self, *definitions: FeatureSet | Model) -> None:
        self.feature_sets: dict[str, FeatureSet] = {}
        self.models: dict[str, Model] = {}
        self.versions: dict[str, int] = {}
        self.n_changes = 0
        """For who keeps what follows from definitions: another number says that it may have changed."""
        for definition in definitions:
            self.put(definition, 1)

    def put(self, definition: FeatureSet | Model, version: int) -> None:
        """Take over a definition, unless a later version is known."""
        identity = definition_id(definition)
        if version < self.versions.get(identity, 0):
            return
        self.versions[identity] = version
        self.n_changes += 1
        if isinstance(definition, FeatureSet):
            self.feature_sets[definition.name] = definition
        else:
            self.models[definition.name] = definition

    def feature_set(self, name: str) -> FeatureSet:
        """The feature set of that name.

        Raises:
            NotFound: There is none; the text lists those there are.
        """
        if (found := self.feature_sets.get(name)) is None:
            raise NotFound(f"no feature set '{name}'; there are: {', '.join(sorted(self.feature_sets)) or 'none, apply some first'}")
        return found

    def model(self, name: str) -> Model:
        """The model of that name.

        Raises:
            NotFound: There is none; the text lists those there are.
        """
        if (found := self.models.get(name)) is None:
            raise NotFound(f"no model '{name}'; there are: {', '.join(sorted(self.models)) or 'none, apply some first'}")
        return found


async def on_definitions_applied(events: Sequence[DefinitionApplied], definitions: Definitions) -> list[Event]:
    """Keep `definitions` current."""
    for event in events:
        try:
            definitions.put(parse_definition(event.definition), event.version)
        except DefinitionError as error:  # written by a newer registry: the others still count
            log.error("definition_not_understood", definition=event.definition_id, reason=str(error))
    return []


def subscribe_definitions(router: MeshRouter) -> None:
    """Let a service's `definitions` resource follow the topic."""
    router.broadcast(DefinitionApplied)(on_definitions_applied)


async def read_definitions(kafka: str) -> Definitions:
    """What is declared now, for a program that does not stay.

    Raises:
        TransientError: Nobody answers at `kafka`.
    """
    definitions = Definitions()
    async for record in read_topics(kafka, [DefinitionApplied.topic.name]):
        await on_definitions_applied([DefinitionApplied.model_validate_json(record.value)], definitions)
    return definitions
