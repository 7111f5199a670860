"""What users declare in YAML: feature sets and models."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from functools import cached_property
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator, with_config
from typing_extensions import TypedDict  # Pydantic takes no other before Python 3.12

from mojomesh_contracts.events import FeatureValue
from mojomesh_contracts.formulas import Formula, Kind

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(text: object) -> object:
    """`90s`, `15m`, `3h` or `14d` as a timedelta; anything else goes on to Pydantic as it came."""
    match = re.fullmatch(r"(\d+)([smhd])", text) if isinstance(text, str) else None
    return timedelta(**{_UNITS[match[2]]: int(match[1])}) if match else text


Duration = Annotated[timedelta, BeforeValidator(parse_duration)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
ColumnName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]


MOST_DIMENSIONS = 2000  # of an HNSW index
LARGEST_SINGLE = 3.4028234663852886e38


class DefinitionError(ValueError):
    """A document that is not a definition; its text names the field and what to do."""


class Definition(BaseModel):
    """A document as applied; a misspelt field is an error, not ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Feature(Definition):
    """One named, typed value of a feature set."""

    type: Kind
    unit: str | None = None
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _check_range(self) -> "Feature":
        if self.type != "number" and (self.min is not None or self.max is not None):
            raise ValueError(f"min and max are for numbers, this feature is a {self.type}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is greater than max {self.max}")
        return self

    def problem(self, value: FeatureValue) -> str | None:
        """Why `value` cannot be this feature, in words; None if it can. Missing (None) always can."""
        # Called for every value of every event: the usual case first, and no more than it needs.
        if value is None:
            return None
        kind = type(value)
        if self.type == "number":
            if kind is not float and kind is not int:
                return f"must be a number, is {value!r}"
            return self._problem_of_number(value)  # type: ignore[arg-type]
        if self.type == "category":
            return None if kind is str else f"must be a text (category), is {value!r}"
        return None if kind is bool else f"must be true or false, is {value!r}"

    def _problem_of_number(self, value: float) -> str | None:
        if not -sys.float_info.max <= value <= sys.float_info.max:
            if isinstance(value, int):
                return "is an integer too large to be a number"
            return f"must be a finite number, is {value!r}; leave the feature out if it is missing"
        if self.min is not None and value < self.min:
            return f"is {value!r}, less than the minimum {self.min:g}"
        if self.max is not None and value > self.max:
            return f"is {value!r}, more than the maximum {self.max:g}"
        return None


def _same_names(names: object) -> object:
    return {name: name for name in names} if isinstance(names, list) else names


class Aggregate(Definition):
    """What the events of a feature set come to over the time before the asked one, as in the mean delay of a carrier in the last 2 h.

    Of an event's corrections the last counts, wherever it puts the event. The window is `[asked - window, asked)`: what happens at the
    asked time itself is left out, so no outcome is ever counted in the features that are to predict it. Missing values are left out.
    Without events count, distinct and sum are 0 and the others missing; all are missing where the row lacks a part of the key. True
    counts as 1 and false as 0 in sum and mean.
    """

    function: Literal["count", "sum", "mean", "min", "max", "last", "distinct"]
    of: str = Field(
        pattern=r"^[a-z][a-z0-9_-]{0,62}(\.[A-Za-z_][A-Za-z0-9_]{0,62})?$",
        description="`set.feature`; for a count of events, the set alone",
    )
    by: Annotated[dict[ColumnName, ColumnName], BeforeValidator(_same_names)] = Field(
        min_length=1,
        description="Which events: name there to name here, of categories or of a set's entity; a list if the names are the same",
    )
    window: Duration = Field(ge=timedelta(minutes=1), le=timedelta(days=90))

    @model_validator(mode="after")
    def _check_feature(self) -> "Aggregate":
        if self.feature is None and self.function != "count":
            raise ValueError(f"the {self.function} of which feature of '{self.of}'? Name it as in `{self.of}.feature`")
        return self

    @property
    def feature_set(self) -> str:
        return self.of.partition(".")[0]

    @property
    def feature(self) -> str | None:
        return self.of.partition(".")[2] or None


