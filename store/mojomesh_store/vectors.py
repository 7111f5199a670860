"""What a model's vector is made of: which rows, joined how, under which column names. Online and offline follow the same plan."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from mojomesh_chassis.definitions import Definitions
from mojomesh_contracts.bundles import Column
from mojomesh_contracts.definitions import FeatureSet, FeatureSource, Model, column_name
from mojomesh_contracts.events import FeatureValue
from mojomesh_store.errors import UnusableDefinition
from mojomesh_store.online import Entity, OnlineRow

AsOf = tuple[Entity, int]
"""An entity, and the event time in microseconds since 1970 as of which its row is asked for."""

_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Source:
    """One feature set of a model: its columns, and how its row is found for a row of the spine."""

    feature_set: str
    join: str | None  # a feature of the spine that holds the entity_id; none: the same entity
    max_age_us: int | None  # at the event time; an older row counts as missing
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Plan:
    """How a model's vectors are put together."""

    model: Model
    spine: FeatureSet
    sources: tuple[Source, ...]

    @property
    def columns(self) -> list[Column]:
        """In the order of the definition, which is the order of the snapshot's."""
        return [column for source in self.sources for column in source.columns]

    @property
    def same_entity_sets(self) -> list[str]:
        """The spine first, then the sets joined by the spine's own entity_id."""
        own = self.model.spine
        return [own, *(source.feature_set for source in self.sources if source.join is None and source.feature_set != own)]

    def joined(self, entity_id: str, spine_values: Mapping[str, FeatureValue]) -> list[Entity]:
        """The other entities whose rows the vector needs; none for a spine row that does not name one."""
        named = ((source.feature_set, spine_values.get(source.join)) for source in self.sources if source.join)
        return [(feature_set, entity) for feature_set, entity in named if isinstance(entity, str)]


def plan_of(model: Model, definitions: Definitions) -> Plan:
    """The plan of `model` by the feature sets in force.

    Raises:
        NotFound: It names a feature set that there is not.
        UnusableDefinition: It names a column that there is not, or joins by one that is no text.
    """
    spine = definitions.feature_set(model.spine)
    return Plan(
        model, spine, tuple(_source(model, spine, source, definitions.feature_set(source.feature_set)) for source in model.features)
    )


def _source(model: Model, spine: FeatureSet, source: FeatureSource, feature_set: FeatureSet) -> Source:
    if source.join is not None:
        joined_by = spine.features.get(source.join)
        if joined_by is None:
            raise UnusableDefinition(f"model '{model.name}' joins '{source.feature_set}' by '{source.join}', which '{spine.name}' has not")
        if joined_by.type != "category":
            raise UnusableDefinition(
                f"model '{model.name}' joins '{source.feature_set}' by '{source.join}', a {joined_by.type}; entity ids are categories"
            )
    columns = []
    for name in source.columns or feature_set.features:
        feature = feature_set.features.get(name)
        if feature is None:
            raise UnusableDefinition(
                f"model '{model.name}' names '{name}' of '{feature_set.name}', which has {', '.join(feature_set.features)}"
            )
        columns.append(
            Column(name=column_name(model, feature_set.name, name), feature_set=feature_set.name, feature=name, type=feature.type)
        )
    max_age_us = None if source.max_age is None else source.max_age // _MICROSECOND
    return Source(source.feature_set, source.join, max_age_us, tuple(columns))


@dataclass(frozen=True)
class Vector:
    """A model's inputs by column name (None is missing), the rows they come from, and the rows' ages at the event time."""

    values: dict[str, FeatureValue]
    used: dict[Entity, OnlineRow]
    ages_ms: dict[str, int]
    too_old: list[str]  # why it must not be scored, if the model refuses rows that are older than they may be


async def vectors(
    plan: Plan, asked: Sequence[tuple[str, int]], rows_at: Callable[[Sequence[AsOf]], Awaitable[Mapping[AsOf, OnlineRow | None]]]
) -> dict[int, Vector | None]:
    """A model's vector of each entity_id at its event time, by its place in `asked`; None where the spine has no row.

    `rows_at` is called twice at most. A place is left out if `rows_at` left out a row that it needs.
    """
    own_sets = plan.same_entity_sets
    found = dict(await rows_at([((feature_set, entity_id), at) for entity_id, at in asked for feature_set in own_sets]))
    needed: list[list[Entity]] = []
    for entity_id, at in asked:
        spine_row = found.get(((plan.model.spine, entity_id), at))
        joined = plan.joined(entity_id, spine_row.values) if spine_row is not None else []
        needed.append([*((feature_set, entity_id) for feature_set in own_sets), *joined])
    if further := [(entity, at) for entities, (_, at) in zip(needed, asked, strict=True) for entity in entities[len(own_sets) :]]:
        found |= await rows_at(further)
    return {
        place: vector_of(plan, entity_id, at, {entity: found[entity, at] for entity in entities})
        for place, (entities, (entity_id, at)) in enumerate(zip(needed, asked, strict=True))
        if all((entity, at) in found for entity in entities)
    }


def vector_of(plan: Plan, entity_id: str, event_us: int, rows: Mapping[Entity, OnlineRow | None]) -> Vector | None:
    """The vector of an entity from the rows that were true at `event_us`; None if the spine has no row of it.

    A column is missing where its row is missing or lacks the value. What a row is good for that is older than its source's max_age, the
    model says (`stale`).
    """
    spine_row = rows.get((plan.model.spine, entity_id))
    if spine_row is None:
        return None
    spine_values = spine_row.values
    vector = Vector({}, {(plan.model.spine, entity_id): spine_row}, {plan.model.spine: (event_us - spine_row.event_us) // 1000}, [])
    for source in plan.sources:
        joined = entity_id if source.join is None else spine_values.get(source.join)
        entity = (source.feature_set, joined) if isinstance(joined, str) else None
        row = None if entity is None else rows.get(entity)
        if row is not None and source.max_age_us is not None and event_us - row.event_us > source.max_age_us:
            if plan.model.stale == "refuse":
                age, most = (timedelta(microseconds=us) for us in (event_us - row.event_us, source.max_age_us))
                vector.too_old.append(f"'{source.feature_set}' of '{joined}' is {age} old, and may be {most}")
            if plan.model.stale != "serve":
                row = None
        if row is None or entity is None:
            vector.values.update((column.name, None) for column in source.columns)
            continue
        values = spine_values if row is spine_row else row.values
        vector.values.update((column.name, values.get(column.feature)) for column in source.columns)
        vector.used[entity] = row
        vector.ages_ms[source.feature_set] = (event_us - row.event_us) // 1000
    return vector
