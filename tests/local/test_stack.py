"""The promises of `up` and `down`, on the servers alone (tests/mesh/ runs services); the dead may leave nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from redis import Redis

from mojomesh_chassis.topics import declared_topics
from mojomesh_local import ports
from mojomesh_local.errors import AlreadyRunning, DiskFull, NotRunning, StartFailed
from mojomesh_local.processes import kill_leftover
from mojomesh_local.stack import Mesh, launch, running_stack
from mojomesh_local.state import StateFolder

STORES = ("postgres", "redis", "kafka")
TOPIC = declared_topics()[0].name


@pytest.fixture
def state(tmp_path: Path) -> StateFolder:
    return StateFolder.at(tmp_path / "mesh")


@pytest.fixture
def started(state: StateFolder) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Starts an `up` that the test may kill; what it left is cleared away whatever happens."""
    processes: list[subprocess.Popen[bytes]] = []

    def start_up(*only: str) -> "subprocess.Popen[bytes]":
        process = launch(state, only)
        processes.append(process)
        Mesh(state).wait_running(process)
        return process

    yield start_up
    for process in processes:
        process.terminate()
        process.wait()


def family(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those still alive after a while; a killed process needs a moment to go."""
    _, alive = psutil.wait_procs(processes, timeout=10)
    return alive


def ports_in_use(state: StateFolder) -> list[int]:
    return [port for part in STORES for port in state.ports_of(part) if not ports.is_free(port)]


async def keep(mesh: Mesh, word: str) -> None:
    """Have PostgreSQL and Kafka acknowledge a word."""
    owner = await asyncpg.connect(mesh.env["MOJOMESH_POSTGRES_OWNER"])
    await owner.execute("CREATE TABLE IF NOT EXISTS kept (word text)")
    await owner.execute("INSERT INTO kept VALUES ($1)", word)
    await owner.close()
    producer = AIOKafkaProducer(bootstrap_servers=mesh.env["MOJOMESH_KAFKA"], acks="all")
    await producer.start()
    await producer.send_and_wait(TOPIC, word.encode(), partition=0)
    await producer.stop()


async def kept(mesh: Mesh) -> tuple[list[str], list[str]]:
    """The words that PostgreSQL and Kafka know."""
    owner = await asyncpg.connect(mesh.env["MOJOMESH_POSTGRES_OWNER"])
    rows = [row["word"] for row in await owner.fetch("SELECT word FROM kept")]
    await owner.close()
    consumer = AIOKafkaConsumer(bootstrap_servers=mesh.env["MOJOMESH_KAFKA"])
    await consumer.start()
    partition = TopicPartition(TOPIC, 0)
    consumer.assign([partition])
    await consumer.seek_to_beginning(partition)
    end = (await consumer.end_offsets([partition]))[partition]
    records = [(await consumer.getone()).value.decode() for _ in range(end)]
    await consumer.stop()
    return rows, records


async def test_up_after_down_goes_on_with_the_data_at_the_same_addresses(state: StateFolder) -> None:
    with running_stack(state.path, STORES) as mesh:
        env = mesh.env
        await keep(mesh, "first")

    with running_stack(state.path, STORES) as mesh:
        assert await kept(mesh) == (["first"], ["first"])
        assert mesh.env == env


def test_down_leaves_no_process_and_no_held_port(state: StateFolder, started: Callable[..., "subprocess.Popen[bytes]"]) -> None:
    process = started(*STORES)
    children = family(process)
    assert {child.name() for child in children} >= {"postgres", "redis-server", "java"}
    assert ports_in_use(state)

    assert Mesh(state).stop()

    assert process.wait() == 0
    assert until_gone(children) == []
    assert ports_in_use(state) == []
    assert Mesh(state).status.phase == "stopped"
    assert not Mesh(state).stop(), "a second `down` finds nothing to stop"


async def test_kill_9_of_up_leaves_no_process_and_no_held_port_and_no_data_is_lost(
    state: StateFolder, started: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    process = started(*STORES)
    await keep(Mesh(state), "acknowledged")
    children = family(process)

    process.kill()
    process.wait()

    assert until_gone(children) == []
    assert ports_in_use(state) == []
    assert Mesh(state).status.phase == "stopped"
    started(*STORES)
    assert await kept(Mesh(state)) == (["acknowledged"], ["acknowledged"])


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_up_stops_in_good_order_when_it_is_asked_to(
    state: StateFolder, started: Callable[..., "subprocess.Popen[bytes]"], signal_number: int
) -> None:
    process = started("redis")
    children = family(process)

    process.send_signal(signal_number)

    assert process.wait() == 0
    assert until_gone(children) == []


def test_up_that_is_stopped_while_starting_leaves_nothing(state: StateFolder) -> None:
    process = launch(state, STORES)
    while not state.recorded_processes():
        time.sleep(0.01)
    children = family(process)

    process.terminate()

    assert process.wait() == 0
    assert until_gone(children) == []
    assert ports_in_use(state) == []


def test_a_second_up_is_refused_and_told_which_process_runs(state: StateFolder, started: Callable[..., "subprocess.Popen[bytes]"]) -> None:
    first = started("redis")
    command = [sys.executable, "-m", "mojomesh_local.stack", "--state", str(state.path), "--only", "redis"]

    second = subprocess.run(command, capture_output=True, text=True, check=False)

    assert second.returncode == 1
    assert f"already up in {state.path} (process {first.pid})" in second.stderr
    assert "mojomesh down" in second.stderr
    with pytest.raises(AlreadyRunning):
        launch(state, ["redis"])
    assert Mesh(state).part("redis").phase == "ready", "the first does not suffer from it"


def test_two_state_folders_run_side_by_side(tmp_path: Path) -> None:
    with running_stack(tmp_path / "a", ["redis"]) as a, running_stack(tmp_path / "b", ["redis"]) as b:
        assert a.pid("redis") != b.pid("redis")
        assert a.env["MOJOMESH_TOKEN"] != b.env["MOJOMESH_TOKEN"]


def test_a_taken_port_is_named_with_who_holds_it(state: StateFolder) -> None:
    with running_stack(state.path, ["redis"]):
        pass
    port = state.ports()["redis"]
    with socket.create_server((ports.LOOPBACK, port)), pytest.raises(StartFailed) as refused, running_stack(state.path, ["redis"]):
        pass
    assert f"Port {port}, which this mesh keeps for redis, is taken by" in str(refused.value)
    assert f"pid {os.getpid()}" in str(refused.value)
    assert "ports.json" in str(refused.value)


def test_a_server_that_cannot_start_shows_its_last_words_and_its_log(state: StateFolder) -> None:
    with running_stack(state.path, ["postgres"]):
        pass
    (state.path / "postgres" / "PG_VERSION").write_text("17\n")

    with pytest.raises(StartFailed) as refused, running_stack(state.path, ["postgres"]):
        pass

    assert "data directory was initialized by PostgreSQL version 17" in str(refused.value)
    assert str(state.log_of("postgres")) in str(refused.value)
    assert Mesh(state).status.phase == "failed"


def test_a_full_disk_is_refused_before_anything_starts(state: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mojomesh_local.state.MIN_FREE_BYTES", 10**18)

    with pytest.raises(DiskFull, match="Make room, or choose another folder with --state"), running_stack(state.path):
        pass


@pytest.mark.parametrize(
    ("variable", "address", "shown"),
    [
        ("MOJOMESH_KAFKA", "127.0.0.1:9", "127.0.0.1:9"),
        ("MOJOMESH_REDIS", "redis://:hidden@127.0.0.1:9/0", "redis://:…@127.0.0.1:9/0"),
        ("MOJOMESH_POSTGRES", "postgresql://me:hidden@127.0.0.1:9/db", "postgresql://me:…@127.0.0.1:9/db"),
        ("MOJOMESH_H2O", "http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("MOJOMESH_REDIS", "rubbish", "rubbish"),
        ("MOJOMESH_POSTGRES", "rubbish", "rubbish"),
        ("MOJOMESH_H2O", "rubbish", "rubbish"),
    ],
)
def test_a_server_of_ones_own_that_does_not_answer_is_named(state: StateFolder, variable: str, address: str, shown: str) -> None:
    name = variable.removeprefix("MOJOMESH_").lower()

    with pytest.raises(StartFailed) as refused, running_stack(state.path, [name], {variable: address}):
        pass

    assert str(refused.value).startswith(f"{variable} names a server of your own, {shown}, which does not answer")
    assert "unset it" in str(refused.value)
    assert "hidden" not in str(refused.value)


def test_a_server_of_ones_own_takes_the_place_of_ours(state: StateFolder, redis_url: str) -> None:
    with running_stack(state.path, ["redis"], {"MOJOMESH_REDIS": redis_url}) as mesh:
        assert mesh.env["MOJOMESH_REDIS"] == redis_url
        assert mesh.part("redis").phase == "own"
        assert mesh.part("redis").pid is None


def test_a_killed_server_starts_again(state: StateFolder) -> None:
    with running_stack(state.path, ["redis", "postgres"]) as mesh:
        for name in ("redis", "postgres"):
            killed = mesh.kill(name)
            mesh.wait_ready(name, after=killed)
            assert mesh.part(name).restarts == 1


def test_a_part_can_be_kept_down(state: StateFolder) -> None:
    with running_stack(state.path, ["redis"]) as mesh, Redis.from_url(mesh.env["MOJOMESH_REDIS"]) as client:
        with mesh.without("redis"):
            while mesh.part("redis").phase != "restarting":
                time.sleep(0.02)
            assert not ports.answers(state.ports()["redis"])
            with pytest.raises(NotRunning):
                mesh.pid("redis")
        assert client.ping()


def test_secrets_are_readable_by_their_user_only(state: StateFolder) -> None:
    with running_stack(state.path, ["redis"]):
        pass

    assert state.path.stat().st_mode & 0o077 == 0
    for file in (state.env_file, state.signing_key, state.path / "secrets.json", state.path / "redis" / "redis.conf"):
        assert file.stat().st_mode & 0o077 == 0, file


def test_a_leftover_is_killed_only_if_it_is_the_very_process_that_was_recorded() -> None:
    stranger = subprocess.Popen(["sleep", "60"])
    started = psutil.Process(stranger.pid).create_time()
    try:
        assert not kill_leftover(stranger.pid, started - 100), "the number was used again by somebody else"
        assert stranger.poll() is None

        assert kill_leftover(stranger.pid, started)
        assert not psutil.pid_exists(stranger.pid)
    finally:
        stranger.kill()
        stranger.wait()


def test_a_mesh_that_was_never_up_says_how_to_start_one(state: StateFolder) -> None:
    with pytest.raises(NotRunning, match="mojomesh up"):
        _ = Mesh(state).status
    with pytest.raises(NotRunning, match="mojomesh up"):
        _ = Mesh(state).env
    assert not state.path.exists()


def test_the_signing_key_signs_what_the_public_key_verifies(state: StateFolder, tmp_path: Path) -> None:
    from model_signing import signing, verifying

    state.prepare()
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model").write_text("trees")

    signing.Config().use_elliptic_key_signer(private_key=state.signing_key).sign(bundle, tmp_path / "signature")

    verifying.Config().use_elliptic_key_verifier(public_key=state.public_key).verify(bundle, tmp_path / "signature")


@pytest.mark.parametrize("guarded", [True, False])
def test_a_parent_that_is_killed_takes_its_grandchildren_along(tmp_path: Path, guarded: bool) -> None:
    """As Mage's scheduler and the scorer's workers are: children of children, which the death signal does not reach."""
    starting = {
        True: "from mojomesh_local.processes import Command, start; start(Command('parent', argv, Path(sys.argv[1])))",
        False: "import subprocess; subprocess.Popen(argv, start_new_session=True)",
    }[guarded]
    script = f"import sys, time; from pathlib import Path; argv = ['sh', '-c', 'sleep 300 & sleep 301']; {starting}; time.sleep(300)"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log")])
    while sum(child.name() == "sleep" for child in family(process)) < 2:
        time.sleep(0.02)
    children = family(process)

    process.kill()
    process.wait()

    if guarded:
        assert until_gone(children) == []
        return
    survivors = [child for child in children if child.is_running()]
    for survivor in survivors:
        survivor.kill()
    assert len(survivors) == 3, "without the guard the shell and its two go on"