class VectorFeature(Definition):
    """A vector of numbers, as a model that reads texts or pictures gives it; asked by nearness, and no input of a model here."""

    type: str = Field(pattern=r"^vector\([1-9]\d{0,3}\)$", description="As in `vector(384)`; 2,000 dimensions at most")
    distance: Literal["cosine", "l2", "inner"] = "cosine"

    @model_validator(mode="after")
    def _check_dimensions(self) -> "VectorFeature":
        if self.n_dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{self.type} has more than {MOST_DIMENSIONS} dimensions")
        return self

    @property
    def n_dimensions(self) -> int:
        return int(self.type[len("vector(") : -1])

    def problem(self, vector: list[float]) -> str | None:
        """Why `vector` cannot be this feature, in words; None if it can."""
        if len(vector) != self.n_dimensions:
            return f"must have {self.n_dimensions} dimensions, has {len(vector)}"
        if not all(abs(number) <= LARGEST_SINGLE for number in vector):
            return "must be of finite numbers, as single precision knows them"
        if self.distance == "cosine" and not any(vector):
            return "must not be zero: it has no direction, which is what a cosine compares"
        return None


class Expectation(Definition):
    """What values of a feature should be. Unlike the feature's own min and max, a value beyond is a fact: it is kept, and told."""

    min: float | None = None
    max: float | None = None
    one_of: list[str] | None = Field(default=None, min_length=1, description="The categories there are")
    missing: float | None = Field(default=None, ge=0, lt=1, description="Greatest share of a window's rows that may lack a value")
    otherwise: Literal["report", "hold"] = Field(
        default="report", description="What becomes of a row whose value is out of range or not among the categories: kept, or held back"
    )

    def problem(self, value: FeatureValue) -> str | None:
        """Why `value` is not as expected, in words; None if it is, or is missing."""
        if self.one_of is not None and isinstance(value, str) and value not in self.one_of:
            return f"is {value!r}, expected {', '.join(self.one_of)}"
        if isinstance(value, int | float):
            if self.min is not None and value < self.min:
                return f"is {value!r}, expected at least {self.min:g}"
            if self.max is not None and value > self.max:
                return f"is {value!r}, expected at most {self.max:g}"
        return None


class RowCount(Definition):
    """How many rows a window should bring."""

    min: int = Field(default=0, ge=0)
    max: int | None = Field(default=None, ge=0)


class Quality(Definition):
    """What is expected of a feature set's events as they flow in; a breach is told once a window, as `quality.breached.v1`."""

    window: Duration = Field(default=timedelta(minutes=1), description="By when the mesh knew the rows; from 1 s to 7 d")
    features: dict[ColumnName, Expectation] = {}
    rows: RowCount | None = None
    freshness: Duration | None = Field(default=None, description="How old the newest event time may be at the end of a window")

    @model_validator(mode="after")
    def _check_window(self) -> "Quality":
        if not timedelta(seconds=1) <= self.window <= timedelta(days=7):
            raise ValueError(f"a window lasts from 1 s to 7 d, not {self.window}")
        return self

    def problems(self, values: dict[str, FeatureValue]) -> dict[str, str]:
        """What is not as expected of a row, in words, by feature."""
        found = ((name, expected.problem(values.get(name))) for name, expected in self.features.items())
        return {name: problem for name, problem in found if problem}


