"""The commands that start, examine and stop a mesh, as a person types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mojomesh_local.processes import kill_leftover
from mojomesh_local.state import StateFolder


def mojomesh(folder: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mojomesh_cli.main", *arguments, "--state", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env={**os.environ, **env})


def test_a_mesh_is_started_examined_stopped_and_forgotten(tmp_path: Path) -> None:
    folder = tmp_path / "mesh"
    try:
        up = mojomesh(folder, "up", "--detach", "--only", "redis")
        assert up.returncode == 0, up.stderr
        assert "The mesh is up" in up.stdout

        status = mojomesh(folder, "status", "--json")
        assert status.returncode == 0
        found = json.loads(status.stdout)
        assert found["phase"] == "running"
        assert found["parts"]["redis"]["problem"] is None
        assert found["parts"]["redis"]["address"].startswith("redis://")

        again = mojomesh(folder, "up", "--detach", "--only", "redis")
        assert again.returncode == 1
        assert "already up" in again.stderr
        refused = mojomesh(folder, "reset", "--yes")
        assert refused.returncode == 1
        assert "mojomesh down" in refused.stderr
        assert "Ready to accept connections" in mojomesh(folder, "logs", "redis").stdout
        missing = mojomesh(folder, "logs", "spark")
        assert missing.returncode == 1
        assert "redis" in missing.stderr
    finally:
        down = mojomesh(folder, "down")
    assert "The mesh is down" in down.stdout
    assert mojomesh(folder, "status").returncode == 1
    assert mojomesh(folder, "reset").returncode == 1, "without an answer nothing is deleted"
    assert folder.exists()
    assert mojomesh(folder, "reset", "--yes").returncode == 0
    assert not folder.exists()


def test_status_tells_a_server_that_does_not_answer(tmp_path: Path) -> None:
    folder = tmp_path / "mesh"
    try:
        assert mojomesh(folder, "up", "--detach", "--only", "redis").returncode == 0
        state = StateFolder.at(folder)
        state.holding("redis").touch()
        [(_, pid, started)] = state.recorded_processes()
        assert kill_leftover(pid, started)

        status = mojomesh(folder, "status", "--json")

        assert status.returncode == 1
        assert json.loads(status.stdout)["parts"]["redis"]["problem"]
    finally:
        mojomesh(folder, "down")


def test_a_mesh_that_did_not_come_up_says_why_once_and_again_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "mesh"

    refused = mojomesh(folder, "up", "--detach", "--only", "kafka", MOJOMESH_KAFKA="127.0.0.1:9")
    status = mojomesh(folder, "status")

    reason = "MOJOMESH_KAFKA names a server of your own, 127.0.0.1:9, which does not answer: no Kafka there."
    assert refused.stderr.startswith(f"mojomesh: {reason}")
    assert status.stdout.startswith(f"The mesh in {folder} is failed.\n{reason}")


def test_a_command_says_in_one_line_that_kafka_does_not_answer(tmp_path: Path) -> None:
    refused = mojomesh(tmp_path / "mesh", "dlt", "list", MOJOMESH_KAFKA="127.0.0.1:9")

    assert refused.stderr == ("mojomesh: nobody answers as Kafka at 127.0.0.1:9. Look with `mojomesh status`, start with `mojomesh up`.\n")


def test_reset_deletes_nothing_but_a_state_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    refused = mojomesh(tmp_path, "reset", "--yes")

    assert refused.returncode == 1
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("command", ["status", "migrate", "quarantine list", "store rebalance"])
def test_without_a_mesh_a_command_says_how_to_get_one(tmp_path: Path, command: str) -> None:
    refused = mojomesh(tmp_path / "nothing", *command.split())

    assert refused.returncode == 1
    assert "mojomesh up" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_part_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    refused = mojomesh(tmp_path / "mesh", "up", "--only", "spark")

    assert refused.returncode == 1
    assert "There is no part spark" in refused.stderr
    assert "kafka" in refused.stderr


def test_doctor_names_what_is_wrong(tmp_path: Path) -> None:
    well = mojomesh(tmp_path / "mesh", "doctor", "--json")

    findings = json.loads(well.stdout)["findings"]
    assert findings["platform and Python"] == "well"
    assert findings["jars"] == "well"
    assert findings["Java"] == "well"
