from pathlib import Path

import pytest

from mojomesh_local import jars
from mojomesh_local.errors import JarMismatch


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Jars are put into a folder of the test's."""
    monkeypatch.setattr(jars, "folder_of", lambda name: tmp_path / name)
    return tmp_path


def test_all_pinned_jars_are_in_their_place_after_set_up() -> None:
    assert len(jars.pins()) > 50
    assert jars.missing_jars() == []


def test_a_jar_that_was_changed_is_fetched_again(elsewhere: Path) -> None:
    jars.fetch_jars()
    ecj = jars.place_of("ecj/ecj-3.33.0.jar")
    ecj.write_bytes(ecj.read_bytes() + b"more")
    assert jars.missing_jars() == ["ecj/ecj-3.33.0.jar"]

    jars.fetch_jars()

    assert jars.missing_jars() == []


def test_a_jar_that_is_not_the_pinned_one_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jars, "pins", lambda: {"ecj/ecj-3.33.0.jar": "0" * 64})

    with pytest.raises(JarMismatch, match="is pinned"):
        jars.fetch_jars()

    assert not (elsewhere / "ecj" / "ecj-3.33.0.jar").exists()
