"""Whether servers answer; asked of one's own before anything is started.

The clients are imported where they are used: every command imports this module, and most ask nothing.
"""

import asyncio
from collections.abc import Mapping
from urllib.parse import urlsplit

from .errors import ServerUnreachable
from .layout import OWN_SERVER
from .ports import says_ok


def require_answers(names: set[str], env: Mapping[str, str]) -> None:
    """Check each named server of one's own.

    Raises:
        ServerUnreachable: One does not answer, with its variable and what to do.
    """
    for name in sorted(names):
        variable, address = OWN_SERVER[name], env[OWN_SERVER[name]]
        if problem := problem_with(name, address):
            raise ServerUnreachable(
                f"{variable} names a server of your own, {without_password(address)}, which does not answer: {problem}. "
                "Start it, correct the variable, or unset it to have `mojomesh up` bring its own."
            )
    if "postgres" in names and "MOJOMESH_POSTGRES_OWNER" not in env:
        raise ServerUnreachable(
            "MOJOMESH_POSTGRES names a server of your own: set MOJOMESH_POSTGRES_OWNER, too, to the URL of the role that owns its database."
        )


def problem_with(name: str, address: str) -> str | None:
    """Why a server does not answer at its address (comma-separated for several); None when it does."""
    match name:
        case "postgres":
            return next((problem for url in address.split(",") if (problem := asyncio.run(_postgres(url)))), None)
        case "redis":
            return _redis(address)
        case "kafka":
            return asyncio.run(_kafka(address))
        case "h2o":
            return None if says_ok(f"{address}/3/Cloud?skip_ticks=true") else "no H2O there"
        case _:
            return None if says_ok(f"{address}/api/status") else "no Mage there"


def without_password(address: str) -> str:
    """An address fit to be shown."""
    return ",".join(url.replace(f":{password}@", ":…@") if (password := urlsplit(url).password) else url for url in address.split(","))


async def _postgres(url: str) -> str | None:
    import asyncpg

    try:
        connection = await asyncpg.connect(url, timeout=5)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        return str(error) or type(error).__name__
    await connection.close()
    return None


def _redis(url: str) -> str | None:
    from redis import Redis
    from redis.exceptions import RedisError

    try:
        with Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5) as client:
            client.ping()
    except (RedisError, ValueError) as error:  # ValueError: what was given is no URL of a Redis
        return str(error).rstrip(".")
    return None


async def _kafka(bootstrap: str) -> str | None:
    from aiokafka.admin import AIOKafkaAdminClient
    from aiokafka.errors import KafkaConnectionError, KafkaError

    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=5_000)
    try:
        await admin.start()
    except KafkaConnectionError:
        return "no Kafka there"
    except KafkaError as error:
        return str(error)
    finally:
        await admin.close()
    return None
