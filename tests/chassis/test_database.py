"""Whose fault a database error is: an outage makes events wait, a wrong statement is a bug."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import pytest
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError

from mojomesh_chassis.database import Database, _require_open, migrate, open_database
from mojomesh_chassis.errors import TransientError


@pytest.fixture
async def database(postgres: Any) -> AsyncIterator[Database]:
    async with open_database(postgres.url) as database:
        yield database


async def test_a_transaction_is_committed_or_undone_as_a_whole(postgres: Any) -> None:
    async with open_database(postgres.owner_url) as database:
        async with database.begin() as db:
            await db.execute(text("CREATE TABLE kept (n int)"))
        with pytest.raises(ZeroDivisionError):
            async with database.begin() as db:
                await db.execute(text("INSERT INTO kept VALUES (1)"))
                raise ZeroDivisionError
        async with database.begin() as db:
            assert (await db.execute(text("SELECT count(*) FROM kept"))).scalar_one() == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"port": 9}, "does not answer"),
        ({"password": "wrong"}, "refused the login; see MOJOMESH_POSTGRES"),
        ({"database": "nothing"}, "does not exist; see MOJOMESH_POSTGRES"),
    ],
)
async def test_a_server_that_cannot_be_used_is_an_outage(postgres: Any, change: dict[str, Any], reason: str) -> None:
    url = make_url(postgres.url).set(**change).render_as_string(hide_password=False)
    async with open_database(url) as database:
        with pytest.raises(TransientError, match=reason):
            async with database.begin() as db:
                await db.execute(text("SELECT 1"))


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("SELECT pg_terminate_backend(pg_backend_pid())", "PostgreSQL"),
        ("SELECT * FROM store.nothing", "a table does not exist; run `mojomesh migrate`"),
        ("DELETE FROM store.feature_rows", "lacks a privilege"),
        ("SET LOCAL statement_timeout = 10; SELECT pg_sleep(1)", "told to cancel"),
        ("SET LOCAL transaction_read_only = on; CREATE TABLE t (n int)", "only reads"),
    ],
)
async def test_what_somebody_has_to_mend_is_an_outage(database: Database, statement: str, reason: str) -> None:
    with pytest.raises(TransientError, match=reason):
        async with database.begin() as db:
            for part in statement.split(";"):
                await db.execute(text(part))

    async with database.begin() as db:
        assert (await db.execute(text("SELECT 1"))).scalar_one() == 1


@pytest.mark.parametrize("control", [False, True], ids=["", "control"])
async def test_nobody_notices_that_the_server_closed_idle_connections(postgres: Any, database: Database, control: bool) -> None:
    async with database.begin() as db:
        pid = (await db.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    if control:
        event.remove(database.engine.sync_engine, "checkout", _require_open)
    async with open_database(postgres.url) as other, other.begin() as db:
        await db.execute(text(f"SELECT pg_terminate_backend({pid}, 10000)"))
    await asyncio.sleep(0.1)  # the closing is heard of

    with pytest.raises(TransientError) if control else nullcontext():
        async with database.begin() as db:
            assert (await db.execute(text("SELECT pg_backend_pid()"))).scalar_one() != pid


@pytest.mark.parametrize("statement", ["SELECT 1/0", "SELEKT 1", "SELECT 'x'::int"])
async def test_a_wrong_statement_is_a_bug(database: Database, statement: str) -> None:
    with pytest.raises(DBAPIError):
        async with database.begin() as db:
            await db.execute(text(statement))


async def test_migrating_twice_changes_nothing(postgres: Any) -> None:
    async def version() -> str:
        async with open_database(postgres.owner_url) as database, database.begin() as db:
            return str((await db.execute(text("SELECT version_num FROM store.alembic_version"))).scalar_one())

    before = await version()
    await migrate("mojomesh_store", postgres.owner_url)

    assert await version() == before
