from pathlib import Path

import pytest

from mojomesh_cli.definitions import BadDefinitions, changes, read_documents
from mojomesh_contracts.definitions import parse_definitions

FLIGHTS = "kind: FeatureSet\nname: flights\nentity: flight_id\nfeatures:\n  carrier: {type: category}"


def test_a_folder_is_one_stream_of_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.yml").write_text(FLIGHTS)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "a.yaml").write_text(FLIGHTS.replace("flights", "weather") + "\n---\n" + FLIGHTS.replace("flights", "planes"))
    (tmp_path / "notes.txt").write_text("no definition")

    assert [definition.name for definition in parse_definitions(read_documents(tmp_path))] == ["flights", "weather", "planes"]


def test_every_wrong_file_is_named_with_its_field(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(FLIGHTS.replace("category", "text"))
    (tmp_path / "b.yaml").write_text(FLIGHTS.replace("entity:", "entty:"))
    (tmp_path / "c.yaml").write_text("kind: [")

    with pytest.raises(BadDefinitions, match=r"(?s)a\.yaml.*features\.carrier\.type.*b\.yaml.*entity.*c\.yaml.*not YAML"):
        read_documents(tmp_path)


def test_a_definition_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(FLIGHTS)
    with pytest.raises(BadDefinitions, match=r"b\.yaml: FeatureSet/flights is also in .*a\.yaml"):
        read_documents(tmp_path)


@pytest.mark.parametrize("content", [None, "", "# a comment\n"])
def test_nothing_to_apply_is_said(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(BadDefinitions, match="holds no definition"):
        read_documents(tmp_path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadDefinitions, match="there is no"):
        read_documents(tmp_path / "nothing.yaml")


def test_what_changed_is_told_by_field() -> None:
    old = {"name": "m", "gate": {"min": 0.6, "metric": "auc"}, "features": {"a": {"type": "number"}}}
    new = {"name": "m", "gate": {"min": 0.7}, "features": {"a": {"type": "number"}, "b": {"type": "category"}}}
    assert list(changes(old, new)) == ["~ gate.min: 0.6 → 0.7", "+ features.b.type: category", "- gate.metric: auc"]
