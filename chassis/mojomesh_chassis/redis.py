"""Opening Redis. It is a cache: callers must do without it when it does not answer."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis


@asynccontextmanager
async def open_redis(url: str, timeout_s: float = 0.25) -> AsyncIterator[Redis]:
    """A client that reconnects by itself; a command without an answer within `timeout_s` raises redis.exceptions.RedisError."""
    client = Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, max_connections=64)
    try:
        yield client
    finally:
        await client.aclose()
