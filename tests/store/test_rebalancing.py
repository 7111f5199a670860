"""A shard is added while rows are written and read: none is lost, counted twice or out of reach, whenever it is interrupted."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from mojomesh_chassis.errors import PermanentError
from mojomesh_contracts.events import EventReceived
from mojomesh_store import rows
from mojomesh_store.errors import Moved, ShardAway, TooFewShards
from mojomesh_store.rebalancing import claim, rebalance
from mojomesh_store.shards import FeatureStore, Shard, ShardRouter, open_feature_store
from mojomesh_store.tables import FeatureRow
from tests.store.test_rows import make_event

ENTITIES = [f"entity-{n}" for n in range(60)]


@pytest.fixture
def databases(new_postgres: Callable[[], Any]) -> list[Any]:
    return [new_postgres() for _ in range(3)]


@pytest.fixture
async def owners(databases: list[Any]) -> AsyncIterator[FeatureStore]:
    """All three, of which entities are placed on two."""
    async with AsyncExitStack() as stack:
        urls = [database.owner_url for database in databases]
        await claim(await stack.enter_async_context(open_feature_store(urls[:2])))
        store = await stack.enter_async_context(open_feature_store(urls))
        await claim(store)
        yield store


@pytest.fixture
async def store(owners: FeatureStore, databases: list[Any]) -> AsyncIterator[FeatureStore]:
    """As services see them."""
    async with open_feature_store([database.url for database in databases]) as store:
        yield store


async def write(store: FeatureStore, *events: EventReceived) -> list[FeatureRow]:
    """As ingest does: who is told that entities moved, or have to wait, tries again."""
    stored = []
    for event in events:
        while True:
            n_placed, shard = store.n_placed, store.shard_of(event.entity_id)
            try:
                async with shard.begin() as db:
                    created_at = await store.begin_writing(db, shard, n_placed)
                    stored += (await rows.append_at(db, [event], created_at))[0]
                break
            except (Moved, ShardAway):
                await asyncio.sleep(0.01)
    return stored


async def read(store: FeatureStore, entity_id: str) -> list[FeatureRow]:
    """The rows of an entity, newest first, as features reads them."""
    while True:
        n_placed, shard = store.n_placed, store.shard_of(entity_id)
        try:
            async with shard.begin() as db:
                (found,) = await rows.newest_of_many(db, "flights", [entity_id], 1_000)
                await store.check_reading(db, shard, n_placed)
            return found
        except Moved:
            continue


async def n_rows(shard: Shard) -> int:
    async with shard.begin() as db:
        return int((await db.execute(text("SELECT count(*) FROM store.feature_rows"))).scalar_one())


async def test_a_shard_added_while_rows_are_written_has_its_share_and_every_read_finds_what_was_written(
    store: FeatureStore, owners: FeatureStore
) -> None:
    ledger = {entity_id: await write(store, *(make_event(entity_id) for _ in range(5))) for entity_id in ENTITIES}
    done = asyncio.Event()
    rounds = 0

    async def go_on_writing() -> None:
        nonlocal rounds
        while not done.is_set() or rounds < 3:
            rounds += 1
            for entity_id in ENTITIES:
                ledger[entity_id] += await write(store, make_event(entity_id))
                assert await read(store, entity_id) == ledger[entity_id][::-1]

    writing = asyncio.create_task(go_on_writing())
    rebalanced = await rebalance(owners)
    done.set()
    await writing

    assert rebalanced.added == [2]
    assert rebalanced.copied > 0
    assert store.n_placed == 3
    assert {store.shard_of(entity_id).number for entity_id in ENTITIES} == {0, 1, 2}
    for entity_id in ENTITIES:
        assert await read(store, entity_id) == ledger[entity_id][::-1]


REBALANCE = """
import asyncio, sys
from pathlib import Path
from mojomesh_chassis.faults import arm_faults
from mojomesh_store.rebalancing import rebalance
from mojomesh_store.shards import open_feature_store

async def run():
    async with open_feature_store(sys.argv[2:]) as store:
        await rebalance(store)

