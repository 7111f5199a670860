"""What the online store promises of its values, on a real Redis."""

import hashlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import mojomesh_store.online as online_module
from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.redis import LineRedis, open_redis
from mojomesh_local import ports
from mojomesh_local.processes import Child
from mojomesh_local.redis import Redis as RedisServer
from mojomesh_store.online import EVER, GENERATION, ROWS_KEPT, Breaker, Entity, Lease, OnlineRow, OnlineStore, Window

FLIGHT = ("flights", "UA1545")
LUA = (Path(online_module.__file__).parent / "online.lua").read_text()


def make_row(event_us: int, created_us: int = 100, seq: int = 1, values: bytes = b'{"distance":1400}') -> OnlineRow:
    return OnlineRow(event_us, created_us, seq, created_us, values)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[LineRedis]:
    async with open_redis(redis_url, timeout_s=10) as client:  # nothing here depends on its patience
        yield client


@pytest.fixture
def online(redis: LineRedis) -> OnlineStore:
    return OnlineStore(redis, chance=lambda: 1.0)  # XFetch never draws an early turn


async def load(online: OnlineStore, entity: Entity, rows: list[OnlineRow], load_ms: float = 1.0) -> None:
    """What a reader does that finds `rows` in PostgreSQL."""
    lease = await online.lease([entity])
    newest = sorted(rows, reverse=True)[:ROWS_KEPT]
    await online.keep(lease, {entity: Window.of(newest, ROWS_KEPT)}, load_ms)


async def window_of(online: OnlineStore, entity: Entity = FLIGHT) -> Window | None:
    (window,) = await online.windows([entity])
    return window


async def test_what_was_loaded_is_read(online: OnlineStore) -> None:
    rows = [make_row(10), make_row(-20, values='{"name":"Zürich\\n\\t"}'.encode())]

    await load(online, FLIGHT, rows)

    window = await window_of(online)
    assert window == Window(tuple(rows), EVER)
    assert window.at(15) == rows[0]
    assert window.at(9) == rows[1]
    assert window.at(-21) is None
    assert window.covers(-21)


async def test_rows_that_nobody_loaded_answer_nothing(online: OnlineStore) -> None:
    """There may be newer rows that this Redis has never seen."""
    await online.merge([(FLIGHT, make_row(10))])

    assert await window_of(online) is None


async def test_a_row_written_after_the_load_is_read(online: OnlineStore) -> None:
    await load(online, FLIGHT, [make_row(10)])

    await online.merge([(FLIGHT, make_row(20))])

    window = await window_of(online)
    assert window is not None and window.at(25) == make_row(20)


async def test_a_row_written_during_the_load_is_read(online: OnlineStore) -> None:
    lease = await online.lease([FLIGHT])
    seen_by_the_load = Window.of([make_row(10)], ROWS_KEPT)

    await online.merge([(FLIGHT, make_row(20))])
    await online.keep(lease, {FLIGHT: seen_by_the_load}, load_ms=1)

    window = await window_of(online)
    assert window is not None and window.at(25) == make_row(20)


async def evicted_during_a_load(online: OnlineStore, redis: LineRedis) -> Window | None:
    lease = await online.lease([FLIGHT])
    seen_by_the_load = Window.of([make_row(10)], ROWS_KEPT)
    await online.merge([(FLIGHT, make_row(20))])
    await redis.delete("mojomesh:online:1:flights:UA1545")
    await online.merge([(FLIGHT, make_row(15))])
    await online.keep(lease, {FLIGHT: seen_by_the_load}, load_ms=1)
    return await window_of(online)


async def test_what_was_loaded_is_not_kept_if_a_row_written_meanwhile_was_evicted(online: OnlineStore, redis: LineRedis) -> None:
    assert await evicted_during_a_load(online, redis) is None


