"""The line to Redis: who asks on one connection hears what is meant for them, or that there is no answer."""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from redis import Redis as RedisClient
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from mojomesh_chassis.redis import LineRedis, open_redis
from mojomesh_local import ports
from mojomesh_local.processes import Child
from mojomesh_local.redis import Redis as RedisServer

KEYS = [f"key-{n}" for n in range(200)]


@pytest.fixture
def server(tmp_path: Path) -> RedisServer:
    return RedisServer(tmp_path / "redis", ports.choose(), "secret", tmp_path / "redis.log")


@pytest.fixture
def child(server: RedisServer) -> Iterator[Child]:
    """A Redis of the test's own, to be frozen and killed, that knows each key's name."""
    child = server.server.start()
    try:
        with RedisClient.from_url(server.url) as client:
            client.mset({key: key for key in KEYS})
        yield child
    finally:
        child.reap()


@pytest.fixture
async def redis(server: RedisServer, child: Child) -> AsyncIterator[LineRedis]:
    async with open_redis(server.url, timeout_s=2) as client:
        yield client


async def hears_its_own(redis: LineRedis, key: str) -> bool:
    return await redis.values([key, "nothing"]) == [key.encode(), None]


async def test_many_ask_on_one_connection_and_each_hears_its_own(redis: LineRedis) -> None:
    assert all(await asyncio.gather(*(hears_its_own(redis, key) for key in KEYS)))
    info = await redis.info("clients")
    assert info["connected_clients"] == 2  # the line, and the one that `info` went over


async def test_one_who_waits_no_more_leaves_the_others_their_answers(redis: LineRedis, child: Child) -> None:
    assert await hears_its_own(redis, KEYS[0])
    os.kill(child.pid, signal.SIGSTOP)
    waiting = [asyncio.create_task(hears_its_own(redis, key)) for key in KEYS]
    await asyncio.sleep(0)
    for task in waiting[::3]:
        task.cancel()
    os.kill(child.pid, signal.SIGCONT)
    heard = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in heard[::3]] == [True] * len(waiting[::3])
    assert [each for n, each in enumerate(heard) if n % 3] == [True] * (len(KEYS) - len(waiting[::3]))


async def test_one_who_goes_while_the_connection_is_opened_leaves_it_to_the_others(redis: LineRedis, child: Child) -> None:
    os.kill(child.pid, signal.SIGSTOP)
    waiting = [asyncio.create_task(hears_its_own(redis, key)) for key in KEYS]
    await asyncio.sleep(0.1)  # it is accepted, and introduces itself
    waiting[0].cancel()
    await asyncio.sleep(0)
    os.kill(child.pid, signal.SIGCONT)
    assert await asyncio.gather(*waiting[1:]) == [True] * (len(KEYS) - 1)


async def test_a_redis_that_is_late_is_given_up_and_asked_anew(server: RedisServer, child: Child) -> None:
    async with open_redis(server.url, timeout_s=0.2) as redis, asyncio.timeout(20):
        assert await hears_its_own(redis, KEYS[0])
        os.kill(child.pid, signal.SIGSTOP)
        asked = await asyncio.gather(*(redis.values([key]) for key in KEYS), return_exceptions=True)
        asked_anew = await asyncio.gather(*(redis.values([key]) for key in KEYS), return_exceptions=True)  # nobody introduces himself
        os.kill(child.pid, signal.SIGCONT)

        assert [type(each) for each in asked + asked_anew] == [RedisTimeoutError] * 2 * len(KEYS)
        assert all(await asyncio.gather(*(hears_its_own(redis, key) for key in KEYS)))  # and no late answer among them


