"""Where feature rows live: one PostgreSQL database, or several with the entities spread over them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from typing import Protocol, TypeVar

from prometheus_client import Gauge
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from uhashring import HashRing

from mojomesh_chassis.database import Database, open_database
from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_store import rows
from mojomesh_store.errors import Moved, ShardAway, TooFewShards

_UP = Gauge("mojomesh_shard_up", "1 if the shard answered the last look at the service's readiness, else 0", ["shard"])

PING_S = 1.0  # less than what a look at the readiness takes at most
_WRITING = text(
    f"SELECT {rows.CLOCK}, coalesce(next_n_shards, n_shards), counts_after = 'infinity' FROM store.snapshot_floor CROSS JOIN store.shard"
)


class OfEntity(Protocol):
    """What has a place among the shards."""

    @property
    def entity_id(self) -> str: ...


Answer = TypeVar("Answer")
AnyOfEntity = TypeVar("AnyOfEntity", bound=OfEntity)


class ShardRouter:
    """Places entities on shards by consistent hashing: with one more shard, only that shard's share of the entities moves."""

    def __init__(self, n_shards: int) -> None:
        self.n_shards = n_shards
        self._ring = HashRing(nodes=[str(index) for index in range(n_shards)]) if n_shards > 1 else None

    def place(self, entity_id: str) -> int:
        """Index of the shard that holds the rows of `entity_id`; it depends on the number of shards and on nothing else."""
        return 0 if self._ring is None else int(self._ring.get_node(entity_id))


class Shard(Database):
    """The database of a part of the entities."""

    def __init__(self, engine: AsyncEngine, number: int, of: int) -> None:
        super().__init__(engine)
        self.number = number
        self._alone = of == 1
        self._name = f"shard {number} of {of} ({engine.url.host}:{engine.url.port}/{engine.url.database})"

    @asynccontextmanager
    async def begin(self, patience_s: float | None = None) -> AsyncIterator[AsyncSession]:
        """A transaction, as of any database. It may take `patience_s` if there are other shards, which should not have to wait for this.

        Raises:
            ShardAway: One of several does not answer in time, is not ready for us, or undid the transaction for the sake of another.
            TransientError: The only one does not.
        """
        try:
            async with asyncio.timeout(None if self._alone else patience_s), super().begin() as db:
                yield db
        except (TransientError, TimeoutError) as error:
            if self._alone or isinstance(error, Moved | ShardAway | TooFewShards):
                raise
            raise ShardAway(
                f"{self._name} is away, and with it the entities it holds, but no others: {str(error) or 'it did not answer in time'}"
            ) from error

    async def answer(self) -> None:
        """Ask it for nothing.

        Raises:
            TransientError: It is away.
        """
        async with self.begin(PING_S) as db:
            await db.execute(text("SELECT 1"))

    async def is_up(self) -> bool:
        """Whether it answers; told as a metric too."""
        up = False
        with suppress(TransientError):
            await self.answer()
            up = True
        _UP.labels(self.number).set(up)
        return up


