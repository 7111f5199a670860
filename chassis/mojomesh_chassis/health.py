"""Readiness: every opened resource brings its own ping, and readiness is a loop over them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from mojomesh_chassis.errors import TransientError

Ping = Callable[[], Awaitable[object]]


class Health:
    """The pings of one process."""

    def __init__(self) -> None:
        self._pings: dict[str, Ping] = {}

    def add(self, name: str, ping: Ping) -> None:
        """`ping` returns when the resource is well, and raises or takes longer than two seconds when it is not."""
        self._pings[name] = ping

    def watch(self, name: str, task: "asyncio.Task[None]", what: str) -> None:
        """Be well while a background task goes on. Should a bug end it, the service is not ready any more and says why."""

        async def ping() -> None:
            if task.done():
                await task
                raise TransientError(f"{what} has stopped")

        self.add(name, ping)

    @asynccontextmanager
    async def beside(self, name: str, work: Coroutine[Any, Any, None], what: str) -> AsyncIterator[None]:
        """Let `work`, which has no end, go on and `watch` it until this is left; then it is cancelled."""
        task = asyncio.create_task(work)
        self.watch(name, task, what)
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def check(self) -> dict[str, str]:
        """What is wrong with each resource that is not well, in words; empty when all are."""
        problems = await asyncio.gather(*(self._problem(ping) for ping in self._pings.values()))
        return {name: problem for name, problem in zip(self._pings, problems, strict=True) if problem}

    async def _problem(self, ping: Ping) -> str | None:
        try:
            async with asyncio.timeout(2):
                await ping()
        except TimeoutError:
            return "no answer within 2 s"
        except Exception as error:  # noqa: BLE001  any client library's any error means the same here: not well
            return f"{type(error).__name__}: {error}"
        return None
