import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, create_model

from mojomesh_contracts import compatibility
from mojomesh_contracts.bundles import Baseline, BundleSchema, Golden, Manifest
from mojomesh_contracts.compatibility import WRITE_COMMAND, faults_of, golden_schemas, incompatibilities, schema_of, write_golden
from mojomesh_contracts.definitions import FeatureSet, Model
from mojomesh_contracts.events import EVENTS, Event, Frozen, ModelReady

WRITTEN = pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.topic.name)


@WRITTEN
def test_an_event_breaks_nothing_of_any_version_ever_accepted(event: type[Event]) -> None:
    assert faults_of(event) == []


@WRITTEN
def test_todays_schema_is_among_the_golden_ones(event: type[Event]) -> None:
    assert schema_of(event) in golden_schemas(event), f"{event.topic.name} is new or changed: run `{WRITE_COMMAND}` and commit the file"


def test_every_golden_folder_belongs_to_a_topic() -> None:
    folders = {folder.name for folder in compatibility.GOLDEN_FOLDER.iterdir()}
    assert folders == {event.topic.name for event in EVENTS}


def record(**fields: Any) -> dict[str, Any]:
    model: type[BaseModel] = create_model("Record", **fields)
    return model.model_json_schema()


class Inner(BaseModel):
    a: int


class InnerWider(BaseModel):
    a: int
    b: str = ""


class InnerOther(BaseModel):
    a: str


class InnerRequired(BaseModel):
    a: int
    b: str


class Tree(BaseModel):
    size: int
    children: list["Tree"] = []


class TreeOfOtherSize(BaseModel):
    size: float
    children: list["TreeOfOtherSize"] = []


TreeOfOtherSize.__name__ = "Tree"


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a field is removed": (record(a=(int, ...), b=(str, ...)), record(a=(int, ...)), "field 'b' is gone"),
    "an optional field is removed": (record(a=(int, ...), b=(str, "")), record(a=(int, ...)), "field 'b' is gone: readers of before miss"),
    "a field is renamed": (record(a=(int, ...)), record(c=(int, ...)), "'a' is gone (renamed to 'c'?)"),
    "a type changes": (record(a=(int, ...)), record(a=(str, ...)), "'a' changes its type from integer to string"),
    "a type widens": (record(a=(int, ...)), record(a=(float, ...)), "'a' changes its type from integer to number"),
    "a format changes": (
        {"type": "object", "properties": {"a": {"type": "string"}}},
        {"type": "object", "properties": {"a": {"type": "string", "format": "uuid"}}},
        "'a' changes its type from string to string (uuid)",
    ),
    "a new field is required": (record(a=(int, ...)), record(a=(int, ...), b=(str, ...)), "new field 'b' is required"),
    "an optional field becomes required": (record(a=(int, 1)), record(a=(int, ...)), "'a' becomes required"),
    "a required field becomes optional": (record(a=(int, ...)), record(a=(int, 1)), "'a' becomes optional"),
    "a default changes": (record(a=(int, 1)), record(a=(int, 2)), "'a' changes its default from 1 to 2"),
    "a least value appears": (record(a=(int, ...)), record(a=(int, Field(ge=0))), "'a' is tightened from minimum none to 0"),
    "a least value rises": (record(a=(int, Field(ge=0))), record(a=(int, Field(ge=1))), "'a' is tightened from minimum 0 to 1"),
    "a least value falls": (record(a=(int, Field(ge=1))), record(a=(int, Field(ge=0))), "'a' is loosened from minimum 1 to 0"),
    "a greatest value falls": (record(a=(int, Field(le=9))), record(a=(int, Field(le=8))), "tightened from maximum 9 to 8"),
    "a greatest value rises": (record(a=(int, Field(le=8))), record(a=(int, Field(le=9))), "loosened from maximum 8 to 9"),
    "a greatest value goes": (record(a=(int, Field(le=8))), record(a=(int, ...)), "loosened from maximum 8 to none"),
    "a limit becomes exclusive": (record(a=(int, Field(ge=0))), record(a=(int, Field(gt=0))), "tightened from exclusiveMinimum none to 0"),
    "a text gets shorter": (record(a=(str, Field(max_length=9))), record(a=(str, Field(max_length=5))), "tightened from maxLength 9 to 5"),
    "a list gets a length": (record(a=(list[int], ...)), record(a=(list[int], Field(min_length=1))), "tightened from minItems none to 1"),
    "a pattern changes": (
        record(a=(str, Field(pattern="^a"))),
        record(a=(str, Field(pattern="^b"))),
        '\'a\' changes its pattern from "^a" to "^b"',
    ),
    "a pattern appears": (record(a=(str, ...)), record(a=(str, Field(pattern="^b"))), "changes its pattern from null"),
    "a step appears": (record(a=(int, ...)), record(a=(int, Field(multiple_of=5))), "changes its multipleOf from null to 5"),
    "a choice is taken away": (record(a=(Literal["x", "y"], ...)), record(a=(Literal["x"], ...)), 'can no longer be "y"'),
    "a choice is added": (record(a=(Literal["x"], ...)), record(a=(Literal["x", "y"], ...)), 'can now also be "y"'),
    "a text becomes a choice": (record(a=(str, ...)), record(a=(Literal["x"], ...)), 'was string and is now one of "x"'),
    "a choice becomes a text": (record(a=(Literal["x"], ...)), record(a=(str, ...)), 'was one of "x" and is now string'),
    "null becomes possible": (record(a=(int, ...)), record(a=(int | None, ...)), "'a' can now also be null"),
    "null becomes impossible": (record(a=(int | None, ...)), record(a=(int, ...)), "'a' can no longer be null"),
    "an alternative changes": (
        record(a=(int | str | None, ...)),
        record(a=(int | float | None, ...)),
        "'a' can no longer be string",
    ),
    "an alternative's range changes": (
        record(a=(int | None, None)),
        {"properties": {"a": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None}}, "type": "object"},
        "'a' is tightened from minimum none to 0",
    ),
    "a nested field changes its type": (record(i=(Inner, ...)), record(i=(InnerOther, ...)), "'i.a' changes its type"),
    "a nested field is new and required": (record(i=(Inner, ...)), record(i=(InnerRequired, ...)), "new field 'i.b' is required"),
    "a nested field is removed": (record(i=(InnerWider, ...)), record(i=(Inner, ...)), "'i.b' is gone"),
    "an optional nested model changes": (
        record(i=(Inner | None, None)),
        record(i=(InnerOther | None, None)),
        "'i.a' changes its type",
    ),
    "a model becomes a number": (record(i=(Inner, ...)), record(i=(int, ...)), "'i' changes its type from object to integer"),
    "items change": (record(a=(list[int], ...)), record(a=(list[str], ...)), "'a[]' changes its type from integer to string"),
    "items of a nested model change": (record(a=(list[Inner], ...)), record(a=(list[InnerOther], ...)), "'a[].a' changes its type"),
    "items lose their type": (record(a=(list[int], ...)), record(a=(list[Any], ...)), "'a[]'"),
    "values of a mapping change": (record(a=(dict[str, int], ...)), record(a=(dict[str, str], ...)), "'a{}' changes its type"),
    "values of a mapping get a type": (record(a=(dict[str, Any], ...)), record(a=(dict[str, int], ...)), "'a{}'"),
    "a place of a tuple changes": (record(a=(tuple[int, str], ...)), record(a=(tuple[int, int], ...)), "'a[1]' changes its type"),
    "a tuple gets longer": (record(a=(tuple[int], ...)), record(a=(tuple[int, int], ...)), "changes its length from 1 to 2"),
    "a list becomes a set": (record(a=(list[int], ...)), record(a=(set[int], ...)), "changes its uniqueItems"),
    "other fields become forbidden": (
        record(a=(int, ...)),
        record(a=(int, ...)) | {"additionalProperties": False},
        "the record forbids additional fields",
    ),
    "other fields become allowed": (
        record(a=(int, ...)) | {"additionalProperties": False},
        record(a=(int, ...)),
        "the record allows additional fields",
    ),
    "a model that holds itself changes": (Tree.model_json_schema(), TreeOfOtherSize.model_json_schema(), "'size' changes its type"),
    "the key changes": ({"x-keyed-by": "model"}, {"x-keyed-by": "run_id"}, "the key changes from model to run_id"),
}

