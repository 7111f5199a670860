"""Three PostgreSQL servers hold the entities. One that is killed or frozen holds up only its own, and in the end nothing is lost."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
from sqlalchemy import text

from mojomesh_chassis.consuming import MeshRouter, consuming
from mojomesh_chassis.database import open_database
from mojomesh_chassis.definitions import Definitions, subscribe_definitions
from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.health import Health
from mojomesh_chassis.publishing import open_publisher
from mojomesh_contracts.events import Arrival, Event, EventParked, EventReceived
from mojomesh_ingest import handlers
from mojomesh_ingest.parking import Parking
from mojomesh_local import ports
from mojomesh_local.migrating import migrate_tables
from mojomesh_local.postgres import OWNER, SERVICE, Cluster, Postgres
from mojomesh_local.processes import Child
from mojomesh_store import rows
from mojomesh_store.rebalancing import rebalance
from mojomesh_store.shards import Shard, ShardRouter, open_feature_store

PARKED = EventParked.topic.name
SOME, MANY = 6_000, 1_000_000


@dataclass
class Shards:
    """Three servers of their own."""

    servers: list[Postgres]
    children: list[Child] = field(default_factory=list)

    @property
    def urls(self) -> list[str]:
        return [server.cluster.url(SERVICE) for server in self.servers]

    @property
    def owner_urls(self) -> list[str]:
        return [server.cluster.url(OWNER) for server in self.servers]

    def kill(self, number: int) -> None:
        """Kill -9 the server and all it started."""
        os.killpg(self.children[number].pid, signal.SIGKILL)
        self.children[number].reap()

    def restart(self, number: int) -> None:
        self.children[number] = self.servers[number].server.start()

    def freeze(self, number: int, freeze: bool = True) -> None:
        leader = psutil.Process(self.children[number].pid)
        for process in [leader, *leader.children(recursive=True)]:
            (process.suspend if freeze else process.resume)()

    async def execute(self, statement: str) -> None:
        for url in self.owner_urls:
            async with open_database(url) as database, database.begin() as db:
                await db.execute(text(statement))

    async def ids(self, number: int) -> list[UUID]:
        """event_id of every row of a shard, as the server tells whoever asks."""
        async with open_database(self.owner_urls[number]) as database, database.begin() as db:
            return list((await db.execute(text("SELECT event_id FROM store.feature_rows"))).scalars())

    async def all_ids(self) -> list[UUID]:
        return [event_id for number in range(3) for event_id in await self.ids(number)]


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shards]:
    folder = tmp_path_factory.mktemp("shards")
    shards = Shards([Postgres(folder / f"{n}", Cluster(ports.choose(), "of-a-shard"), folder / f"{n}.log") for n in range(3)])
    try:
        for server in shards.servers:
            shards.children.append(server.server.start())
        asyncio.run(migrate_tables(shards.owner_urls))
        yield shards
    finally:
        for child in shards.children:
            child.stop()


@pytest.fixture
async def shards(started: Shards) -> Shards:
    await started.execute("TRUNCATE store.feature_rows, store.moved")
    await started.execute("UPDATE store.shard SET n_shards = 3, counts_after = '-infinity'")
    return started


@pytest.fixture
async def ingest(world: Any, shards: Shards) -> AsyncIterator[httpx.AsyncClient]:
    async with world.serving(",".join(shards.urls)) as client:
        yield client


async def until_stored(world: Any) -> None:
    await world.until_handled()
    await world.records.until_handled(f"ingest.{PARKED}", PARKED)


def of_shard(events: list[EventReceived], number: int) -> set[UUID]:
    router = ShardRouter(3)
    return {event.event_id for event in events if router.place(event.entity_id) == number}


async def lose_a_shard(world: Any, shards: Shards, n: int) -> Counter[UUID]:
    """Send n events, kill a shard when it has some of them and start it again when most are sent; the ledger of what was sent."""
    ledger: Counter[UUID] = Counter()
    for tenth in range(10):
        events = [event for _ in range(max(1, n // 50_000)) for event in world.make_events(min(n // 10, 5_000))]  # within their range
        ledger.update(event.event_id for event in events)
        await world.records.publish(*events)
        if tenth == 2:
            await world.until_handled()
            shards.kill(1)
        if tenth == 7:
            await world.until_handled()
            await asyncio.to_thread(shards.restart, 1)
    await until_stored(world)
    return ledger


@pytest.mark.parametrize("n", [SOME, pytest.param(MANY, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
async def test_a_shard_killed_while_events_are_stored_and_brought_back_keeps_the_ledger(
    n: int, world: Any, shards: Shards, ingest: httpx.AsyncClient
) -> None:
    ledger = await lose_a_shard(world, shards, n)

    stored = Counter(await shards.all_ids())
    print(f"{ledger.total()} sent, {(ledger - stored).total()} lost, {(stored - ledger).total()} doubled")  # noqa: T201 part of the claim
    assert stored == ledger
    assert await world.records.read(PARKED)
    assert len({written.event_id for written in await world.announced()}) == n
    assert await world.buried() == []


def kill(shards: Shards) -> None:
    shards.kill(1)


def freeze(shards: Shards) -> None:
    shards.freeze(1)


@pytest.mark.parametrize("harm", [kill, freeze])
async def test_a_shard_that_is_away_holds_up_only_its_own_entities(
    harm: Callable[[Shards], None], world: Any, shards: Shards, ingest: httpx.AsyncClient
) -> None:
    before, meanwhile = world.make_events(300), world.make_events(300)
    await world.records.publish(*before)
    await world.until_handled()
    harm(shards)
    try:
        await world.records.publish(*meanwhile)
        await world.until_handled()

        for number in (0, 2):
            assert set(await shards.ids(number)) == of_shard(before, number) | of_shard(meanwhile, number)
        assert (await ingest.get("/health/ready")).status_code == 200
    finally:
        if harm is freeze:
            shards.freeze(1, False)
        else:
            await asyncio.to_thread(shards.restart, 1)
    await until_stored(world)

    assert Counter(await shards.all_ids()) == Counter(event.event_id for event in before + meanwhile)


class LosesWhatIsParked(Parking):
    def park(self, shard: Shard, events: Sequence[Arrival], error: BaseException | None) -> list[EventParked]:
        return []


class LetsOthersOvertake(Parking):
    async def queues(self, n_placed: int) -> set[int]:
        return set()


@asynccontextmanager
async def ingesting(world: Any, shards: Shards, parking: Parking, router: MeshRouter = handlers.router) -> AsyncIterator[None]:
    """Ingest without its doors, with a guard or with a worse one."""
    definitions = Definitions()
    async with open_publisher(world.settings) as publisher, open_feature_store(shards.urls) as store:
        resources: dict[str, Any] = {"feature_store": store, "definitions": definitions, "parking": parking}
        async with consuming(router, world.settings, publisher, Health(), **resources):
            yield


async def test_without_its_queue_the_events_of_a_killed_shard_are_lost(world: Any, shards: Shards) -> None:
    async with ingesting(world, shards, LosesWhatIsParked()):
        ledger = await lose_a_shard(world, shards, 1_000)

    assert (ledger - Counter(await shards.all_ids())).total() > 0


async def wait_on(events: list[EventParked]) -> list[Event]:
    raise TransientError("the shard is away", retry_after_s=0.1)


def that_empties_no_queue() -> MeshRouter:
    router = MeshRouter("ingest")
    subscribe_definitions(router)
    router.work(EventReceived, batch=5_000)(handlers.on_events_received)
    router.work(EventParked, batch=5_000, apart=True)(wait_on)
    return router


@pytest.mark.parametrize(("parking", "last"), [(Parking, 2), (LetsOthersOvertake, 1)])
async def test_a_correction_stays_one_when_what_it_corrects_waits_for_its_shard(
    parking: type[Parking], last: int, world: Any, shards: Shards
) -> None:
    """The control: where events overtake those that wait, the corrected value comes last."""
    place = ShardRouter(3).place("UA1545")
    async with ingesting(world, shards, parking(), that_empties_no_queue()):
        async with open_database(shards.owner_urls[place]) as owner:
            async with owner.begin() as db:
                await db.execute(text("ALTER TABLE store.feature_rows RENAME TO away"))
            await world.records.publish(world.make_event(distance=1))
            await world.until_handled()
            async with owner.begin() as db:
                await db.execute(text("ALTER TABLE store.away RENAME TO feature_rows"))
        await world.records.publish(world.make_event(distance=2))
        await world.until_handled()
    async with ingesting(world, shards, parking()):
        await until_stored(world)

    async with open_feature_store(shards.urls) as store, store.shards[place].begin() as db:
        ((newest, _),) = await rows.newest_of_many(db, "flights", ["UA1545"], 2)
    assert newest.values == {"distance": last}


async def test_a_shard_added_while_events_come_in_keeps_the_ledger(world: Any, shards: Shards, ingest: httpx.AsyncClient) -> None:
    await shards.execute("UPDATE store.shard SET n_shards = 2")
    ledger: list[EventReceived] = []
    done = asyncio.Event()

    async def go_on_sending() -> None:
        while not done.is_set() or len(ledger) < 3_000:
            events = world.make_events(300)
            ledger.extend(events)
            await world.records.publish(*events)

    sending = asyncio.create_task(go_on_sending())
    await asyncio.sleep(0.5)
    async with open_feature_store(shards.owner_urls) as owners:
        rebalanced = await rebalance(owners)
    done.set()
    await sending
    await until_stored(world)

    assert rebalanced.added == [2]
    for number in range(3):
        async with open_database(shards.owner_urls[number]) as database, database.begin() as db:
            found = (await db.execute(text("SELECT entity_id, event_id FROM store.feature_rows"))).all()
        placed = Counter(event_id for entity_id, event_id in found if ShardRouter(3).place(entity_id) == number)
        assert placed == Counter(of_shard(ledger, number))
    assert await world.buried() == []
