"""Where feature rows live: one PostgreSQL database, or several with the entities spread over them."""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Protocol, TypeVar

from uhashring import HashRing

from mojomesh_chassis.database import Database, open_database
from mojomesh_chassis.errors import PermanentError
from mojomesh_store import rows


class OfEntity(Protocol):
    """What has a place among the shards."""

    @property
    def entity_id(self) -> str: ...


AnyOfEntity = TypeVar("AnyOfEntity", bound=OfEntity)


class ShardRouter:
    """Places entities on shards by consistent hashing: with one more shard, only that shard's share of the entities moves."""

    def __init__(self, n_shards: int) -> None:
        self._ring = HashRing(nodes=[str(index) for index in range(n_shards)]) if n_shards > 1 else None

    def place(self, entity_id: str) -> int:
        """Index of the shard that holds the rows of `entity_id`; it depends on the number of shards and on nothing else."""
        return 0 if self._ring is None else int(self._ring.get_node(entity_id))


class FeatureStore:
    """The shards; an entity's rows are all on one."""

    def __init__(self, shards: Sequence[Database]) -> None:
        self.shards = tuple(shards)
        self._router = ShardRouter(len(self.shards))

    def shard_of(self, entity_id: str) -> Database:
        return self.shards[self._router.place(entity_id)]

    def split(self, things: Iterable[AnyOfEntity]) -> list[tuple[Database, list[AnyOfEntity]]]:
        """Things by the shard of their entity, each part in their order."""
        parts: dict[int, list[AnyOfEntity]] = {}
        for thing in things:
            parts.setdefault(self._router.place(thing.entity_id), []).append(thing)
        return [(self.shards[index], part) for index, part in parts.items()]

    async def pass_snapshot(self, snapshot_time: datetime | None = None) -> datetime:
        """Fix what a snapshot sees, on every shard; the snapshot's time, by default the latest possible.

        From then on, reading `created_at <= snapshot_time` gives the same rows for ever.

        Raises:
            PermanentError: `snapshot_time` is later than now.
            TransientError: Some writer is slow; try again.
        """
        async with self.shards[0].begin() as db:
            now = await rows.snapshot_clock(db)
        if snapshot_time is not None and snapshot_time > now:
            raise PermanentError(
                f"a snapshot of {snapshot_time.isoformat()} is not possible yet: the database's clock says {now.isoformat()}"
            )
        for shard in self.shards:
            await rows.pass_snapshot(shard, snapshot_time or now)
        return snapshot_time or now

    async def ping(self) -> None:
        """Ask every shard for nothing."""
        for shard in self.shards:
            await shard.ping()


@asynccontextmanager
async def open_feature_store(urls: Sequence[str]) -> AsyncIterator[FeatureStore]:
    """Open the shards at `postgresql://…`, the same in every process and in the same order: the order places the entities."""
    async with AsyncExitStack() as stack:
        yield FeatureStore([await stack.enter_async_context(open_database(url)) for url in urls])