async def test_control_without_the_lease_a_row_written_meanwhile_is_hidden(online: OnlineStore, redis: LineRedis) -> None:
    unguarded = LUA.replace("not fresh and lease == lease_of(entry)", "true")
    assert unguarded != LUA
    online._merge = redis.register_script(unguarded)

    window = await evicted_during_a_load(online, redis)

    assert window is not None and window.at(25) != make_row(20)


async def late_writers(online: OnlineStore) -> Window | None:
    await load(online, FLIGHT, [make_row(20, created_us=200, seq=2)])
    await online.merge([(FLIGHT, make_row(20, created_us=200, seq=1, values=b'"same transaction, earlier"'))])
    await online.merge([(FLIGHT, make_row(20, created_us=150, seq=9, values=b'"earlier known"'))])
    await online.merge([(FLIGHT, make_row(10, created_us=300, seq=3, values=b'"earlier true"'))])
    return await window_of(online)


async def test_a_late_writer_does_not_displace_a_newer_row(online: OnlineStore) -> None:
    window = await late_writers(online)

    assert window is not None
    assert window.at(30) == make_row(20, created_us=200, seq=2)
    assert window.at(15) == make_row(10, created_us=300, seq=3, values=b'"earlier true"')


async def test_control_without_the_order_a_late_writer_displaces_a_newer_row(online: OnlineStore, redis: LineRedis) -> None:
    unguarded = LUA.replace("if not known or later(row, known) then", "if true then")
    assert unguarded != LUA
    online._merge = redis.register_script(unguarded)

    window = await late_writers(online)

    assert window is not None and window.at(30) != make_row(20, created_us=200, seq=2)


async def test_of_many_rows_the_newest_are_kept_and_the_window_says_how_far_back_it_is_whole(online: OnlineStore) -> None:
    await load(online, FLIGHT, [make_row(1)])

    await online.merge([(FLIGHT, make_row(event_us)) for event_us in range(2, 30)])

    window = await window_of(online)
    assert window is not None
    assert [row.event_us for row in window.rows] == list(range(29, 29 - ROWS_KEPT, -1))
    assert window.covers(30 - ROWS_KEPT)
    assert not window.covers(29 - ROWS_KEPT)


async def test_corrections_of_one_row_do_not_push_out_the_others(online: OnlineStore) -> None:
    await load(online, FLIGHT, [make_row(10), make_row(20)])

    await online.merge([(FLIGHT, make_row(20, created_us=created_us)) for created_us in range(200, 220)])

    window = await window_of(online)
    assert window is not None
    assert window.rows == (make_row(20, created_us=219), make_row(10))


Step = tuple[str, int]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes on a real server
)
@given(
    keys=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 2), st.integers(0, 2)), min_size=15, max_size=30, unique=True),
    steps=st.lists(
        st.tuples(st.sampled_from(["write", "write", "merge", "begin", "end", "evict", "generation"]), st.integers(0, 29)),
        min_size=20,
        max_size=80,
    ),
)
async def test_however_writes_and_loads_interleave_what_a_window_covers_is_right(
    online: OnlineStore, redis: LineRedis, keys: list[tuple[int, int, int]], steps: list[Step]
) -> None:
    await redis.delete("mojomesh:online:1:flights:UA1545")
    rows = [make_row(*key, values=b"%d" % n) for n, key in enumerate(keys)]
    stored: list[OnlineRow] = []  # as PostgreSQL would have it
    merged: set[OnlineRow] = set()
    loads: list[tuple[Lease, Window]] = []
    for step, n in steps:
        if step == "write" and len(stored) < len(rows):
            stored.append(rows[len(stored)])
        elif step == "merge" and stored:  # in any order, and again
            merged.add(stored[n % len(stored)])
            await online.merge([(FLIGHT, stored[n % len(stored)])])
        elif step == "begin":
            loads.append((await online.lease([FLIGHT]), Window.of(sorted(stored, reverse=True)[:ROWS_KEPT], ROWS_KEPT)))
        elif step == "end" and loads:
            lease, loaded = loads.pop(n % len(loads))
            await online.keep(lease, {FLIGHT: loaded}, load_ms=1)
        elif step == "evict":
            await redis.delete("mojomesh:online:1:flights:UA1545")
        elif step == "generation":  # some replica missed a write, and repeats it in the new generation
            await redis.set(GENERATION, str(uuid4()))
    await online.merge([(FLIGHT, row) for row in stored if row not in merged])

    window = await window_of(online)

    for at in range(-1, 22):
        known = [row for row in stored if row.event_us <= at]
        assert window is None or not window.covers(at) or window.at(at) == max(known, default=None)


