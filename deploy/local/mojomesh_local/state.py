"""The state folder: everything that one mesh on one machine keeps, and how others find it while it runs."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import psutil
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from filelock import FileLock, Timeout

from . import ports
from .errors import DiskFull, NotRunning

SERVERS = ("postgres", "redis", "kafka", "h2o", "mage")
SERVICES = ("registry", "features", "ingest", "trainer", "scorer")
MIN_FREE_BYTES = 2 * 1024**3

# How many neighbouring ports each part takes, first its own: a controller's, a node's to itself, gRPC and administration.
_PORTS = dict.fromkeys((*SERVERS, *SERVICES), 1) | {"kafka": 2, "h2o": 2, "scorer": 3}

Phase = Literal["starting", "running", "stopping", "stopped", "failed"]
PartPhase = Literal["starting", "ready", "restarting", "stopped", "own"]


@dataclass
class PartStatus:
    """One server or service. `pid` and `started` name its process beyond doubt; `own` is one that somebody else runs."""

    address: str
    phase: PartPhase = "stopped"
    pid: int | None = None
    started: float | None = None
    restarts: int = 0
    log: str | None = None


@dataclass
class Status:
    """What `up` writes down whenever something changes."""

    pid: int
    started: float
    phase: Phase = "starting"
    error: str | None = None
    parts: dict[str, PartStatus] = field(default_factory=dict)


@dataclass(frozen=True)
class StateFolder:
    """`.mojomesh/`, or wherever `--state` says; `path` is absolute."""

    path: Path

    @classmethod
    def at(cls, path: Path) -> "StateFolder":
        return cls(path.absolute())

    @property
    def env_file(self) -> Path:
        return self.path / "env"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log_of(self, part: str) -> Path:
        return self.logs / f"{part}.log"

    def holding(self, part: str) -> Path:
        """While this file exists, `up` does not start the part again when it ends."""
        return self.path / "held" / part

    @property
    def lock(self) -> FileLock:
        """Held by the one `up` of this folder; Linux lets go of it when that process ends, however it ends."""
        return FileLock(self.path / "up.lock", timeout=0)

    @property
    def is_up(self) -> bool:
        """Whether an `up` owns this folder now."""
        if not self.path.is_dir():
            return False
        lock = self.lock
        try:
            with lock:
                return False
        except Timeout:
            return True

    def make(self) -> None:
        """Make the folder, where missing. Nobody but its user may look into it.

        Raises:
            DiskFull: A broker or a database could not be trusted to keep what it acknowledges.
        """
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(self.path).free
        if free < MIN_FREE_BYTES:
            raise DiskFull(
                f"Only {free / 1e9:.1f} GB are free at {self.path}, and a mesh needs {MIN_FREE_BYTES / 1e9:.0f} GB to be safe. "
                "Make room, or choose another folder with --state."
            )
        for folder in ("logs", "objects", "keys", "held"):
            (self.path / folder).mkdir(exist_ok=True)

    def prepare(self) -> None:
        """Make the folder and its keys, where missing; what `make` refuses, it refuses."""
        self.make()
        for held in (self.path / "held").iterdir():
            held.unlink()
        if not self.signing_key.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            _write_private(self.public_key, public.decode())
            _write_private(self.signing_key, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())

    @property
    def signing_key(self) -> Path:
        return self.path / "keys" / "signing.pem"

    @property
    def public_key(self) -> Path:
        return self.path / "keys" / "public.pem"

    def ports(self) -> dict[str, int]:
        """The first port of each part; chosen free the first time, and the same ever after."""
        file = self.path / "ports.json"
        if not file.exists():
            taken: dict[str, int] = {}
            for part, count in _PORTS.items():
                taken[part] = ports.choose(count, beside=[(taken[other], _PORTS[other]) for other in taken])
            _write_private(file, json.dumps(taken, indent=1))
        kept: dict[str, int] = json.loads(file.read_text())
        return kept

    def ports_of(self, part: str) -> list[int]:
        """All ports that a part takes."""
        first = self.ports()[part]
        return list(range(first, first + _PORTS[part]))

    def secrets(self) -> dict[str, str]:
        """Token and passwords; made the first time, and the same ever after."""
        file = self.path / "secrets.json"
        if not file.exists():
            names = ("token", "postgres", "redis", "mage")
            _write_private(file, json.dumps({name: secrets.token_urlsafe(24) for name in names}, indent=1))
        kept: dict[str, str] = json.loads(file.read_text())
        return kept

    def write_env(self, env: Mapping[str, str]) -> None:
        """Keep the variables for commands and for people: `set -a; . .mojomesh/env`."""
        _write_private(self.env_file, "".join(f"{name}={value}\n" for name, value in sorted(env.items())))

    def read_env(self) -> dict[str, str]:
        """The variables of the mesh that was last up here.

        Raises:
            NotRunning: None ever was.
        """
        if not self.env_file.exists():
            raise NotRunning(f"No mesh has been started in {self.path}. Start one with `mojomesh up`, or name another folder with --state.")
        return dict(line.split("=", 1) for line in self.env_file.read_text().splitlines())

    def write_status(self, status: Status) -> None:
        _write_private(self.status_file, json.dumps(asdict(status), indent=1))

    def read_status(self) -> Status | None:
        """What the last `up` wrote; it says `stopped` when that process was killed before it could."""
        if not self.status_file.exists():
            return None
        fields = json.loads(self.status_file.read_text())
        fields["parts"] = {name: PartStatus(**part) for name, part in fields["parts"].items()}
        status = Status(**fields)
        if status.phase in ("starting", "running", "stopping") and not _alive(status.pid, status.started):
            status.phase = "stopped"
            status.parts = {name: PartStatus(part.address, log=part.log) for name, part in status.parts.items()}
        return status

    def recorded_processes(self) -> list[tuple[str, int, float]]:
        """Name, pid and start time of what the last `up` ran, whether it still runs or not."""
        if not self.status_file.exists():
            return []
        parts = json.loads(self.status_file.read_text())["parts"]
        return [(name, part["pid"], part["started"]) for name, part in parts.items() if part["pid"]]


def _alive(pid: int, started: float) -> bool:
    try:
        return psutil.Process(pid).create_time() == started
    except psutil.NoSuchProcess:
        return False


def _write_private(file: Path, text: str) -> None:
    """Replace a file whole, readable by its user only: a reader or a crash never meets half of it."""
    unfinished = file.with_name(f"{file.name}.part")
    with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(text)
    unfinished.replace(file)
