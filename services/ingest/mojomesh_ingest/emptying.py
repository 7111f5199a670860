"""Putting what was written into the index of values, beside the writers (docs/decisions/0008-inserting-rows.md)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.health import Health
from mojomesh_chassis.telemetry import log
from mojomesh_store import rows
from mojomesh_store.shards import FeatureStore, Shard

EVERY_S = 2.0


@asynccontextmanager
async def emptying(feature_store: FeatureStore, health: Health) -> AsyncIterator[None]:
    """Empty the lists of pending entries of every shard all the time. Should a bug end it, the service is not ready any more."""
    async with health.beside("index", _keep_emptying(feature_store), "the emptying of pending entries"):
        yield


async def _keep_emptying(feature_store: FeatureStore) -> None:
    await asyncio.gather(*(_keep_emptying_of(shard) for shard in feature_store.shards))


async def _keep_emptying_of(shard: Shard) -> None:
    while True:
        try:
            async with shard.begin() as db:
                await rows.empty_pending_lists(db)
        except TransientError as error:
            log.warning("pending_entries_wait", shard=shard.number, reason=repr(error))
        await asyncio.sleep(EVERY_S)