class FeatureSet(Definition):
    """A named, typed schema of facts about one type of entity; changes only add features.

    Aggregates and computed features are no part of an event: they are derived when a row is read, as of the asked time.
    """

    kind: Literal["FeatureSet"] = "FeatureSet"
    name: Name
    entity: ColumnName = Field(description="What entity_id identifies, as in `flight_id`")
    features: dict[ColumnName, Feature] = {}
    vectors: dict[ColumnName, VectorFeature] = Field(default={}, description="Those of type `vector(n)`; they may stand among `features`")
    aggregates: dict[ColumnName, Aggregate] = Field(default={}, description="Of the events of other sets, or of this one")
    computed: dict[ColumnName, str] = Field(
        default={}, description="Formulas over features and aggregates, and `event_time`, the asked one"
    )
    quality: Quality | None = None

    @model_validator(mode="before")
    @classmethod
    def _set_vectors_apart(cls, document: Any) -> Any:
        features = document.get("features") if isinstance(document, dict) else None
        if not isinstance(features, dict):
            return document
        vectors = {
            name for name, feature in features.items() if isinstance(feature, dict) and str(feature.get("type")).startswith("vector")
        }
        return document | {
            "features": {name: feature for name, feature in features.items() if name not in vectors},
            "vectors": document.get("vectors", {}) | {name: features[name] for name in vectors},
        }

    @model_validator(mode="after")
    def _check_names(self) -> "FeatureSet":
        if not self.features and not self.vectors:
            raise ValueError("a feature set has at least one feature")
        return self

    @model_validator(mode="after")
    def _check_derived(self) -> "FeatureSet":
        names = [*self.names, *self.vectors]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)}: a name for one feature only, a vector, stored, aggregated or computed")
        _ = self.formulas  # raises what is wrong with them
        return self

    @property
    def names(self) -> list[str]:
        """Of all features that a model may have, stored and derived."""
        return [*self.features, *self.aggregates, *self.computed]

    @cached_property
    def formulas(self) -> dict[str, Formula]:
        """The computed features, ready to be evaluated. They may use any aggregate but a `last`, whose type another set decides."""
        kinds: dict[str, Kind] = {name: feature.type for name, feature in self.features.items()}
        kinds |= {name: "number" for name, aggregate in self.aggregates.items() if aggregate.function != "last"}
        return {name: Formula(text, kinds) for name, text in self.computed.items()}

    @model_validator(mode="after")
    def _check_quality(self) -> "FeatureSet":
        for name, expected in self.quality.features.items() if self.quality else ():
            feature = self.features.get(name)
            if feature is None:
                raise ValueError(f"quality expects something of '{name}', which is not a feature")
            if feature.type != "number" and (expected.min is not None or expected.max is not None):
                raise ValueError(f"quality: min and max are for numbers, '{name}' is a {feature.type}")
            if feature.type != "category" and expected.one_of is not None:
                raise ValueError(f"quality: one_of is for categories, '{name}' is a {feature.type}")
        return self

    def problems(self, values: dict[str, FeatureValue]) -> list[str]:
        """What is wrong with a vector, in words, every fault named; empty when it is in order."""
        found = []
        for name, value in values.items():
            feature = self.features.get(name)
            if feature is None:
                found.append(f"'{name}' is not a feature of '{self.name}', which has {', '.join(self.features)}")
            elif (problem := feature.problem(value)) is not None:
                found.append(f"'{name}' {problem}")
        return found

    @cached_property
    def is_usual(self) -> Callable[[dict[str, FeatureValue]], bool]:
        """Whether a vector is in order at a glance, as nearly all are; of one that is not, `problems` and who stores it tell what is wrong.

        No text in it contains a NUL character.
        """
        types: dict[Kind, Any] = {"number": float, "category": Annotated[str, Field(pattern="^[^\x00]*$")], "boolean": bool}
        fields = {name: Annotated[types[of.type], Field(ge=of.min, le=of.max)] | None for name, of in self.features.items()}
        usual = TypedDict("usual", fields, total=False)  # type: ignore[misc]  # mypy wants the fields written out
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        return TypeAdapter(with_config(config)(usual)).validator.isinstance_python

    def problems_of_vectors(self, vectors: Mapping[str, list[float]]) -> list[str]:
        """What is wrong with the vectors of an event, in words."""
        found = [f"'{name}' is not a vector of '{self.name}'" for name in vectors if name not in self.vectors]
        told = ((name, self.vectors[name].problem(vector)) for name, vector in vectors.items() if name in self.vectors)
        return found + [f"'{name}' {problem}" for name, problem in told if problem]


class Label(Definition):
    """What is to be predicted: a column of an outcome feature set of the same entity, which arrives later."""

    feature_set: Name
    column: ColumnName
    type: Literal["binary", "number", "multiclass"]
    within: Duration | None = Field(default=None, description="An outcome that comes later than this after the event time is no label")


class FeatureSource(Definition):
    """A feature set whose columns the model sees; the spine's own, or one joined as of the spine's event time."""

    feature_set: Name
    join: ColumnName | None = Field(default=None, description="Column of the spine that holds the entity_id to join; none: same entity")
    max_age: Duration | None = Field(default=None, description="A row older than this at the event time is missing")
    columns: list[ColumnName] | None = Field(default=None, description="Only these; by default all")


class Algorithm(Definition):
    """An H2O algorithm and its parameters, as H2O's Python client spells them."""

    name: Literal["gbm", "drf", "glm", "xgboost", "automl"]
    params: dict[str, Any] = {}


