"""What a model's vector is made of: which rows, joined how, under which column names. Online and offline follow the same plan."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property

from mojomesh_chassis.definitions import Definitions
from mojomesh_contracts.bundles import Column
from mojomesh_contracts.definitions import Aggregate, FeatureSet, FeatureSource, Model, column_name, kind_of, problems_of_aggregates
from mojomesh_contracts.events import FeatureValue
from mojomesh_contracts.formulas import Formula, Kind
from mojomesh_store.errors import UnusableDefinition
from mojomesh_store.online import AsOf, Entity, OnlineRow, moment

_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Windowed:
    """An aggregate, as it is asked for: over which facts, found how, and how far back."""

    name: str
    function: str
    feature_set: str
    feature: str | None  # none: events are counted
    kind: Kind | None  # of the feature
    theirs: tuple[str | None, ...]  # features of the facts that make their key; None stands for the entity_id
    ours: tuple[str | None, ...]  # what they must be equal to
    window_us: int

    @property
    def gives(self) -> Kind:
        """The type of its values."""
        return self.kind if self.function == "last" and self.kind else "number"

    def key_of(self, entity_id: str, values: Mapping[str, FeatureValue]) -> tuple[str, ...] | None:
        """The key for a row; None if the row lacks a part of it."""
        key = tuple(entity_id if name is None else values.get(name) for name in self.ours)
        return None if None in key else key  # type: ignore[return-value]  # mypy does not see what `in` rules out


WindowAsked = tuple[Windowed, tuple[str, ...], int]
"""An aggregate, its key, and the asked time in microseconds since 1970."""


@dataclass(frozen=True)
class Source:
    """One feature set of a model: its columns, and how its row is found for a row of the spine."""

    feature_set: str
    join: str | None  # a feature of the spine that holds the entity_id; none: the same entity
    max_age_us: int | None  # at the event time; an older row counts as missing
    columns: tuple[Column, ...]
    aggregates: tuple[Windowed, ...] = ()  # that columns or formulas need
    formulas: tuple[tuple[str, Formula], ...] = ()  # of the computed columns

    @cached_property
    def names(self) -> list[tuple[str, str]]:
        """Of the columns, and of the features that they hold."""
        return [(column.name, column.feature) for column in self.columns]

    @property
    def is_derived(self) -> bool:
        """Whether it has columns that no row holds."""
        return bool(self.aggregates or self.formulas)

    @property
    def stored(self) -> list[Column]:
        """The columns that rows hold."""
        derived = {aggregate.name for aggregate in self.aggregates} | {name for name, _ in self.formulas}
        return [column for column in self.columns if column.feature not in derived]

    @property
    def inputs(self) -> dict[str, Kind]:
        """The stored features that others are derived from, with their types."""
        inputs: dict[str, Kind] = {name: "category" for aggregate in self.aggregates for name in aggregate.ours if name is not None}
        aggregates = {aggregate.name for aggregate in self.aggregates}
        return inputs | {name: kind for _, formula in self.formulas for name, kind in formula.names.items() if name not in aggregates}


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

    @cached_property
    def same_entity_sets(self) -> list[str]:
        """The spine first, then the sets joined by the spine's own entity_id."""
        own = self.model.spine
        return [own, *(source.feature_set for source in self.sources if source.join is None and source.feature_set != own)]

    @property
    def feature_sets(self) -> set[str]:
        """Whose rows training reads."""
        aggregated = (aggregate.feature_set for source in self.sources for aggregate in source.aggregates)
        return {self.model.spine, self.model.label.feature_set, *(source.feature_set for source in self.sources), *aggregated}

    @cached_property
    def has_aggregates(self) -> bool:
        """Whether a vector takes more than the rows of its entities."""
        return any(source.aggregates for source in self.sources)

    @cached_property
    def derived(self) -> list[Source]:
        """The sources with columns that no row holds."""
        return [source for source in self.sources if source.is_derived]

    @cached_property
    def joins(self) -> list[tuple[str, str]]:
        """The sets of other entities, and the features of the spine that name these."""
        return [(source.feature_set, source.join) for source in self.sources if source.join]

    def joined(self, spine_values: Mapping[str, FeatureValue]) -> list[Entity]:
        """The other entities whose rows the vector needs; none for a spine row that does not name one."""
        return [(feature_set, entity) for feature_set, name in self.joins if isinstance(entity := spine_values.get(name), str)]


