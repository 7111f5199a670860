"""The one step that changes what outlives the processes: topics and tables. Run by `mojomesh migrate`, never by a service."""

import asyncio
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from mojomesh_chassis.database import migrate
from mojomesh_chassis.topics import ensure_topics
from mojomesh_store.rebalancing import claim
from mojomesh_store.shards import open_feature_store

# The feature store's tables are on every shard; the services' own on the first.
SHARDED = "mojomesh_store"
SERVICES = ("mojomesh_ingest", "mojomesh_features", "mojomesh_trainer", "mojomesh_registry")


async def migrate_tables(owner_urls: Sequence[str]) -> None:
    """Bring the tables of all packages to their newest migration, as the owner of the database; first URL first."""
    homes = [(SHARDED, url) for url in owner_urls] + [(package, owner_urls[0]) for package in SERVICES]
    for package, url in homes:
        if _owns_tables(package):
            await migrate(package, url)
    async with open_feature_store(owner_urls) as store:
        await claim(store)


async def migrate_mesh(kafka: str, owner_urls: Sequence[str]) -> None:
    """Make missing topics and bring all tables up to date; safe to repeat, and while the mesh runs."""
    await ensure_topics(kafka)
    await migrate_tables(owner_urls)


def _owns_tables(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None and (Path(spec.origin).parent / "migrations" / "env.py").exists()


if __name__ == "__main__":
    asyncio.run(migrate_mesh(os.environ["MOJOMESH_KAFKA"], os.environ["MOJOMESH_POSTGRES_OWNER"].split(",")))
