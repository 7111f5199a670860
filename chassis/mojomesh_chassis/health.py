"""Readiness: every opened resource brings its own ping, and readiness is a loop over them."""

import asyncio
from collections.abc import Awaitable, Callable

Ping = Callable[[], Awaitable[object]]


class Health:
    """The pings of one process."""

    def __init__(self) -> None:
        self._pings: dict[str, Ping] = {}

    def add(self, name: str, ping: Ping) -> None:
        """`ping` returns when the resource is well, and raises or takes longer than two seconds when it is not."""
        self._pings[name] = ping

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