class WalkForward(Definition):
    """How history is cut into folds: train on the past, test on what follows, step on."""

    n_windows: int = Field(ge=1, le=100)
    train: Literal["expanding"] | Duration = Field(description="`expanding`, or the length of a sliding training window")
    test: Duration
    step: Duration
    purge: Literal["label_delay", "none"] = Field(
        default="label_delay", description="label_delay: a row trains only if its label was known before the test window"
    )
    embargo: Duration = timedelta(0)


class Gate(Definition):
    """What a new version must reach to become the champion."""

    metric: Literal["auc", "logloss", "rmse"] = "auc"
    min: float | None = Field(default=None, description="Least AUC, or greatest logloss or RMSE, over the folds' test rows")
    min_gain_over_champion: float = Field(default=0.0, description="By how much it must beat the champion; below 0 tolerates a loss")
    max_calibration_error: float | None = None


class DriftPolicy(Definition):
    """When live data counts as drifted. The thresholds are floors: the training data's own windows may set higher ones."""

    enabled: bool = True
    psi: float = Field(default=0.25, gt=0)
    kl: float = Field(default=0.5, gt=0)
    window: int = Field(default=5000, ge=100, description="Predictions a window")
    confirm: int = Field(default=3, ge=1, description="Windows in a row")
    cooldown: Duration = Field(default=timedelta(days=14), description="Event time between two alerts of a model")


class Model(Definition):
    """A model to be trained, promoted, served and watched."""

    kind: Literal["Model"] = "Model"
    name: Name
    spine: Name = Field(description="The feature set whose rows are scored")
    label: Label
    features: list[FeatureSource] = Field(min_length=1)
    algorithm: Algorithm
    walk_forward: WalkForward
    gate: Gate = Gate()
    drift: DriftPolicy = DriftPolicy()
    stale: Literal["missing", "serve", "refuse"] = Field(
        default="missing",
        description="What scoring by entity does with a joined row that is older than its max_age: has its columns missing, as training "
        "has; serves it all the same; or refuses to score",
    )
    known_at: Literal["snapshot", "row"] = Field(
        default="snapshot",
        description="What a training row sees of its features: all that was known at the snapshot, or only what was reported "
        "(`reported_at`) by the row's own event time",
    )

    @model_validator(mode="after")
    def _check_sources(self) -> "Model":
        names = [source.feature_set for source in self.features]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"features names {', '.join(sorted(repeated))} more than once")
        if self.label.feature_set in names:
            raise ValueError(f"'{self.label.feature_set}' holds the label, so its columns are not known yet when the spine's row is scored")
        for source in self.features:
            if source.feature_set == self.spine and (source.join or source.max_age):
                raise ValueError(f"'{self.spine}' is the spine: it is not joined, so leave out join and max_age")
        return self


