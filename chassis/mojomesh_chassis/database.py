"""PostgreSQL: one engine a process, transactions that the handler opens, migrations as a step of their own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path

from alembic import command, context
from alembic.config import Config
from sqlalchemy import Connection, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

APPLICATION_POOL = 10


class Database:
    """One PostgreSQL database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncSession]:
        """A transaction: committed at the end, rolled back when the block raises."""
        async with self._sessions() as session, session.begin():
            yield session

    async def ping(self) -> None:
        """Ask the server for nothing."""
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))


@asynccontextmanager
async def open_database(url: str, pool_size: int = APPLICATION_POOL) -> AsyncIterator[Database]:
    """Open the database at `postgresql://…`; its connections are checked before use and closed at the end."""
    engine = create_async_engine(_async_url(url), pool_pre_ping=True, pool_size=pool_size, max_overflow=0)
    try:
        yield Database(engine)
    finally:
        await engine.dispose()


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


def _async_url(url: str) -> str:
    return make_url(url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