async def test_who_waits_hears_at_once_that_redis_died_and_the_next_asks_its_successor(
    redis: LineRedis, server: RedisServer, child: Child
) -> None:
    assert await hears_its_own(redis, KEYS[0])
    os.kill(child.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(redis.values([KEYS[0]]))
    await asyncio.sleep(0)
    child.reap()
    with pytest.raises(RedisConnectionError):  # and not that it was late
        await waiting
    with pytest.raises(RedisConnectionError):
        await redis.values([KEYS[0]])
    successor = server.server.start()
    try:
        assert await redis.values(["nothing"]) == [None]
    finally:
        successor.stop()


async def test_the_line_is_to_the_database_and_by_the_password_of_the_address(server: RedisServer, child: Child) -> None:
    address, _, _ = server.url.rpartition("/")
    async with open_redis(f"{address}/3") as redis:
        await redis.set("only", "here")
        assert await redis.values(["only", KEYS[0]]) == [b"here", None]
    async with open_redis(server.url.replace("secret", "guessed")) as redis:
        with pytest.raises(AuthenticationError):
            await redis.values([KEYS[0]])


async def test_what_redis_refuses_is_an_error_of_the_one_who_asked(redis: LineRedis) -> None:
    refused, answered = await asyncio.gather(redis.values([]), redis.values([KEYS[0]]), return_exceptions=True)
    assert isinstance(refused, ResponseError) and "wrong number of arguments" in str(refused)
    assert answered == [KEYS[0].encode()]


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"*1\r\n$900\r\n"])
async def test_somebody_else_at_the_address_is_no_answer(said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with speaking(lambda _: said) as url, open_redis(url) as redis:
        with pytest.raises(RedisError):
            await redis.values(["anything"])
    assert not caplog.records  # of asyncio, that something was raised where nobody hears it


async def test_what_nobody_asked_for_is_not_the_answer_of_the_next(caplog: pytest.LogCaptureFixture) -> None:
    async with speaking(lambda n: b"$1\r\n%d\r\n" % n * 2) as url, open_redis(url) as redis:
        assert [await redis.values(["anything"]) for _ in range(3)] == [b"1", b"2", b"3"]
    assert not caplog.records


async def test_a_connection_that_fell_silent_is_given_up() -> None:
    async with speaking(lambda n: b"$1\r\n%d\r\n" % n if n > 1 else b"") as url, open_redis(url) as redis:
        with pytest.raises(RedisTimeoutError):
            await redis.values(["anything"])
        assert await redis.values(["anything"]) == b"2"


async def test_a_later_question_is_watched_as_the_first_was() -> None:
    async with speaking(lambda n: b"$1\r\n1\r\n" if n == 1 else b"") as url, open_redis(url) as redis, asyncio.timeout(20):
        assert await redis.values(["anything"]) == b"1"
        await asyncio.sleep(0.1)  # the clock that looks after the first is still running
        with pytest.raises(RedisTimeoutError):
            await redis.values(["anything"])


@asynccontextmanager
async def speaking(says: Callable[[int], bytes]) -> AsyncIterator[str]:
    """A server that says it is well to all that redis-py introduces itself with, and to the n-th question what it is told to."""
    asked = itertools.count(1)
    visits: list[asyncio.Task[None] | None] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.append(asyncio.current_task())
        with closing(writer):
            while data := await reader.read(65536):
                writer.write(says(next(asked)) if b"MGET" in data else b"+OK\r\n" * data.count(b"*"))

    async with await asyncio.start_server(answer, "127.0.0.1") as server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        await asyncio.gather(*filter(None, visits), return_exceptions=True)


@pytest.mark.parametrize("opened", [True, False])
async def test_nothing_is_left_open(server: RedisServer, child: Child, opened: bool) -> None:
    async with open_redis(server.url, timeout_s=5) as redis:
        if opened:
            assert await hears_its_own(redis, KEYS[0])
        os.kill(child.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(redis.values([KEYS[0]]))
        await asyncio.sleep(0.1)
    os.kill(child.pid, signal.SIGCONT)
    with pytest.raises(RedisConnectionError if opened else asyncio.CancelledError):
        await waiting
    with RedisClient.from_url(server.url) as client:
        async with asyncio.timeout(10):
            while client.info("clients")["connected_clients"] > 1:
                await asyncio.sleep(0.01)