def signed(body: bytes) -> bytes:
    return hashlib.sha1(body).hexdigest().encode() + b"\n" + body


POISONS = {
    "empty": b"",
    "text": b"nonsense",
    "bytes": b"\x00\xff",
    "signed nothing": signed(b""),
    "signed nonsense": signed(b"nonsense\n1\t2\n"),
    "signed rows of nonsense": signed(b'["flights","UA1545"]\tGENERATION\t0\t0\t0\nnonsense\n'),
}


@pytest.mark.parametrize("poison", [*POISONS, "damaged", "foreign", "hash"])
async def test_a_value_that_is_not_what_was_kept_is_a_miss_and_is_mended(online: OnlineStore, redis: LineRedis, poison: str) -> None:
    other = ("flights", "B6725")
    await load(online, FLIGHT, [make_row(10)])
    await load(online, other, [make_row(99)])
    key, other_key = ("mojomesh:online:1:flights:UA1545", "mojomesh:online:1:flights:B6725")
    kept = await redis.get(key)
    assert isinstance(kept, bytes)
    if poison == "hash":
        await redis.delete(key)
        await redis.hset(key, "field", "nonsense")
    else:
        generation = await redis.get(GENERATION)
        assert isinstance(generation, bytes)
        signed_nonsense = {
            name: signed(value[41:].replace(b"GENERATION", generation)) for name, value in POISONS.items() if name.startswith("signed")
        }
        wrong = POISONS | signed_nonsense | {"damaged": kept.replace(b"1400", b"1401"), "foreign": await redis.get(other_key)}
        await redis.set(key, wrong[poison] or b"")

    assert await window_of(online) is None
    await online.merge([(FLIGHT, make_row(5))])
    assert await window_of(online) is None
    await load(online, FLIGHT, [make_row(10), make_row(5)])
    window = await window_of(online)
    assert window is not None and window.rows == (make_row(10), make_row(5))


