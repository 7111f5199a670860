"""PostgreSQL: one engine a process, transactions that the handler opens, migrations as a step of their own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import orjson
from alembic import command, context
from alembic.config import Config
from asyncpg import InterfaceError, PostgresError
from sqlalchemy import Connection, event, make_url, text
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from mojomesh_chassis.errors import TransientError

APPLICATION_POOL = 10

_ONLY_READS = "25006"
# SQLSTATEs, by their beginnings, that say nothing about what was asked for: trying again later helps, perhaps after somebody acted.
_OUTAGES = {
    "08": "the connection was lost",
    _ONLY_READS: "this server only reads; it is a standby",
    "40": "another transaction was in the way",
    "53": "the server is out of resources",
    "55P03": "a lock was not to be had",
    "57": "the server is starting, stopping or was told to cancel",
    "58": "the server's system failed",
    "28": "the server refused the login; see MOJOMESH_POSTGRES",
    "3D000": "the database does not exist; see MOJOMESH_POSTGRES",
    "3F000": "the schema does not exist; run `mojomesh migrate`",
    "42P01": "a table does not exist; run `mojomesh migrate`",
    "42883": "a function does not exist; run `mojomesh migrate`",
    "42501": "the role lacks a privilege; run `mojomesh migrate` as the owner",
}


class Database:
    """One PostgreSQL database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A transaction: committed at the end, rolled back when the block raises.

        Raises:
            TransientError: The server does not answer, is not ready for us, or undid the transaction for the sake of another.
        """
        try:
            async with self._sessions() as session, session.begin():
                yield session
        except (DBAPIError, PostgresError, InterfaceError, PoolTimeout, OSError, TimeoutError) as error:
            if (reason := _not_the_statements_fault(error)) is None:
                raise
            if _sqlstate(error) == _ONLY_READS:
                await self.engine.dispose()  # after a failover every pooled connection may lead to the old primary
            raise TransientError(reason) from error

    async def ping(self) -> None:
        """Ask the server for nothing."""
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))


@asynccontextmanager
async def open_database(url: str, pool_size: int = APPLICATION_POOL) -> AsyncIterator[Database]:
    """Open the database at `postgresql://…`; its connections are checked before use and closed at the end."""
    engine = create_async_engine(
        _async_url(url),
        pool_size=pool_size,
        max_overflow=0,
        json_deserializer=orjson.loads,  # the standard one makes integers of large floats, which nobody can write as JSON again
    )
    event.listen(engine.sync_engine, "checkout", _require_open)
    try:
        yield Database(engine)
    finally:
        await engine.dispose()


def _require_open(connection: Any, *_: object) -> None:
    """Let the pool replace a connection that the server has closed. asyncpg knows; `pool_pre_ping` would ask, in three round trips."""
    if connection.driver_connection.is_closed():
        raise DisconnectionError


async def migrate(package: str, owner_url: str) -> None:
    """Bring the tables that `package` owns to its newest migration, as the owner of the database.

    The package's `migrations/` folder is Alembic's; its `env.py` calls `run_migrations` with the schema, which keeps its own version table.
    """
    folder = Path(str(import_module(package).__file__)).parent / "migrations"
    config = Config()
    config.set_main_option("script_location", str(folder))
    engine = create_async_engine(_async_url(owner_url))
    try:
        async with engine.connect() as connection:
            await connection.run_sync(_upgrade, config)
            await connection.commit()
    finally:
        await engine.dispose()


def _upgrade(connection: Connection, config: Config) -> None:
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def run_migrations(schema: str) -> None:
    """What a package's `migrations/env.py` does: run its revisions in one transaction, one migrator at a time."""
    connection: Connection = context.config.attributes["connection"]
    connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('mojomesh.migrate'))"))
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
    context.configure(connection=connection, version_table_schema=schema)
    with context.begin_transaction():
        context.run_migrations()


def _sqlstate(error: BaseException) -> str:
    return getattr(error.orig if isinstance(error, DBAPIError) else error, "sqlstate", None) or ""


def _not_the_statements_fault(error: Exception) -> str | None:
    """Why the server, not the statement, is to blame; None when it is the statement."""
    for beginning, reason in _OUTAGES.items():
        if _sqlstate(error).startswith(beginning):
            return f"PostgreSQL: {reason} ({error})"
    if isinstance(error, OSError | TimeoutError | PoolTimeout) or (isinstance(error, DBAPIError) and error.connection_invalidated):
        return f"PostgreSQL does not answer ({type(error).__name__}: {error})"
    return None


def _async_url(url: str) -> str:
    return make_url(url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
