"""The commands apply, train, models, promote, rollback and traffic against a registry at a port."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import uuid4

import pytest
from typer.testing import CliRunner, Result

from mojomesh_chassis.errors import MeshError, PermanentError
from mojomesh_cli.calls import CallFailed
from mojomesh_cli.main import app
from mojomesh_cli.models import TrainingFailed
from mojomesh_contracts.bundles import Cause
from mojomesh_contracts.events import LeftOut, TrafficFollowed, TrainingRequested


class Commands:
    """Runs `mojomesh …` beside the test's loop, as a person in another terminal would."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment: dict[str, str | None] = {**environment, "COLUMNS": "200", "NO_COLOR": "1"}

    def __setitem__(self, name: str, value: str) -> None:
        self._environment[name] = value

    async def run(self, *arguments: str) -> Result:
        return await asyncio.to_thread(lambda: CliRunner().invoke(app, [*arguments, "--state", "/nowhere"], env=self._environment))

    async def json(self, *arguments: str) -> Any:
        result = await self.run(*arguments, "--json")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return json.loads(result.stdout)


@pytest.fixture
def commands(served: Any) -> Commands:
    urls = {"MOJOMESH_REGISTRY_URL": str(served.http.base_url), "MOJOMESH_TRAINER_URL": "http://127.0.0.1:9"}
    return Commands(served.environment | urls)