async def test_a_reply_that_belongs_to_another_command_is_a_miss(
    online: OnlineStore, redis: LineRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await load(online, FLIGHT, [make_row(10)])
    other = ("flights", "B6725")
    await load(online, other, [make_row(99)])
    reply_to_other = await redis.mget([GENERATION, "mojomesh:online:1:flights:B6725"])

    async def stale(_: object) -> object:
        return reply_to_other

    async def number(_: object) -> object:
        return 1

    for lie in (stale, number):
        monkeypatch.setattr(redis, "values", lie)
        assert await window_of(online) is None


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[tuple[str, Child]]:
    """A Redis of this test's own, to be frozen and killed."""
    server = RedisServer(tmp_path / "redis", ports.choose(), "own", tmp_path / "redis.log")
    child = server.server.start()
    try:
        yield server.url, child
    finally:
        os.kill(child.pid, signal.SIGCONT)
        child.stop()


async def test_a_write_that_redis_missed_is_never_hidden_by_what_it_kept(own_redis: tuple[str, Child]) -> None:
    """Writes go on while Redis is frozen; when it is back it holds whole entries that lack them."""
    url, child = own_redis
    async with open_redis(url) as redis, open_redis(url) as redis_of_another_replica:
        online, another = OnlineStore(redis), OnlineStore(redis_of_another_replica)
        await load(online, FLIGHT, [make_row(10)])
        assert await window_of(online) is not None
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(TransientError, match="reads go to PostgreSQL"):
            await online.merge([(FLIGHT, make_row(20))])
        os.kill(child.pid, signal.SIGCONT)

        assert await window_of(another) is not None  # control: what the frozen Redis kept would be believed
        assert await window_of(online) is None
        await online.merge([(("flights", "another"), make_row(20))])
        assert await window_of(online) is None
        assert await window_of(another) is None


async def test_a_write_that_a_full_redis_refused_is_hidden_from_nobody(own_redis: tuple[str, Child]) -> None:
    """It goes on answering, for as long as it stays full."""
    async with open_redis(own_redis[0]) as redis, open_redis(own_redis[0]) as redis_of_another_replica:
        online, another = OnlineStore(redis), OnlineStore(redis_of_another_replica)
        await load(online, FLIGHT, [make_row(10)])
        await redis.config_set("maxmemory-policy", "noeviction")
        await redis.config_set("maxmemory", 1)
        with pytest.raises(TransientError, match="reads go to PostgreSQL"):
            await online.merge([(FLIGHT, make_row(20))])

        assert await window_of(another) is not None  # control: what the full Redis kept would be believed
        with pytest.raises(TransientError, match="reads go to PostgreSQL"):  # the consumer tries again
            await online.merge([(FLIGHT, make_row(20))])
        assert await window_of(another) is None
        assert await window_of(online) is None


async def test_a_redis_that_does_not_answer_is_not_asked_again_and_again(own_redis: tuple[str, Child]) -> None:
    url, child = own_redis
    now = 0.0
    async with open_redis(url) as redis:
        online = OnlineStore(redis, Breaker(clock=lambda: now))
        await load(online, FLIGHT, [make_row(10)])
        os.kill(child.pid, signal.SIGSTOP)
        asked = [await _asks(online) for _ in range(10)]
        now = 60.0
        asked_later = [await _asks(online) for _ in range(3)]
        os.kill(child.pid, signal.SIGCONT)
        now = 120.0
        await window_of(online)

        assert asked == [True] * 3 + [False] * 7
        assert asked_later == [True, False, False]
        assert await window_of(online) == Window((make_row(10),), EVER)


async def _asks(online: OnlineStore) -> bool:
    """Whether a read waits for Redis at all."""
    failures_before = online.breaker._failures
    assert await window_of(online) is None
    return online.breaker._failures > failures_before


async def test_near_its_end_a_value_is_loaded_anew_by_some_readers(redis: LineRedis) -> None:
    """XFetch: the later and the slower the load, the more readers; long before the end none."""
    now, draw = 1_000_000.0, 0.5
    online = OnlineStore(redis, clock=lambda: now, chance=lambda: draw)
    await load(online, FLIGHT, [make_row(10)], load_ms=1000)

    async def refreshes() -> bool:
        return await window_of(online) is None

    assert not await refreshes()
    now += online_module.ENTRY_TTL_MS / 1000 - 0.5  # 0.5 s to go
    draw = 0.9  # -ln 0.9 x 1 s = 0.1 s early
    assert not await refreshes()
    draw = 0.5  # 0.69 s early
    assert await refreshes()
    now += 0.5
    draw = 1.0
    assert await refreshes()


async def test_without_redis_reading_and_keeping_go_on(redis: LineRedis) -> None:
    async with open_redis("redis://127.0.0.1:9/0") as nowhere:
        online = OnlineStore(nowhere)

        assert await online.windows([FLIGHT]) == [None]
        assert await online.lease([FLIGHT]) == {}
        await online.keep({FLIGHT: b"0 1"}, {FLIGHT: Window((), EVER)}, load_ms=1)
        with pytest.raises(TransientError):
            await online.merge([(FLIGHT, make_row(10))])
