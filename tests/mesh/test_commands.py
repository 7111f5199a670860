"""The commands that look after the store, as a person types them at a running mesh: what they do, what they print, how they refuse."""

import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mojomesh_cli.main import main
from mojomesh_local.postgres import OWNER, SERVICE, Cluster
from mojomesh_local.stack import Mesh, running_stack

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(300)]

SHARDS = ("commands_first", "commands_second")
PARTS = ("postgres", "redis", "kafka", "ingest", "features", "registry")
PATIENCE_S = 30.0


class Said(NamedTuple):
    """How a command ended, its answer, and what it complained of."""

    status: int
    answer: str
    complaint: str


Type = Callable[..., Said]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, postgres_cluster: Cluster, postgres_template: str) -> Iterator[Mesh]:
    """The store's part of a mesh with two shards, of which the second was just added: entities are placed on the first."""
    for name in SHARDS:
        postgres_cluster.create_database(name, template=postgres_template)
    postgres_cluster.execute("UPDATE store.shard SET n_shards = 1", SHARDS[0])
    urls = {
        variable: ",".join(postgres_cluster.url(role, name) for name in SHARDS)
        for variable, role in (("MOJOMESH_POSTGRES", SERVICE), ("MOJOMESH_POSTGRES_OWNER", OWNER))
    }
    with running_stack(tmp_path_factory.mktemp("commands") / "state", only=PARTS, env=urls) as mesh:
        yield mesh
    for name in SHARDS:
        postgres_cluster.drop_database(name)


