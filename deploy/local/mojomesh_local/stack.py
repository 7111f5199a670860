"""A mesh on this machine, seen from outside its `up`: start one, find it, look at it, hurt it, stop it."""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .errors import LocalError, NotRunning, StartFailed
from .processes import LOG_TAIL_LINES, dying_with
from .state import PartStatus, StateFolder, Status
from .supervisor import already_running, up

STOP_PATIENCE_S = 90.0


class Mesh:
    """The mesh of a state folder, whoever started it."""

    def __init__(self, state: StateFolder) -> None:
        self.state = state

    @property
    def env(self) -> dict[str, str]:
        """Its variables, for a client's or a service's environment."""
        return self.state.read_env()

    @property
    def status(self) -> Status:
        """What runs, as its `up` last wrote it down.

        Raises:
            NotRunning: No mesh was ever started here.
        """
        status = self.state.read_status()
        if status is None:
            raise NotRunning(
                f"No mesh has been started in {self.state.path}. Start one with `mojomesh up`, or name another folder with --state."
            )
        return status

    def part(self, name: str) -> PartStatus:
        """One server or service.

        Raises:
            NotRunning: It does not belong to this mesh.
        """
        parts = self.status.parts
        if name not in parts:
            raise NotRunning(f"This mesh has no part {name!r}; it has {', '.join(parts)}.")
        return parts[name]

    def url(self, name: str) -> str:
        """Where a service answers HTTP."""
        return self.env[f"MOJOMESH_{name.upper()}_URL"]

    def pid(self, name: str) -> int:
        """The process of a part that runs.

        Raises:
            NotRunning: It does not run just now.
        """
        pid = self.part(name).pid
        if pid is None:
            raise NotRunning(f"{name} is {self.part(name).phase}")
        return pid

    def log(self, name: str) -> Path:
        """The log of a part, of `migrate`, or of `up` itself."""
        return self.state.log_of(name)

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> int:
        """Send a part a signal; its pid then. `up` starts again what ends."""
        pid = self.pid(name)
        os.kill(pid, signal_number)
        return pid

    def wait_ready(self, name: str, after: int | None = None, within_s: float = 60.0) -> None:
        """Return when a part answers, as another process than `after`.

        Raises:
            StartFailed: It does not in time.
        """
        give_up = time.monotonic() + within_s
        while not ((part := self.part(name)).phase == "ready" and part.pid != after):
            if time.monotonic() > give_up:
                raise StartFailed(f"{name} is still {part.phase} after {within_s:.0f} s; its log: {part.log}")
            time.sleep(0.05)

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """The mesh with one part killed and kept down for as long as the block lasts; ready again afterwards."""
        held = self.state.holding(name)
        held.touch()
        killed = self.kill(name)
        try:
            yield
        finally:
            held.unlink()
            self.wait_ready(name, after=killed)

    def wait_running(self, process: "subprocess.Popen[bytes]") -> None:
        """Return when the `up` in `process` has all its parts ready.

        Raises:
            StartFailed: It gave up; the message is its own.
        """
        while True:
            ended = process.poll() is not None
            status = self.state.read_status()
            if status and status.pid == process.pid and status.phase == "running":
                return
            if ended:
                raise StartFailed(status.error if status and status.pid == process.pid and status.error else _end_of(self.log("up")))
            time.sleep(0.05)

    def stop(self) -> bool:
        """Ask its `up` to stop, and return when everything has; False when none was up.

        Raises:
            LocalError: It did not stop in time.
        """
        if not self.state.is_up:
            return False
        pid = self.status.pid
        os.kill(pid, signal.SIGTERM)
        give_up = time.monotonic() + STOP_PATIENCE_S
        while self.state.is_up:
            if time.monotonic() > give_up:
                raise LocalError(
                    f"`up` (process {pid}) has not stopped after {STOP_PATIENCE_S:.0f} s. Kill it with `kill -9 {pid}`: nothing is lost."
                )
            time.sleep(0.05)
        return True


def launch(
    state: StateFolder, only: Sequence[str] = (), env: Mapping[str, str] | None = None, outlive: bool = False
) -> "subprocess.Popen[bytes]":
    """Start an `up` as a process of its own, which writes to the log `up`; it ends with this process unless it is to `outlive` it.

    Raises:
        AlreadyRunning: There is one.
        DiskFull: Not even its log could be trusted to hold what it says.
    """
    if state.is_up:
        raise already_running(state)
    log = state.log_of("up")
    state.make()
    argv = [sys.executable, "-m", "mojomesh_local.stack", "--state", str(state.path), *(word for part in only for word in ("--only", part))]
    with log.open("wb") as out:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
            preexec_fn=None if outlive else dying_with(os.getpid()),
        )


@contextmanager
def running_stack(folder: Path, only: Sequence[str] = (), env: Mapping[str, str] | None = None) -> Iterator[Mesh]:
    """A mesh in `folder` that is ready, and stopped at the end; for tests and demonstrations.

    `only` names the parts to run, all by default; `env` is added to the environment of `up`, as in `{"SCORER_WORKERS": "1"}`.
    Call it from the main thread: the mesh ends with the thread that started it.

    Raises:
        StartFailed: It did not come up; the message says what to do.
    """
    mesh = Mesh(StateFolder.at(folder))
    process = launch(mesh.state, only, env)
    try:
        mesh.wait_running(process)
        yield mesh
    finally:
        process.terminate()
        process.wait(STOP_PATIENCE_S)


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-2 * LOG_TAIL_LINES :])


def _main() -> None:
    parser = argparse.ArgumentParser(description="Run a mesh until SIGTERM; `mojomesh up` is the command for people.")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[])
    wanted = parser.parse_args()
    try:
        up(StateFolder.at(wanted.state), lambda part, phase: print(f"{part}: {phase}", flush=True), wanted.only)  # noqa: T201
    except LocalError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _main()
