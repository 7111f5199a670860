"""Child processes that never outlive the process that started them, not even one killed -9."""

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from . import guard
from .errors import StartFailed

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
LOG_TAIL_LINES = 15


@dataclass(frozen=True)
class Command:
    """What to run: one server or service. `stop_signal` asks it to end in good order."""

    name: str
    argv: list[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    stop_signal: signal.Signals = signal.SIGTERM


@dataclass(frozen=True)
class Server:
    """A server that can be started: `prepare` runs before it (each time), `settle` once it is ready."""

    command: Command
    ports: tuple[int, ...]
    ready: Callable[[], bool]
    prepare: Callable[[], None] = lambda: None
    settle: Callable[[], None] = lambda: None
    within_s: float = 180.0  # generous, since a machine may be busy: a process that ends is noticed at once

    def start(self) -> "Child":
        """Start it and return when it answers.

        Raises:
            StartFailed: It ended, or was not ready in time.
        """
        self.prepare()
        child = start(self.command)
        self.wait(child)
        return child

    def wait(self, child: "Child") -> None:
        """Return when the started server answers; it is stopped when it does not in time."""
        wait_until_ready(child, self.ready, self.within_s)
        self.settle()


@dataclass
class Child:
    """A started `Command`, leader of a process group of its own."""

    command: Command
    process: subprocess.Popen[bytes]
    started: float

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        # WNOWAIT: an ended child keeps its number until `reap`, so that the number of its group cannot become somebody else's.
        if self.process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def ask_to_stop(self) -> None:
        """Send it its stop signal and return at once."""
        if self.running:
            os.kill(self.pid, self.command.stop_signal)

    def stop(self, patience_s: float = 20.0) -> None:
        """End it and everything it started: asked first, killed after `patience_s`."""
        self.ask_to_stop()
        give_up = time.monotonic() + patience_s
        while self.running and time.monotonic() < give_up:
            time.sleep(0.02)
        self.reap()

    def reap(self) -> int:
        """Kill what is left of its process group, such as the workers of a killed supervisor; its exit status."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
            _guard.forget(self.pid)
        return self.process.returncode


def start(command: Command) -> Child:
    """Start a process that dies with this one; its output is appended to its log file.

    Call it from the main thread: the death signal follows the thread that forked.
    """
    command.log.parent.mkdir(parents=True, exist_ok=True)
    pipe, die_with_parent = _guard.pipe(), dying_with(os.getpid())

    def prepare() -> None:
        # The child tells the guard itself, before it becomes anything: this process may be killed as soon as it has forked.
        os.write(pipe, f"+{os.getpid()}\n".encode())
        die_with_parent()

    with command.log.open("ab") as log:
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **command.env},
            cwd=command.folder,
            start_new_session=True,
            preexec_fn=prepare,
        )
    _guard.remember(process.pid)
    return Child(command, process, started=psutil.Process(process.pid).create_time())


def run_to_end(argv: list[str], text: str = "", env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a helper to its end, `text` on its standard input; it dies with this process, but not of a Ctrl-C meant for it."""
    return subprocess.run(
        argv,
        input=text,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        preexec_fn=dying_with(os.getpid()),
    )


def wait_until_ready(child: Child, ready: Callable[[], bool], within_s: float) -> None:
    """Return once `ready()`.

    Raises:
        StartFailed: The process ended, or was not ready in time (it is stopped then).
    """
    name = child.command.name
    give_up = time.monotonic() + within_s
    while not ready():
        if not child.running:
            raise StartFailed(f"{name} ended with status {child.reap()} while starting.\n{last_words(child)}")
        if time.monotonic() > give_up:
            child.stop(patience_s=2)
            raise StartFailed(f"{name} was not ready after {within_s:.0f} s, so it was stopped.\n{last_words(child)}")
        time.sleep(0.05)


def kill_leftover(pid: int, started: float) -> bool:
    """Kill a child that an earlier parent recorded, and its children; False if that very process is gone.

    A pid alone proves nothing, since numbers are used again: the start time must be the recorded one.
    """
    try:
        process = psutil.Process(pid)
        if process.create_time() != started:
            return False
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=10)
    return True


def dying_with(parent: int) -> Callable[[], None]:
    """What a child of `parent` does between fork and exec, to have Linux kill it when the thread that started it ends."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(1)

    return prepare


def last_words(child: Child) -> str:
    """The end of its log, and where the rest is: for an error message."""
    lines = child.command.log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([*(f"  | {line}" for line in lines), f"Its whole log: {child.command.log}"])


class _Guard:
    """The end here of `guard.py`: the pipe through which it learns of process groups."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def pipe(self) -> int:
        """Where a new child writes down its group; the guard is started first, again if somebody killed it."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", guard.__file__], stdin=subprocess.PIPE, bufsize=0, start_new_session=True
            )
            atexit.register(self._process.communicate)
            for group in self._groups:
                _tell(self._process, f"+{group}")
        assert self._process.stdin is not None
        return self._process.stdin.fileno()

    def remember(self, group: int) -> None:
        self._groups.add(group)

    def forget(self, group: int) -> None:
        self._groups.discard(group)
        if self._process is not None:
            _tell(self._process, f"-{group}")


def _tell(process: "subprocess.Popen[bytes]", line: str) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # Somebody killed the guard: the next child starts another.
        process.stdin.write(f"{line}\n".encode())


_guard = _Guard()
