"""What a mesh on one machine consists of: its environment, and the servers and services behind it."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from .h2o import H2O
from .kafka import Kafka
from .mage import Mage
from .ports import LOOPBACK, says_ok
from .postgres import OWNER, SERVICE, Cluster, Postgres
from .processes import Command, Server
from .redis import Redis
from .state import SERVICES, StateFolder

# The variable that puts a server of one's own in the place of ours.
OWN_SERVER = {
    "postgres": "MOJOMESH_POSTGRES",
    "redis": "MOJOMESH_REDIS",
    "kafka": "MOJOMESH_KAFKA",
    "h2o": "MOJOMESH_H2O",
    "mage": "MOJOMESH_MAGE",
}
# What else the caller of `up` may set; addresses and keys of the mesh are the state folder's alone.
_SETTABLE = (
    *OWN_SERVER.values(),
    *("MOJOMESH_POSTGRES_OWNER", "MOJOMESH_MAGE_EMAIL", "MOJOMESH_MAGE_PASSWORD", "MOJOMESH_OBJECTS", "MOJOMESH_ENVIRONMENT"),
    *("MOJOMESH_FAULT", "MOJOMESH_TRACES", "SCORER_WORKERS"),
)
# Who may sign, and who may change tables: nobody else is told, not even by what the caller of `up` has in its environment.
ONLY_FOR = {"MOJOMESH_SIGNING_KEY": "trainer", "MOJOMESH_POSTGRES_OWNER": "migrate"}


@dataclass(frozen=True)
class Layout:
    """The parts of a mesh, each with its address; a server of one's own has an address only."""

    env: dict[str, str]
    addresses: dict[str, str]
    parts: dict[str, Server]


def layout_of(state: StateFolder, caller: Mapping[str, str]) -> Layout:
    """The mesh of a prepared state folder, as the caller's environment changes it."""
    port, secret = state.ports(), state.secrets()
    cluster = Cluster(port["postgres"], secret["postgres"])
    redis = Redis(state.path / "redis", port["redis"], secret["redis"], state.log_of("redis"))
    kafka = Kafka(state.path / "kafka", port["kafka"], state.log_of("kafka"))
    h2o = H2O(state.path / "h2o", port["h2o"], state.log_of("h2o"))
    mage = Mage(state.path / "mage", port["mage"], secret["mage"], state.log_of("mage"))
    servers = {
        "postgres": Postgres(state.path / "postgres", cluster, state.log_of("postgres")).server,
        "redis": redis.server,
        "kafka": kafka.server,
        "h2o": h2o.server,
        "mage": mage.server,
    }
    ours = {
        "MOJOMESH_POSTGRES": cluster.url(SERVICE),
        "MOJOMESH_POSTGRES_OWNER": cluster.url(OWNER),
        "MOJOMESH_REDIS": redis.url,
        "MOJOMESH_KAFKA": kafka.bootstrap,
        "MOJOMESH_H2O": h2o.url,
        **mage.env,
        "MOJOMESH_OBJECTS": (state.path / "objects").as_uri(),
        "MOJOMESH_ENVIRONMENT": "development",
        "MOJOMESH_TOKEN": secret["token"],
        "MOJOMESH_SIGNING_KEY": str(state.signing_key),
        "MOJOMESH_PUBLIC_KEY": str(state.public_key),
        "SCORER_FOLDER": str(state.path / "scorer"),
        "SCORER_WORKERS": str(min(2, os.cpu_count() or 1)),
        **_addresses(port),
    }
    env = ours | {name: caller[name] for name in _SETTABLE if caller.get(name)}
    own = {name for name, variable in OWN_SERVER.items() if env[variable] != ours[variable]}
    if "postgres" in own and not caller.get("MOJOMESH_POSTGRES_OWNER"):
        del env["MOJOMESH_POSTGRES_OWNER"]
    services = {name: _service(name, state, env) for name in SERVICES}
    return Layout(
        env,
        {name: env[variable] for name, variable in OWN_SERVER.items()} | {name: env[f"MOJOMESH_{name.upper()}_URL"] for name in SERVICES},
        {name: server for name, server in servers.items() if name not in own} | services,
    )


def _addresses(port: Mapping[str, int]) -> dict[str, str]:
    """Where each service listens and is found; the scorer has two more doors."""
    found = {}
    for name in SERVICES:
        found[f"{name.upper()}_HOST"] = LOOPBACK
        found[f"{name.upper()}_PORT"] = str(port[name])
        found[f"MOJOMESH_{name.upper()}_URL"] = f"http://{LOOPBACK}:{port[name]}"
    grpc, admin = port["scorer"] + 1, port["scorer"] + 2
    return found | {
        "SCORER_GRPC_PORT": str(grpc),
        "SCORER_ADMIN_PORT": str(admin),
        "MOJOMESH_SCORER_GRPC": f"{LOOPBACK}:{grpc}",
        "MOJOMESH_SCORER_ADMIN_URL": f"http://{LOOPBACK}:{admin}",
    }


def _service(name: str, state: StateFolder, env: Mapping[str, str]) -> Server:
    # The scorer's data door speaks for one worker, its admin door for all of them.
    door = env["MOJOMESH_SCORER_ADMIN_URL" if name == "scorer" else f"MOJOMESH_{name.upper()}_URL"]
    told = {variable: value for variable, value in env.items() if ONLY_FOR.get(variable, name) == name} | {"PYTHONUNBUFFERED": "1"}
    command = Command(name, [sys.executable, "-m", f"mojomesh_{name}"], state.log_of(name), told, state.path)
    return Server(command, ports=tuple(state.ports_of(name)), ready=lambda: says_ok(f"{door}/health/ready"))