def plan_of(model: Model, definitions: Definitions) -> Plan:
    """The plan of `model` by the feature sets in force.

    Raises:
        NotFound: It names a feature set that there is not.
        UnusableDefinition: It names a column that there is not, or joins by one that is no text.
    """
    spine = definitions.feature_set(model.spine)
    return Plan(model, spine, tuple(_source(model, spine, source, definitions) for source in model.features))


class Plans:
    """The plans of models by the definitions in force, each made once."""

    def __init__(self, definitions: Definitions) -> None:
        self._definitions = definitions
        self._n_changes = definitions.n_changes
        self._of: dict[str, Plan] = {}

    def of(self, model: str) -> Plan:
        """The plan of the model of that name; raises what `plan_of` does."""
        if self._n_changes != self._definitions.n_changes:
            self._n_changes = self._definitions.n_changes
            self._of.clear()
        if (plan := self._of.get(model)) is None:
            plan = self._of[model] = plan_of(self._definitions.model(model), self._definitions)
        return plan


def _source(model: Model, spine: FeatureSet, source: FeatureSource, definitions: Definitions) -> Source:
    feature_set = definitions.feature_set(source.feature_set)
    if source.join is not None:
        joined_by = spine.features.get(source.join)
        if joined_by is None:
            raise UnusableDefinition(f"model '{model.name}' joins '{source.feature_set}' by '{source.join}', which '{spine.name}' has not")
        if joined_by.type != "category":
            raise UnusableDefinition(
                f"model '{model.name}' joins '{source.feature_set}' by '{source.join}', a {joined_by.type}; entity ids are categories"
            )
    columns = tuple(_column(model, feature_set, name, definitions) for name in source.columns or feature_set.names)
    max_age_us = None if source.max_age is None else source.max_age // _MICROSECOND
    planned = Source(source.feature_set, source.join, max_age_us, columns)
    return _with_derived(planned, feature_set, definitions) if feature_set.aggregates or feature_set.computed else planned


def _column(model: Model, feature_set: FeatureSet, name: str, definitions: Definitions) -> Column:
    feature = feature_set.features.get(name)
    kind = feature.type if feature else kind_of(feature_set, name, definitions.feature_sets)
    if kind is None:
        raise UnusableDefinition(
            f"model '{model.name}' names '{name}' of '{feature_set.name}', which has {', '.join(feature_set.names)}"
            + "".join(f"; {problem}" for problem in problems_of_aggregates(feature_set, definitions.feature_sets))
        )
    return Column(name=column_name(model, feature_set.name, name), feature_set=feature_set.name, feature=name, type=kind)


def _with_derived(source: Source, feature_set: FeatureSet, definitions: Definitions) -> Source:
    names = [column.feature for column in source.columns]
    formulas = {name: feature_set.formulas[name] for name in names if name in feature_set.formulas}
    needed = dict.fromkeys([*names, *(name for formula in formulas.values() for name in formula.names)])
    aggregates = [name for name in needed if name in feature_set.aggregates]
    if aggregates and (problems := list(problems_of_aggregates(feature_set, definitions.feature_sets))):
        raise UnusableDefinition("; ".join(problems))
    return replace(
        source, aggregates=tuple(_windowed(feature_set, name, definitions) for name in aggregates), formulas=tuple(formulas.items())
    )


def _windowed(feature_set: FeatureSet, name: str, definitions: Definitions) -> Windowed:
    aggregate: Aggregate = feature_set.aggregates[name]
    facts = definitions.feature_set(aggregate.feature_set)
    return Windowed(
        name,
        aggregate.function,
        facts.name,
        aggregate.feature,
        facts.features[aggregate.feature].type if aggregate.feature else None,
        tuple(theirs if theirs in facts.features else None for theirs in aggregate.by),
        tuple(ours if ours in feature_set.features else None for ours in aggregate.by.values()),
        aggregate.window // _MICROSECOND,
    )


@dataclass(frozen=True)
class Vector:
    """A model's inputs by column name (None is missing), the rows they come from, and the rows' ages at the event time."""

    values: dict[str, FeatureValue]
    used: dict[Entity, OnlineRow]
    ages_ms: dict[str, int]
    too_old: list[str]  # why it must not be scored, if the model refuses rows that are older than they may be

    def has(self, source: Source) -> bool:
        """Whether the source has a row here."""
        return source.feature_set in self.ages_ms


