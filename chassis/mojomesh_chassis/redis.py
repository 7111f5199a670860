"""Opening Redis. It is a cache: callers must do without it when it does not answer."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError


@asynccontextmanager
async def open_redis(url: str, timeout_s: float = 0.25) -> AsyncIterator[Redis]:
    """A client that reconnects by itself; a command without an answer within `timeout_s` raises redis.exceptions.RedisError."""
    # By default redis-py tries again three times over seconds; here once, at once, as a connection may have been closed while it lay idle.
    retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
    pool = BlockingConnectionPool.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, max_connections=64, timeout=timeout_s, retry=retry
    )
    client = Redis.from_pool(pool)
    try:
        yield client
    finally:
        await client.aclose()
