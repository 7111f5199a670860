"""The transactional outbox: an event is saved in the transaction that makes it true, and a relay sends it afterwards.

The columns are named as Debezium's outbox router expects them, so that change data capture can take the relay's place:
`aggregatetype` is the topic, `aggregateid` the key.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import orjson
from sqlalchemy import BigInteger, Column, DateTime, Identity, Index, MetaData, Table, Text, Uuid, delete, func, select, update
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.database import Database
from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_chassis.faults import fault
from mojomesh_chassis.health import Health
from mojomesh_chassis.publishing import Publisher, Record
from mojomesh_chassis.telemetry import log, trace_headers
from mojomesh_contracts.events import Event

POLL_S = 0.5  # the poll is the guarantee; `Relay.wake` only shortens the wait
BATCH = 500
KEPT_DAYS = 7  # how long a sent event stays to be looked at


def outbox_table(metadata: MetaData) -> Table:
    """The outbox of the service whose schema `metadata` names."""
    return Table(
        "outbox",
        metadata,
        Column("id", Uuid, primary_key=True, comment="event_id"),
        Column("aggregatetype", Text, nullable=False, comment="topic"),
        Column("aggregateid", Text, nullable=False, comment="key"),
        Column("type", Text, nullable=False, comment="name of the event's class"),
        Column("payload", JSONB, nullable=False),
        Column("headers", JSONB, nullable=False, comment="the trace that led to the event"),
        # Within a key this is the order of commits, as long as whoever saves events of one key takes turns (a row lock).
        Column("seq", BigInteger, Identity(), nullable=False),
        Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.clock_timestamp()),
        Column("sent_at", DateTime(timezone=True)),
        Index("outbox_unsent", "seq", postgresql_where="sent_at IS NULL"),
    )


def _own_id(event: Event) -> UUID:
    return event.event_id


async def save_events(db: AsyncSession, outbox: Table, events: Sequence[Event], id_of: Callable[[Event], UUID] = _own_id) -> None:
    """Save `events` to be sent once this transaction is committed; one that is there already (by `id_of`) is sent again.

    Raises:
        PermanentError: An event is larger than its topic allows. Found later, it would hold up all that come after it.
    """
    for event in events:
        payload = event.model_dump(mode="json")
        if (size := len(orjson.dumps(payload))) > event.topic.max_bytes:
            raise PermanentError(f"too large: {size} bytes, {event.topic.name} takes {event.topic.max_bytes}")
        row = insert(outbox).values(
            id=id_of(event),
            aggregatetype=event.topic.name,
            aggregateid=event.partition_key,
            type=type(event).__name__,
            payload=payload,
            headers=trace_headers(),
        )
        await db.execute(row.on_conflict_do_update(index_elements=["id"], set_={"sent_at": None}))


class Relay:
    """Sends what is in an outbox, in the order of saving, each event at least once.

    Replicas may all run one: an advisory lock held through each round lets one at a time send, since two would reorder a key.
    """

    def __init__(self, database: Database, outbox: Table, publisher: Publisher) -> None:
        self._database, self._outbox, self._publisher = database, outbox, publisher
        self._wake = asyncio.Event()
        self._stopping = False

    def wake(self) -> None:
        """Something was committed: do not wait for the next poll."""
        self._wake.set()

    async def stop(self) -> None:
        """Let the round that runs be the last."""
        self._stopping = True
        self.wake()

    async def run(self) -> None:
        """Send until stopped. While PostgreSQL or Kafka is away, events wait."""
        while not self._stopping:
            self._wake.clear()
            try:
                sent = await self.send_batch()
            except TransientError as error:
                log.warning("outbox_waits", outbox=str(self._outbox), reason=repr(error))
                sent = 0
            if sent < BATCH:
                await self._pause()

    async def send_batch(self) -> int:
        """Send the oldest unsent events; how many. None, when another relay is at it.

        Raises:
            TransientError: Kafka did not acknowledge all; they stay unsent.
        """
        table = self._outbox
        async with self._database.begin() as db:
            if not await self._take_turn(db):
                return 0
            columns = (table.c.id, table.c.aggregatetype, table.c.aggregateid, table.c.payload, table.c.headers)
            unsent = select(*columns).where(table.c.sent_at.is_(None)).order_by(table.c.seq).limit(BATCH)
            rows = (await db.execute(unsent.with_for_update(skip_locked=True))).all()
            if not rows:
                return 0
            await self._publisher.send(
                [
                    Record(topic, key.encode(), orjson.dumps(payload), [(name, text.encode()) for name, text in headers.items()])
                    for _, topic, key, payload, headers in rows
                ]
            )
            fault(f"{table.schema}.after_relay")
            sent = update(table).where(table.c.id.in_([row.id for row in rows]))
            await db.execute(sent.values(sent_at=func.clock_timestamp()))
            await self._forget(db)
        return len(rows)

    async def _take_turn(self, db: AsyncSession) -> bool:
        return bool(await db.scalar(select(func.pg_try_advisory_xact_lock(func.hashtext(str(self._outbox))))))

    async def _forget(self, db: AsyncSession) -> None:
        old = func.clock_timestamp() - func.make_interval(0, 0, 0, KEPT_DAYS)
        await db.execute(delete(self._outbox).where(self._outbox.c.sent_at < old))

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(POLL_S):
                await self._wake.wait()
        except TimeoutError:
            return


@asynccontextmanager
async def relaying(database: Database, outbox: Table, publisher: Publisher, health: Health) -> AsyncIterator[Relay]:
    """Run a relay beside the service. Should a bug end it, the service is not ready any more and says why."""
    relay = Relay(database, outbox, publisher)
    task = asyncio.create_task(relay.run())
    health.watch("outbox", task, "the outbox's relay")
    try:
        yield relay
    finally:
        await relay.stop()
        await task