AnyDefinition = Annotated[FeatureSet | Model, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[FeatureSet | Model] = TypeAdapter(AnyDefinition)


def column_name(model: Model, feature_set: str, feature: str) -> str:
    """Name of a feature as a column of the model: the spine's keep their own, a joined one is `set.feature`."""
    return feature if feature_set == model.spine else f"{feature_set}.{feature}"


def kind_of(feature_set: FeatureSet, name: str, feature_sets: Mapping[str, FeatureSet]) -> Kind | None:
    """The type of a feature, stored or derived; None if there is none of that name, or the set it is derived from has it not."""
    if name in feature_set.features:
        return feature_set.features[name].type
    if name in feature_set.formulas:
        return feature_set.formulas[name].kind
    aggregate = feature_set.aggregates.get(name)
    if aggregate is None or aggregate.function != "last":
        return "number" if aggregate else None
    source = feature_sets.get(aggregate.feature_set)
    feature = source.features.get(aggregate.feature or "") if source else None
    return feature.type if feature else None


def definition_id(definition: FeatureSet | Model) -> str:
    """Kind and name, as in `FeatureSet/flights`."""
    return f"{definition.kind}/{definition.name}"


def parse_definition(document: object) -> FeatureSet | Model:
    """Read one document (a mapping, as YAML or JSON gave it).

    Raises:
        DefinitionError: It is none, naming every field that is wrong.
    """
    try:
        return _ADAPTER.validate_python(document)
    except ValidationError as error:
        faults = [f"{'.'.join(str(part) for part in fault['loc'][1:]) or 'document'}: {fault['msg']}" for fault in error.errors()]
        named = document.get("name") if isinstance(document, dict) else None
        raise DefinitionError(f"definition {named or '(without a name)'} is wrong: " + "; ".join(faults)) from None


def parse_definitions(text: str) -> Iterator[FeatureSet | Model]:
    """Read a YAML stream of documents.

    Raises:
        DefinitionError: It is not YAML, or a document is not a definition.
    """
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        raise DefinitionError(f"not YAML: {error}") from None
    return (parse_definition(document) for document in documents)


def problems_among(definitions: dict[str, FeatureSet | Model]) -> list[str]:
    """What is wrong between definitions (by `definition_id`), in words: sets and columns that one names but nobody defined."""
    feature_sets = {definition.name: definition for definition in definitions.values() if isinstance(definition, FeatureSet)}
    models = [definition for definition in definitions.values() if isinstance(definition, Model)]
    of_sets = (problem for feature_set in feature_sets.values() for problem in problems_of_aggregates(feature_set, feature_sets))
    return [*of_sets, *(problem for model in models for problem in _problems_of_model(model, feature_sets))]


def problems_of_aggregates(feature_set: FeatureSet, feature_sets: Mapping[str, FeatureSet]) -> Iterator[str]:
    """What the aggregates of a set name that is not there or is of the wrong type, in words."""
    for name, aggregate in feature_set.aggregates.items():
        about = f"aggregate '{name}' of '{feature_set.name}'"
        source = feature_sets.get(aggregate.feature_set)
        if source is None:
            yield f"{about} names the feature set '{aggregate.feature_set}', which is not defined"
            continue
        feature = source.features.get(aggregate.feature) if aggregate.feature else None
        if aggregate.feature and feature is None:
            yield f"{about} names '{aggregate.feature}', which is not a stored feature of '{source.name}'"
        wanted = {"sum": ("number", "boolean"), "mean": ("number", "boolean"), "min": ("number",), "max": ("number",)}
        if feature and feature.type not in wanted.get(aggregate.function, (feature.type,)):
            yield f"{about} is a {aggregate.function}, and '{aggregate.of}' is a {feature.type}"
        for of_set, names in ((source, aggregate.by.keys()), (feature_set, aggregate.by.values())):
            yield from _problems_of_key(about, of_set, names)


def _problems_of_key(about: str, feature_set: FeatureSet, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        feature = feature_set.features.get(name)
        if feature is None and name != feature_set.entity:
            yield f"{about} is by '{name}', which is neither a stored feature of '{feature_set.name}' nor its entity"
        elif feature is not None and feature.type != "category":
            yield f"{about} is by '{name}' of '{feature_set.name}', a {feature.type}; keys are categories"


def _problems_of_model(model: Model, feature_sets: Mapping[str, FeatureSet]) -> Iterator[str]:
    for name in sorted({model.spine, model.label.feature_set} | {source.feature_set for source in model.features}):
        if name not in feature_sets:
            yield f"model '{model.name}' names the feature set '{name}', which is not defined"
    wanted = [(model.label.feature_set, [model.label.column], False)]
    wanted += [(model.spine, [source.join], False) for source in model.features if source.join]
    wanted += [(source.feature_set, source.columns or [], True) for source in model.features]
    for name, columns, may_be_derived in wanted:
        if (feature_set := feature_sets.get(name)) is not None:
            there = feature_set.names if may_be_derived else feature_set.features
            yield from (
                f"model '{model.name}' names '{column}', which is not a feature of '{name}'" for column in columns if column not in there
            )


def incompatible_changes(old: FeatureSet, new: FeatureSet) -> list[str]:
    """What `new` breaks of `old`, in words: changes only add features, since rows stored under the old ones stay."""
    found = [f"feature '{name}' is gone; features are only added" for name in old.features if name not in new.features]
    for name, feature in old.features.items():
        changed = new.features.get(name, feature)
        if (changed.type, changed.unit) != (feature.type, feature.unit):
            found.append(f"feature '{name}' changes its type or unit; add a new feature instead")
    found += [
        f"vector '{name}' is gone or changes; add a new one instead"
        for name, old_one in old.vectors.items()
        if new.vectors.get(name) != old_one
    ]
    for derived, now in ((old.aggregates, new.aggregates), (old.computed, new.computed)):
        found += [
            f"derived feature '{name}' is gone or changes; models were trained on what it was, so add a new one instead"
            for name, what in derived.items()
            if now.get(name) != what
        ]
    if old.entity != new.entity:
        found.append(f"entity changes from {old.entity} to {new.entity}")
    return found