async def vectors(
    plan: Plan,
    asked: Sequence[tuple[str, int]],
    rows_at: Callable[[Sequence[AsOf]], Awaitable[Mapping[AsOf, OnlineRow | None]]],
    aggregates_at: Callable[[Sequence[WindowAsked]], Awaitable[Mapping[WindowAsked, FeatureValue]]] | None = None,
) -> dict[int, Vector | None]:
    """A model's vector of each entity_id at its event time, by its place in `asked`; None where the spine has no row.

    `rows_at` is called twice at most; `aggregates_at` is for plans that have aggregates. A place is left out if one of them left out what
    it needs.
    """
    needed: list[list[AsOf]] = [[((feature_set, entity_id), at) for feature_set in plan.same_entity_sets] for entity_id, at in asked]
    found = dict(await rows_at([as_of for as_ofs in needed for as_of in as_ofs]))
    spine_values = [{} if (spine_row := found.get(as_ofs[0])) is None else spine_row.values for as_ofs in needed]
    joined = [[(entity, at) for entity in plan.joined(values)] for values, (_, at) in zip(spine_values, asked, strict=True)]
    if further := [as_of for as_ofs in joined for as_of in as_ofs]:
        found |= await rows_at(further)
    made: dict[int, Vector | None] = {}
    for place, (entity_id, at) in enumerate(asked):
        try:
            known = {as_of[0]: found[as_of] for as_of in needed[place] + joined[place]}
        except KeyError:
            continue
        made[place] = _vector_of(plan, entity_id, at, known, spine_values[place])
    if not (derived := plan.derived):
        return made
    rows = {
        place: [_DerivedRow(source, vector, asked[place][1]) for source in derived if vector.has(source)]
        for place, vector in made.items()
        if vector is not None
    }
    wanted = list(dict.fromkeys(window for of_place in rows.values() for row in of_place for window in row.windows))
    aggregated = await aggregates_at(wanted) if aggregates_at and wanted else {}
    for place, of_place in rows.items():
        if all(window in aggregated for row in of_place for window in row.windows):
            for row in of_place:
                row.fill(aggregated)
        else:
            del made[place]
    return made


class _DerivedRow:
    """A row of a vector whose set has derived features."""

    def __init__(self, source: Source, vector: Vector, at: int) -> None:
        self._source, self._vector, self._at = source, vector, at
        ((entity_id, row),) = ((entity[1], row) for entity, row in vector.used.items() if entity[0] == source.feature_set)
        self._values = row.values
        keys = ((aggregate, aggregate.key_of(entity_id, self._values)) for aggregate in source.aggregates)
        self.windows: list[WindowAsked] = [(aggregate, key, at) for aggregate, key in keys if key is not None]

    def fill(self, aggregated: Mapping[WindowAsked, FeatureValue]) -> None:
        """Put what is derived into the vector."""
        derived = {window[0].name: aggregated[window] for window in self.windows}
        values, asked_at = {**self._values, **derived}, moment(self._at)
        derived |= {name: formula(values, asked_at) for name, formula in self._source.formulas}
        for column in self._source.columns:
            if column.feature in derived:
                self._vector.values[column.name] = derived[column.feature]


def _vector_of(
    plan: Plan, entity_id: str, event_us: int, rows: Mapping[Entity, OnlineRow | None], spine_values: Mapping[str, FeatureValue]
) -> Vector | None:
    """The vector of an entity from the rows that were true at `event_us`; None if the spine has no row of it.

    A column is missing where its row is missing or lacks the value, or while it is to be derived. What a row is good for that is older
    than its source's max_age, the model says (`stale`).
    """
    spine = plan.model.spine
    spine_row = rows[spine, entity_id]
    if spine_row is None:
        return None
    vector = Vector({}, {(spine, entity_id): spine_row}, {spine: (event_us - spine_row.event_us) // 1000}, [])
    vector_values = vector.values
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
            vector_values.update([(name, None) for name, _ in source.names])
            continue
        values = spine_values if row is spine_row else row.values
        vector_values.update([(name, values.get(feature)) for name, feature in source.names])
        vector.used[entity] = row
        vector.ages_ms[source.feature_set] = (event_us - row.event_us) // 1000
    return vector