SOUND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a field with a default is added": (record(a=(int, ...)), record(a=(int, ...), b=(str, ""))),
    "a nullable field with a default is added": (record(a=(int, ...)), record(a=(int, ...), b=(Inner | None, None))),
    "a nested field with a default is added": (record(i=(Inner, ...)), record(i=(InnerWider, ...))),
    "an optional nested model gets a field with a default": (record(i=(Inner | None, None)), record(i=(InnerWider | None, None))),
    "items get a field with a default": (record(i=(list[Inner], ...)), record(i=(list[InnerWider], ...))),
    "a description changes": (record(a=(int, Field(description="one"))), record(a=(int, Field(description="two")))),
    "fields change their order": (record(a=(int, ...), b=(str, ...)), record(b=(str, ...), a=(int, ...))),
    "alternatives change their order": (record(a=(int | str, ...)), record(a=(str | int, ...))),
    "a choice is spelt as a constant": (
        {"properties": {"a": {"enum": ["x"], "type": "string"}}, "type": "object"},
        record(a=(Literal["x"], ...)) | {"required": []},
    ),
    "a list of types is spelt as alternatives": (
        {"properties": {"a": {"type": ["string", "null"]}}, "type": "object"},
        {"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}, "type": "object"},
    ),
    "a single allOf stands for its part": (
        {"properties": {"a": {"allOf": [{"type": "string"}]}}, "type": "object"},
        {"properties": {"a": {"type": "string"}}, "type": "object"},
    ),
    "anything allowed is spelt out": ({"type": "object"}, {"type": "object", "additionalProperties": True}),
    "a nested model is renamed, which no record shows": (
        {"$defs": {"A": {"type": "integer"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}},
        {"$defs": {"B": {"type": "integer"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/B"}}},
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_incompatible_change_is_named_in_words(case: str) -> None:
    old, new, expected = BROKEN[case]
    found = incompatibilities(old, new)
    assert any(expected in fault for fault in found), found


@pytest.mark.parametrize("case", SOUND)
def test_a_compatible_change_passes(case: str) -> None:
    old, new = SOUND[case]
    assert incompatibilities(old, new) == []


@pytest.mark.parametrize("case", ["a field with a default is added", "a nested field with a default is added"])
def test_what_may_be_added_may_not_be_taken_back(case: str) -> None:
    old, new = SOUND[case]
    assert incompatibilities(new, old)


@pytest.mark.parametrize(
    "model", [*EVENTS, FeatureSet, Model, Manifest, BundleSchema, Baseline, Golden, Tree], ids=lambda model: model.__name__
)
def test_a_real_schema_is_compatible_with_itself(model: type[BaseModel]) -> None:
    assert incompatibilities(model.model_json_schema(), model.model_json_schema()) == []


scalars = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("integer")}, optional={"minimum": st.integers(), "maximum": st.integers(), "default": st.integers()}
    ),
    st.fixed_dictionaries({"type": st.just("string")}, optional={"pattern": st.text(), "format": st.sampled_from(["uuid", "date-time"])}),
    st.fixed_dictionaries({"enum": st.lists(st.text(), min_size=1, unique=True), "type": st.just("string")}),
    st.fixed_dictionaries({"const": st.integers(), "type": st.just("integer")}),
    st.just({"type": "null"}),
    st.just({"$ref": "#/$defs/Inner"}),
    st.just({}),
)


def objects(part: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(st.text(min_size=1, max_size=8), part, max_size=4)
    return properties.flatmap(
        lambda fields: st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.just(fields)},
            optional={
                "required": st.lists(st.sampled_from(sorted(fields) or ["a"]), unique=True) if fields else st.just([]),
                "additionalProperties": st.one_of(st.booleans(), part),
            },
        )
    )


schemas = st.recursive(
    scalars,
    lambda part: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": part}, optional={"minItems": st.integers(0, 3)}),
        st.fixed_dictionaries({"anyOf": st.lists(part, min_size=1, max_size=3)}),
        objects(part),
    ),
    max_leaves=12,
)
DEFS = {"Inner": {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Inner"}, {"type": "null"}]}}}}


@given(objects(schemas))
def test_any_schema_is_compatible_with_itself(schema: dict[str, Any]) -> None:
    whole = schema | {"$defs": DEFS}
    assert incompatibilities(whole, json.loads(json.dumps(whole))) == []


@given(objects(schemas), schemas)
def test_a_field_more_is_compatible_only_if_it_is_not_required(schema: dict[str, Any], added: dict[str, Any]) -> None:
    old = {"$defs": DEFS, **schema}
    new = {**old, "properties": {**schema["properties"], "brand-new-field": added}}
    assert incompatibilities(old, new) == []
    assert incompatibilities(old, {**new, "required": [*schema.get("required", []), "brand-new-field"]})


def test_compatibility_holds_with_every_golden_version_not_only_the_last(tmp_path: Any) -> None:
    """`note` was taken back between two versions, so a number may not take its name while old records are read."""
    folder = tmp_path / ModelReady.topic.name
    folder.mkdir()
    today = schema_of(ModelReady)
    (folder / "1.json").write_text(json.dumps({**today, "properties": {**today["properties"], "note": {"type": "string", "default": ""}}}))
    (folder / "2.json").write_text(json.dumps(today))

    found = faults_of(ModelReady, tmp_path)

    assert any("version 1 against version 2" in fault and "'note' is gone" in fault for fault in found)
    assert any("version 1 against today's schema" in fault for fault in found)


def test_a_golden_version_that_was_deleted_is_missed(tmp_path: Any) -> None:
    write_golden(ModelReady, tmp_path)
    folder = tmp_path / ModelReady.topic.name
    (folder / "1.json").rename(folder / "2.json")

    with pytest.raises(FileNotFoundError, match=r"1\.json"):
        golden_schemas(ModelReady, tmp_path)


def test_writing_adds_a_version_once(tmp_path: Any) -> None:
    assert write_golden(ModelReady, tmp_path) == tmp_path / "models.ready.v1" / "1.json"
    assert write_golden(ModelReady, tmp_path) is None
    assert faults_of(ModelReady, tmp_path) == []


def test_an_event_with_one_more_optional_field_becomes_the_next_version(tmp_path: Any) -> None:
    write_golden(ModelReady, tmp_path)

    class Wider(ModelReady):
        note: str = ""

    assert faults_of(Wider, tmp_path) == []
    assert schema_of(Wider) not in golden_schemas(Wider, tmp_path)
    assert write_golden(Wider, tmp_path) == tmp_path / "models.ready.v1" / "2.json"


def test_every_event_ignores_fields_it_does_not_know() -> None:
    """What lets a newer producer add a field before the readers are replaced."""
    assert all(event.model_config.get("extra") == "ignore" for event in EVENTS)
    assert Frozen.model_config.get("extra") == "ignore"