@pytest.fixture
def trainer() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What trainer answers at GET /v1/runs: a list that the test fills."""
    runs: list[dict[str, Any]] = []

    class Runs(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"runs": runs}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Runs)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", runs
    server.shutdown()
    thread.join()
    server.server_close()


async def test_applying_tells_what_changed_and_models_shows_it(commands: Commands, tmp_path: Path) -> None:
    file = tmp_path / "weather.yaml"
    file.write_text("kind: FeatureSet\nname: weather\nentity: airport\nfeatures:\n  temp: {type: number}\n")
    first = await commands.run("apply", str(file))
    file.write_text(file.read_text() + "  wind: {type: number, unit: knot}\n")
    second, third = await commands.run("apply", str(file)), await commands.json("apply", str(file))

    assert "+ FeatureSet/weather version 1 created" in first.stdout
    assert "~ FeatureSet/weather version 2 changed\n    + features.wind.type: number\n    + features.wind.unit: knot" in second.stdout
    assert third == {"applied": [{"definition_id": "FeatureSet/weather", "version": 2, "outcome": "unchanged", "changes": []}]}
    assert "none yet" in (await commands.run("models")).stdout
    assert "It has no version yet: mojomesh train delay --wait" in (await commands.run("models", "delay")).stdout


async def test_versions_are_shown_promoted_and_rolled_back(commands: Commands, served: Any) -> None:
    await served.offer(served.make_bundle(auc=0.7))
    await served.version(1)
    await served.offer(served.make_bundle(auc=0.5, against=(await served.model())["champion"]))
    await served.version(2)

    shown = (await commands.run("models", "delay")).stdout
    refused = await commands.run("promote", "delay", "2")
    unsaid = await commands.run("promote", "delay", "2", "--force")
    forced = await commands.run("promote", "delay", "2", "--force", "--reason", "a drill")
    back = await commands.json("rollback", "delay", "--reason", "over")

    assert "champion" in shown
    assert "below the gate's minimum 0.6" in " ".join(shown.split())
    assert isinstance(refused.exception, CallFailed)
    assert "force it and give a reason" in str(refused.exception)
    assert isinstance(unsaid.exception, MeshError)
    assert "--reason" in str(unsaid.exception)
    assert "Version 2 of delay is the champion. Before it was version 1." in forced.stdout
    assert back == {"model": "delay", "version": 1, "promotion": 3}


async def test_training_without_waiting_returns_the_request(commands: Commands, served: Any) -> None:
    answer = await commands.json("train", "delay", "--reason", "spring", "--snapshot-time", "2013-05-01")

    (event,) = await served.heard(TrainingRequested, 1)
    assert answer["event_id"] == str(event.event_id)
    assert (event.reason, event.snapshot_time.isoformat()) == ("spring", "2013-05-01T00:00:00+00:00")


@pytest.mark.parametrize(("auc", "exit_code"), [(0.7, 0), (0.5, 1)])
async def test_waiting_for_training_ends_with_the_verdict(
    commands: Commands, served: Any, trainer: Any, auc: float, exit_code: int
) -> None:
    commands["MOJOMESH_TRAINER_URL"], runs = trainer
    command = asyncio.create_task(commands.run("train", "delay", "--wait"))
    (event,) = await served.heard(TrainingRequested, 1)
    cause = Cause(kind="requested", event_id=event.event_id, reason=event.reason)
    runs.append({"run_id": str(uuid4()), "state": "training", "cause": cause.model_dump(mode="json"), "folds": [{}]})
    await served.offer(served.make_bundle(auc=auc, cause=cause))

    result = await command

    assert result.exit_code == exit_code
    text = " ".join(result.stdout.split())
    if exit_code:
        assert "does not serve: auc 0.5000 is below the gate's minimum 0.6" in text
        assert "mojomesh promote delay 1 --force" in text
    else:
        assert "Version 1 of delay is the champion: auc 0.7000" in text


async def test_waiting_for_a_run_that_fails_gives_its_reason(commands: Commands, served: Any, trainer: Any) -> None:
    commands["MOJOMESH_TRAINER_URL"], runs = trainer
    command = asyncio.create_task(commands.run("train", "delay", "--wait"))
    (event,) = await served.heard(TrainingRequested, 1)
    runs.append({"run_id": "r1", "state": "failed", "reason": "no labels", "cause": {"event_id": str(event.event_id)}})

    result = await command

    assert isinstance(result.exception, TrainingFailed)
    assert "run r1 of delay failed: no labels" in str(result.exception)


async def test_without_the_token_the_command_says_where_it_comes_from(commands: Commands) -> None:
    commands["MOJOMESH_TOKEN"] = "guessed-wrong-token"
    result = await commands.run("rollback", "delay")
    assert isinstance(result.exception, CallFailed)
    assert "state folder or from MOJOMESH_TOKEN" in str(result.exception)


async def test_with_nobody_there_the_command_says_what_to_do(commands: Commands) -> None:
    commands["MOJOMESH_REGISTRY_URL"] = "http://127.0.0.1:9"
    result = await commands.run("models")
    assert isinstance(result.exception, CallFailed)
    assert "mojomesh up" in str(result.exception)


async def test_traffic_is_set_shown_and_cleared(commands: Commands, served: Any) -> None:
    for number in (1, 2, 3):
        await served.offer(served.make_bundle(auc=0.7 if number == 1 else 0.55))
        await served.version(number)

    given = (await commands.run("traffic", "delay", "2=0.05", "3=shadow")).stdout
    listed = (await commands.run("models", "delay")).stdout
    left_out = [LeftOut(version=2, reason="golden rows [differ]")]
    await served.publish(
        TrafficFollowed(event_id=uuid4(), model="delay", setting=1, replica="0", followed_at=datetime.now(UTC), left_out=left_out)
    )
    while "scorer 0 leaves version 2 out: golden rows [differ]" not in (await commands.run("traffic", "delay")).stdout:
        await asyncio.sleep(0.02)
    cleared = await commands.json("traffic", "delay", "--clear")

    assert "scorer 0 still follows setting 1 of 2" in (await commands.run("traffic", "delay")).stdout
    assert "leaves" not in given
    assert "version 1 is the champion of delay and scores 95.0% of the entities" in given
    assert "version 2 scores 5.0% of the entities" in given
    assert "version 3 is a shadow" in given
    assert "challenger, 5.0%" in listed
    assert (cleared["setting"], cleared["challengers"], cleared["shadows"]) == (2, [], [])
    for wrong in (["2"], ["2=much"], ["2=0.1", "--clear"]):
        assert isinstance((await commands.run("traffic", "delay", *wrong)).exception, PermanentError)