arm_faults(Path(sys.argv[1]))
asyncio.run(run())
"""


@pytest.mark.parametrize("point", ["store.after_copy", "store.after_fence", "store.before_open"])
async def test_a_rebalancing_that_was_killed_hides_nothing_and_is_finished_by_the_next(
    point: str, store: FeatureStore, owners: FeatureStore, databases: list[Any], tmp_path: Path
) -> None:
    ledger = {entity_id: await write(store, make_event(entity_id)) for entity_id in ENTITIES}
    (tmp_path / point).touch()
    arguments = ["-c", REBALANCE, str(tmp_path), *(database.owner_url for database in databases)]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments)
    assert await process.wait() == -signal.SIGKILL
    for entity_id in ENTITIES:
        assert await read(store, entity_id) == ledger[entity_id]

    rebalanced = await rebalance(owners)

    assert rebalanced.added == [2]
    for entity_id in ENTITIES:
        ledger[entity_id] += await write(store, make_event(entity_id))
        assert await read(store, entity_id) == ledger[entity_id][::-1]


async def test_what_moved_leaves_where_it_was_once_it_is_sealed(store: FeatureStore, owners: FeatureStore) -> None:
    ledger = {entity_id: await write(store, make_event(entity_id)) for entity_id in ENTITIES}
    first = await rebalance(owners)
    assert (first.cleaned, first.left) == (0, first.copied)
    for shard in owners.shards[:2]:
        async with shard.begin() as db:
            now = datetime.now(UTC)
            values = "'flights', NULL, :now, 'x', '{}', 1, 0, 1, :now, :now"
            columns = "feature_set, follows, created_until, path, columns, n_rows, n_tied, sum_of_seqs, first_event_time, last_event_time"
            await db.execute(text(f"INSERT INTO store.segments ({columns}) VALUES ({values})"), {"now": now})

    second = await rebalance(owners)

    assert (second.added, second.cleaned, second.left) == ([], first.copied, 0)
    assert sum([await n_rows(shard) for shard in owners.shards]) == len(ENTITIES)
    for entity_id in ENTITIES:
        assert await read(store, entity_id) == ledger[entity_id]


async def test_two_shards_added_before_anything_is_cleaned_hold_what_is_placed_there_and_no_more(
    store: FeatureStore, owners: FeatureStore
) -> None:
    for shard in owners.shards:
        async with shard.begin() as db:
            await db.execute(text("UPDATE store.shard SET n_shards = 1"))
    ledger = {entity_id: await write(store, make_event(entity_id)) for entity_id in ENTITIES}

    assert (await rebalance(owners)).added == [1, 2]

    async with owners.shards[2].begin() as db:
        last = set((await db.execute(text("SELECT entity_id FROM store.feature_rows"))).scalars())
    assert last == {entity_id for entity_id in ENTITIES if ShardRouter(3).place(entity_id) == 2}
    for entity_id in ENTITIES:
        assert await read(store, entity_id) == ledger[entity_id]


async def test_a_repeat_of_an_event_whose_row_moved_is_no_new_row(store: FeatureStore, owners: FeatureStore) -> None:
    events = [make_event(entity_id) for entity_id in ENTITIES]
    stored = await write(store, *events)
    await rebalance(owners)

    assert await write(store, *events) == stored


async def test_a_writer_that_places_as_before_is_refused_and_without_the_fence_its_row_is_out_of_reach(
    store: FeatureStore, owners: FeatureStore
) -> None:
    await write(store, *(make_event(entity_id) for entity_id in ENTITIES))
    before = {entity_id: store.shard_of(entity_id) for entity_id in ENTITIES}
    await rebalance(owners)
    moved = next(entity_id for entity_id in ENTITIES if ShardRouter(3).place(entity_id) == 2)

    for _ in range(2):  # whoever else placed as before is refused too, though the store has been told by then
        with pytest.raises(Moved):
            async with before[moved].begin() as db:
                await store.begin_writing(db, before[moved], 2)
        with pytest.raises(Moved):
            async with before[moved].begin() as db:
                await store.check_reading(db, before[moved], 2)

    async with before[moved].begin() as db:  # the control
        (lost,) = await rows.append(db, [make_event(moved)])
    assert lost not in await read(store, moved)


async def test_a_process_that_was_not_told_of_the_new_shard_says_so(owners: FeatureStore, databases: list[Any]) -> None:
    await rebalance(owners)
    async with open_feature_store([database.url for database in databases[:2]]) as old:
        with pytest.raises(TooFewShards, match="placed on 3 shards; MOJOMESH_POSTGRES names only 2"):
            await write(old, make_event())
        with pytest.raises(TooFewShards, match="placed on 3 shards"):
            await old.pass_snapshot()


async def test_a_shard_with_rows_of_its_own_is_not_added(owners: FeatureStore) -> None:
    async with owners.shards[2].begin() as db:
        await rows.append(db, [make_event()])

    with pytest.raises(PermanentError, match="has rows already"):
        await rebalance(owners)