class FeatureStore:
    """The shards; an entity's rows are all on one."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._router = ShardRouter(len(self.shards))

    @property
    def n_placed(self) -> int:
        """On how many shards this process places entities: what a shard says of it counts more, see `check_reading`."""
        return self._router.n_shards

    async def check_reading(self, db: AsyncSession, shard: Shard, n_placed: int) -> None:
        """Called after reading and before the answer is believed.

        Args:
            n_placed: `self.n_placed` when the shard was chosen; meanwhile somebody else may have been told of another.

        Raises:
            Moved: The entities are placed otherwise by now; read again.
            TooFewShards: So that this process cannot reach some.
        """
        n_shards = (await db.execute(text("SELECT n_shards FROM store.shard"))).scalar_one()
        self._check(shard, n_shards, n_placed)

    async def begin_writing(self, db: AsyncSession, shard: Shard, n_placed: int) -> datetime:
        """The `rows.write_time` of a transaction in a shard which takes rows, and keeps taking them until the transaction ends.

        Args:
            n_placed: `self.n_placed` when the shard was chosen.

        Raises:
            Moved: The entities are placed otherwise by now; write again.
            TooFewShards: So that this process cannot reach some.
            ShardAway: The shard is being filled; its entities wait.
        """
        await rows.keep_snapshots_out(db)
        created_at: datetime
        created_at, n_shards, is_closed = (await db.execute(_WRITING)).one()
        self._check(shard, n_shards, n_placed)
        if is_closed:
            raise ShardAway(f"shard {shard.number} is being filled, and with it the entities that it will hold have to wait")
        return created_at

    def _check(self, shard: Shard, n_shards: int | None, n_placed: int) -> None:
        # A shard that knows of fewer than we did, but of itself, has not heard yet; the entities that we placed there were always there.
        if n_shards is None or shard.number < n_shards <= n_placed:
            return
        if n_shards > len(self.shards):
            raise TooFewShards(f"entities are placed on {n_shards} shards; MOJOMESH_POSTGRES names only {len(self.shards)} of them")
        self._router = ShardRouter(n_shards)
        raise Moved(f"entities are placed on {n_shards} shards now", retry_after_s=0.05)

    def shard_of(self, entity_id: str) -> Shard:
        return self.shards[self._router.place(entity_id)]

    def split(self, things: Iterable[AnyOfEntity]) -> list[tuple[Shard, list[AnyOfEntity]]]:
        """Things by the shard of their entity, each part in their order."""
        parts: dict[int, list[AnyOfEntity]] = {}
        for thing in things:
            parts.setdefault(self._router.place(thing.entity_id), []).append(thing)
        return [(self.shards[index], part) for index, part in parts.items()]

    async def each(self, do: Callable[[Shard], Awaitable[Answer]]) -> list[Answer]:
        """The answer of each shard, one after the other; one that is away does not keep the others from doing it.

        Raises:
            TransientError: Some were away.
        """
        answers = []
        away: TransientError | None = None
        for shard in self.shards:
            try:
                answers.append(await do(shard))
            except TransientError as error:
                away = error
        if away is not None:
            raise away
        return answers

    async def pass_snapshot(self, snapshot_time: datetime | None = None) -> datetime:
        """Fix what a snapshot sees, on every shard; the snapshot's time, by default the latest possible.

        From then on, reading `created_at <= snapshot_time` gives the same rows for ever.

        Raises:
            PermanentError: `snapshot_time` is later than now.
            TransientError: Some writer is slow; try again.
        """

        async def clock(shard: Shard) -> datetime:
            async with shard.begin() as db:
                with suppress(Moved):  # wherever they are, it sees them
                    await self.check_reading(db, shard, self.n_placed)
                return await rows.snapshot_clock(db)

        now = max([await clock(shard) for shard in self.shards])
        if snapshot_time is not None and snapshot_time > now:
            raise PermanentError(
                f"a snapshot of {snapshot_time.isoformat()} is not possible yet: the database's clock says {now.isoformat()}"
            )
        for shard in self.shards:
            await rows.pass_snapshot(shard, snapshot_time or now)
        return snapshot_time or now

    async def ping(self) -> None:
        """Ask the shards for nothing; one of several that does not answer concerns its own entities only.

        Raises:
            TransientError: None answers.
        """
        if not any(await asyncio.gather(*(shard.is_up() for shard in self.shards))):
            raise TransientError(f"none of {len(self.shards)} shards answers")


@asynccontextmanager
async def open_feature_store(urls: Sequence[str]) -> AsyncIterator[FeatureStore]:
    """Open the shards at `postgresql://…`, the same in every process and in the same order: the order places the entities."""
    async with AsyncExitStack() as stack:
        databases = [await stack.enter_async_context(open_database(url)) for url in urls]
        yield FeatureStore([Shard(database.engine, number, len(urls)) for number, database in enumerate(databases)])
