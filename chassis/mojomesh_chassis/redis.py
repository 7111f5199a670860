"""Opening Redis. It is a cache: callers must do without it when it does not answer."""

import asyncio
from asyncio import Future
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import hiredis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError


@asynccontextmanager
async def open_redis(url: str, timeout_s: float = 0.25) -> AsyncIterator["LineRedis"]:
    """A client that reconnects by itself; a command without an answer within `timeout_s` raises redis.exceptions.RedisError."""
    client = LineRedis(url, timeout_s)
    try:
        yield client
    finally:
        await client.aclose()


class LineRedis(Redis):
    """redis-py's client, with a short way to ask for values (docs/decisions/0024-the-line-to-redis.md)."""

    def __init__(self, url: str, timeout_s: float) -> None:
        # By default redis-py tries again three times over seconds; here once, at once: a connection may have been closed while it lay idle.
        retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
        patience = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s, "timeout": timeout_s, "retry": retry}
        # In RESP 2 nothing is said unasked.
        super().__init__(connection_pool=BlockingConnectionPool.from_url(url, max_connections=64, protocol=2, **patience))
        self.auto_close_connection_pool = True
        self._timeout_s = timeout_s
        self._line: _Line | None = None
        self._opening: asyncio.Task[_Line] | None = None

    async def values(self, keys: Sequence[str]) -> object:
        """MGET, on a connection where no question waits for another's answer.

        Returns:
            What Redis says: mostly a list of bytes or None, by key.

        Raises:
            redis.exceptions.RedisError: It refuses, or is late; then the connection is given up, and all who wait on it hear of that.
        """
        line = self._line
        if line is None or not line.is_open:
            if self._opening is None:
                self._opening = asyncio.create_task(self._open())
            line = await asyncio.shield(self._opening)  # one who goes away must not take it from the others
        return await line.ask("MGET", *keys)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        if self._opening is not None:
            self._opening.cancel()
        if self._line is not None:
            self._line.close(RedisConnectionError, "closed")
        await super().aclose(close_connection_pool)

    async def _open(self) -> "_Line":
        # redis-py knows about addresses, TLS, passwords and databases; what it has opened is taken from it.
        connection = self.connection_pool.connection_class(**self.connection_pool.connection_kwargs)
        try:
            async with asyncio.timeout(self._timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call]  # redis-py does not annotate it
        except TimeoutError as error:
            raise RedisTimeoutError(f"no connection within {self._timeout_s} s") from error
        finally:
            self._opening = None
        self._line = _Line(connection, self._timeout_s)
        return self._line


class _Line(asyncio.Protocol):
    """A connection on which many may ask; Redis answers them in their order."""

    def __init__(self, connection: AbstractConnection, timeout_s: float) -> None:
        assert connection._writer
        self._writer, connection._writer = connection._writer, None  # whoever has it closes the transport when dropped
        self._transport = self._writer.transport
        self._transport.set_protocol(self)
        self._reader = hiredis.Reader(replyError=ResponseError)
        self._timeout_s = timeout_s
        self._waiting: deque[tuple[float, Future[object]]] = deque()  # since when, in the order in which Redis answers
        self._watch: asyncio.TimerHandle | None = None  # for who waits longest: a timer for each would cost a tenth of its question

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    def ask(self, *command: str) -> Future[object]:
        loop = asyncio.get_running_loop()
        answer: Future[object] = loop.create_future()
        self._waiting.append((loop.time(), answer))
        if self._watch is None:
            self._watch = loop.call_later(self._timeout_s, self._look)
        self._transport.write(hiredis.pack_command(command))  # type: ignore[arg-type]  # of any length, but declared to be of one
        return answer

    def _look(self) -> None:
        self._watch = None
        if self._waiting:
            loop = asyncio.get_running_loop()
            patience_s = self._waiting[0][0] + self._timeout_s - loop.time()
            if patience_s > 0:
                self._watch = loop.call_later(patience_s, self._look)
            else:
                self.close(RedisTimeoutError, f"no answer within {self._timeout_s} s")

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (said := self._reader.gets()) is not False:
                _, answer = self._waiting.popleft()
                if answer.done():  # nobody waits any more
                    continue
                if isinstance(said, ResponseError):
                    answer.set_exception(said)
                else:
                    answer.set_result(said)
        except (hiredis.ProtocolError, IndexError):
            self.close(RedisConnectionError, "this is not Redis, or it answers what nobody asked")

    def close(self, kind: type[RedisError], why: str) -> None:
        self._transport.abort()
        for _, answer in self._waiting:
            if not answer.done():
                answer.set_exception(kind(why))
        self._waiting.clear()

    def connection_lost(self, error: Exception | None) -> None:
        self.close(RedisConnectionError, f"the connection was lost: {error}")