@pytest.fixture
def mojomesh(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Type:
    """Types a command, with an answer to what it may ask."""

    def typed(*words: str, answer: str = "") -> Said:
        monkeypatch.setattr(sys, "argv", ["mojomesh", *words, "--state", str(mesh.state.path)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        with pytest.raises(SystemExit) as ended:
            main()
        return Said(int(ended.value.code or 0), *capsys.readouterr())

    return typed


@pytest.fixture
def rows_of(postgres_cluster: Cluster) -> Callable[[str], list[int]]:
    """How many rows of a feature set each shard has."""

    def count(feature_set: str) -> list[int]:
        asked = f"SELECT count(*) FROM store.feature_rows WHERE feature_set = '{feature_set}'"
        return [int(postgres_cluster.execute(asked, name)) for name in SHARDS]

    return count


@pytest.fixture
def told(mojomesh: Type, tmp_path: Path) -> Callable[..., None]:
    """Declares a feature set that holds back what shakes too much, and publishes how much each pump shakes."""

    def tell(feature_set: str, **shaking: float) -> None:
        definition = tmp_path / f"{feature_set}.yaml"
        definition.write_text(f"""
            kind: FeatureSet
            name: {feature_set}
            entity: pump
            features:
              vibration: {{type: number, min: 0}}
            quality:
              window: 1s
              features:
                vibration: {{max: 50, otherwise: hold}}
        """)
        file = tmp_path / f"{feature_set}.csv"
        lines = [f"{pump},2026-01-01T12:00:00Z,{vibration}" for pump, vibration in shaking.items()]
        file.write_text("\n".join(["pump,event_time,vibration", *lines]))
        assert mojomesh("apply", str(definition)).status == 0
        assert mojomesh("publish", str(file), "--feature-set", feature_set).status == 0

    return tell


def until(holds: Callable[[], object], what: str) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up, what
        time.sleep(0.1)


def test_quality_shows_what_came_in_and_what_was_not_as_expected(mojomesh: Type, told: Callable[..., None]) -> None:
    told("watched", P1=3.0, P2=900.0)

    # Two entities may lie in two partitions, which may be read in two windows.
    def windows() -> list[dict[str, int]]:
        found: list[dict[str, int]] = json.loads(mojomesh("quality", "watched", "--json").answer)
        return found

    def came() -> tuple[int, int]:
        return sum(window["n_rows"] for window in windows()), sum(window["n_held"] for window in windows())

    until(lambda: came() == (1, 1), "the windows of both events were not judged")
    said = mojomesh("quality", "watched", "--windows", "1000")

    assert said.status == 0
    assert re.search(r"1 of [12] rows, as in: 'vibration' is 900\.0, expected at most 50", said.answer)


def test_held_events_are_listed_and_let_go(mojomesh: Type, told: Callable[..., None], rows_of: Callable[[str], list[int]]) -> None:
    told("kept", P1=3.0, P2=900.0, P3=800.0)

    def held() -> list[str]:
        return [event["event_id"] for event in json.loads(mojomesh("quarantine", "list", "--feature-set", "kept", "--json").answer)]

    until(lambda: len(held()) == 2 and sum(rows_of("kept")) == 1, "the events were not told apart")
    listed = mojomesh("quarantine", "list", "--feature-set", "kept")
    first, second = held()

    assert listed.status == 0
    assert all(word in listed.answer for word in (first, second, "P2", "P3", "'vibration' is 900.0, expected at most 50"))
    assert mojomesh("quarantine", "release", first) == (0, "1 released.\n", "")
    assert held() == [second]
    assert mojomesh("quarantine", "release", first) == (0, "0 released.\n", "")
    assert mojomesh("quarantine", "release", "--feature-set", "kept") == (0, "1 released.\n", "")
    assert mojomesh("quarantine", "list", "--feature-set", "kept") == (0, "Nothing is held back.\n", "")
    until(lambda: sum(rows_of("kept")) == 3, "what was let go is not stored")


def test_an_entity_is_forgotten_when_the_answer_is_yes(
    mojomesh: Type, told: Callable[..., None], rows_of: Callable[[str], list[int]]
) -> None:
    told("remembered", P1=3.0, P2=4.0, P3=900.0)
    until(lambda: sum(rows_of("remembered")) == 2, "not stored")

    said = mojomesh("store", "forget", "P1", "--feature-set", "remembered", answer="n\n")
    assert (said.status, sum(rows_of("remembered"))) == (1, 2)
    assert "Erase all that is known of 'P1'? Nobody can bring it back." in said.answer

    said = mojomesh("store", "forget", "P1", "--feature-set", "remembered", answer="y\n")
    assert (said.status, sum(rows_of("remembered"))) == (0, 1)
    assert "Erased rows: 1 of remembered. Held events: 0. Receipts emptied: 0.\n" in said.answer
    assert "Kafka keeps what it was told until its retention ends" in said.answer

    said = mojomesh("store", "forget", "P3", "--feature-set", "remembered", "--yes")
    assert "Erased rows: none. Held events: 1." in said.answer
    assert "Erased rows: none. Held events: 0." in mojomesh("store", "forget", "nobody", "--yes").answer


def test_entities_move_to_a_shard_that_was_added(mojomesh: Type, told: Callable[..., None], rows_of: Callable[[str], list[int]]) -> None:
    pumps = {f"M{n}": float(n) for n in range(40)}
    told("spread", **pumps)
    until(lambda: rows_of("spread") == [40, 0], "not stored on the first shard")

    said = mojomesh("store", "rebalance")
    first, second = rows_of("spread")
    assert (said.status, first, second > 0) == (0, 40, True)
    assert said.answer.startswith("Added: shard 1, with ")
    assert "rows stay there until they are sealed: run `mojomesh store seal`, and this again." in said.answer

    assert "segments/spread/0-" in mojomesh("store", "seal").answer
    cleaned = json.loads(mojomesh("store", "rebalance", "--json").answer)
    assert (cleaned["added"], cleaned["cleaned"] >= second, cleaned["left"]) == ([], True, 0)
    assert rows_of("spread") == [40 - second, second]
    assert mojomesh("store", "seal") == (0, "Everything is sealed.\n", "")
    assert mojomesh("store", "rebalance") == (0, "Every shard has its share.\n", "")

    told("spread", **{pump: shaking + 0.5 for pump, shaking in pumps.items()})  # corrections, each stored where its entity is by now
    until(lambda: rows_of("spread") == [2 * (40 - second), 2 * second], "not stored where entities are placed")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("quality", "trains"), "no feature set 'trains'; there are: "),
        (("quarantine", "release"), "name the events to release (`mojomesh quarantine list` shows them), or a --feature-set, or --all"),
        (("store", "forget", "P1", "--yes", "--feature-set", "trains"), "no feature set 'trains'; there are: "),
    ],
)
def test_a_wrong_call_says_what_to_do(mojomesh: Type, words: tuple[str, ...], reason: str) -> None:
    said = mojomesh(*words)

    assert (said.status, said.answer) == (1, "")
    assert said.complaint.startswith("mojomesh: ")
    assert reason in said.complaint


@pytest.mark.parametrize("words", [("quarantine", "release", "--all"), ("store", "seal")])
def test_without_the_token_nothing_is_changed(mojomesh: Type, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    monkeypatch.setenv("MOJOMESH_TOKEN", "somebody-else's")

    said = mojomesh(*words)

    assert said.status == 1
    assert "`mojomesh` takes it from the state folder or from MOJOMESH_TOKEN." in said.complaint


def test_a_shard_that_is_not_there_is_told(mojomesh: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOJOMESH_POSTGRES_OWNER", "postgresql://mojomesh:none@127.0.0.1:9/mojomesh")

    said = mojomesh("store", "forget", "P1", "--yes")

    assert said.status == 1
    assert "Look with `mojomesh status`, start with `mojomesh up`." in said.complaint
