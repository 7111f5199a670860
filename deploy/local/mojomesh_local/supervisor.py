"""The process behind `mojomesh up`: it starts the parts in order, keeps them running, and stops them in order."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import psutil
from filelock import Timeout

from . import ports
from .errors import AlreadyRunning, LocalError, PortTaken, StartFailed
from .layout import ONLY_FOR, OWN_SERVER, Layout, layout_of
from .processes import Child, Command, kill_leftover, last_words, start
from .reachable import require_answers, without_password
from .state import SERVERS, SERVICES, PartStatus, Phase, StateFolder, Status

TICK_S = 0.1
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.2, 15.0
# A part that ran this long is not failing over and over: its next restart is quick again.
STEADY_S = 30.0
# A port may be held for a moment by what a killed `up` left, while Linux takes it down.
PORT_PATIENCE_S = 5.0

Tell = Callable[[str, str], None]


class Stopping(Exception):
    """Somebody asked this `up` to stop."""


def up(state: StateFolder, tell: Tell, only: Sequence[str] = ()) -> None:
    """Run the mesh in this process until SIGTERM or SIGINT; `tell(part, phase)` hears what happens.

    `only` names the parts to run; all by default.

    Raises:
        LocalError: It cannot run here; the message says why and what to do. Nothing is left running.
    """
    state.prepare()
    lock = state.lock
    try:
        lock.acquire()
    except Timeout:
        raise already_running(state) from None
    with lock:
        for name, pid, started in state.recorded_processes():
            if kill_leftover(pid, started):
                tell(name, "killed what an earlier `up` left")
        layout = layout_of(state, os.environ)
        for variable in ONLY_FOR:
            os.environ.pop(variable, None)
        _Supervisor(state, layout, tell, set(only) or {*SERVERS, *SERVICES}).run()


def already_running(state: StateFolder) -> AlreadyRunning:
    """What to tell a second `up`."""
    status = state.read_status()
    owner = f"process {status.pid}" if status else "another process"
    return AlreadyRunning(f"A mesh is already up in {state.path} ({owner}). See it with `mojomesh status`, end it with `mojomesh down`.")


class _Supervisor:
    def __init__(self, state: StateFolder, layout: Layout, tell: Tell, wanted: set[str]) -> None:
        self._state = state
        self._layout = layout
        self._tell = tell
        self._parts = {name: server for name, server in layout.parts.items() if name in wanted}
        self._own = {name for name in OWN_SERVER if name in wanted and name not in layout.parts}
        self._children: dict[str, Child] = {}
        self._failures: dict[str, int] = {}
        self._restart_at: dict[str, float] = {}
        self._stop_requested = False
        self._status = Status(os.getpid(), psutil.Process().create_time())
        for name in [*OWN_SERVER, *SERVICES]:
            if name in wanted:
                address = without_password(layout.addresses[name])
                log = None if name in self._own else str(state.log_of(name))
                self._status.parts[name] = PartStatus(address, "own" if name in self._own else "stopped", log=log)

    def run(self) -> None:
        with self._listening_to_signals():
            try:
                self._start_all()
                self._say("running")
                self._tell("mesh", "ready")
                while True:
                    self._pause()
                    self._tend()
            except Stopping:
                self._say("stopping")
            except LocalError as error:
                self._status.error = str(error)
                self._say("failed")
                raise
            finally:
                self._stop_all()
                if self._status.phase != "failed":
                    self._say("stopped")

    @contextmanager
    def _listening_to_signals(self) -> Iterator[None]:
        def request_stop(_signal: int, _frame: FrameType | None) -> None:
            self._stop_requested = True

        before = {number: signal.signal(number, request_stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_all(self) -> None:
        require_answers(self._own, self._layout.env)
        self._require_free_ports()
        self._state.write_env(self._layout.env)
        self._say("starting")
        servers = [name for name in SERVERS if name in self._parts]
        services = [name for name in SERVICES if name in self._parts]
        self._start(servers)
        if {"kafka", "postgres"} <= {*servers, *self._own}:
            self._wait([name for name in ("postgres", "kafka") if name in servers])
            self._migrate()
        self._wait([name for name in servers if name != "mage"])
        self._start(services)
        self._wait([*servers, *services])

    def _require_free_ports(self) -> None:
        give_up = time.monotonic() + PORT_PATIENCE_S
        for name, server in self._parts.items():
            for port in server.ports:
                while not ports.is_free(port):
                    if time.monotonic() > give_up:
                        raise PortTaken(
                            f"Port {port}, which this mesh keeps for {name}, is taken by {ports.holder(port)}. End that program, "
                            f"or delete {self._state.path / 'ports.json'} to have other ports chosen (the data stays)."
                        )
                    self._pause()

    def _start(self, names: Sequence[str]) -> None:
        for name in names:
            self._pause(0)
            self._parts[name].prepare()
            self._launch(name)

    def _launch(self, name: str) -> None:
        child = start(self._parts[name].command)
        self._children[name] = child
        part = self._status.parts[name]
        part.pid, part.started, part.phase = child.pid, child.started, "starting"
        self._write()
        self._tell(name, "starting")

    def _wait(self, names: Sequence[str]) -> None:
        """Return when all of them answer.

        Raises:
            StartFailed: One ended, or did not answer in time.
        """
        began = time.monotonic()
        while waiting := [name for name in names if self._status.parts[name].phase == "starting"]:
            for name in waiting:
                child, server = self._children[name], self._parts[name]
                if server.ready():
                    server.settle()
                    self._mark_ready(name)
                elif not child.running:
                    raise StartFailed(f"{name} ended with status {child.reap()} while starting.\n{last_words(child)}")
                elif time.monotonic() - began > server.within_s:
                    raise StartFailed(f"{name} did not answer within {server.within_s:.0f} s.\n{last_words(child)}")
            self._pause()

    def _mark_ready(self, name: str) -> None:
        self._status.parts[name].phase = "ready"
        self._write()
        self._tell(name, "ready")

    def _migrate(self) -> None:
        child = start(
            Command("migrate", [sys.executable, "-m", "mojomesh_local.migrating"], self._state.log_of("migrate"), self._layout.env)
        )
        try:
            while child.running:
                self._pause()
        finally:
            status = child.reap()
        if status:
            raise StartFailed(f"The topics and tables could not be brought up to date.\n{last_words(child)}")
        self._tell("topics and tables", "ready")

    def _tend(self) -> None:
        """Start again what ended, after a pause that grows while it keeps ending."""
        now = time.monotonic()
        for name, server in self._parts.items():
            part, child = self._status.parts[name], self._children.get(name)
            if child and not child.running:
                status = child.reap()
                del self._children[name]
                failures = 0 if time.time() - child.started > STEADY_S else self._failures.get(name, 0)
                self._restart_at[name] = now + min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**failures)
                self._failures[name] = failures + 1
                part.restarts += 1
                part.phase, part.pid, part.started = "restarting", None, None
                self._write()
                self._tell(name, f"ended with status {status}, starts again; its log: {part.log}")
            elif not child and now >= self._restart_at[name] and not self._state.holding(name).exists():
                self._launch(name)
            elif child and part.phase == "starting" and server.ready():
                self._mark_ready(name)

    def _stop_all(self) -> None:
        """Services first, all at once; then Mage and H2O, which use the others; the stores last."""
        for rank in (SERVICES, ("mage", "h2o"), ("kafka", "redis", "postgres")):
            children = {name: self._children.pop(name) for name in rank if name in self._children}
            for child in children.values():
                child.ask_to_stop()
            for name, child in children.items():
                child.stop()
                part = self._status.parts[name]
                part.phase, part.pid, part.started = "stopped", None, None
                self._write()
                self._tell(name, "stopped")

    def _pause(self, seconds: float = TICK_S) -> None:
        if self._stop_requested:
            raise Stopping
        time.sleep(seconds)

    def _say(self, phase: Phase) -> None:
        self._status.phase = phase
        self._write()

    def _write(self) -> None:
        self._state.write_status(self._status)
