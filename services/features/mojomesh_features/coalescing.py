"""Loading many keys with few calls, and a key that is already being loaded not again."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Coalescer(Generic[Key, Value]):
    """Gathers the keys that are asked for in one turn of the event loop into one call of `load`, which answers all of them."""

    def __init__(self, load: Callable[[list[Key]], Awaitable[Mapping[Key, Value]]]) -> None:
        self._load = load
        self._gathering: dict[Key, None] | None = None  # the keys of the call that has not begun; a dict keeps their order
        self._next: asyncio.Task[Mapping[Key, Value]] | None = None
        self._loading: dict[Key, asyncio.Task[Mapping[Key, Value]]] = {}

    async def get(self, keys: Iterable[Key]) -> dict[Key, Value]:
        """The values of `keys`. An error of `load` is raised to all who wait for that call."""
        tasks = {key: self._loading.get(key) or self._enlist(key) for key in keys}
        # Shielded: who goes away must not take the load from the others.
        answers = {task: await asyncio.shield(task) for task in dict.fromkeys(tasks.values())}
        return {key: answers[task][key] for key, task in tasks.items()}

    def _enlist(self, key: Key) -> asyncio.Task[Mapping[Key, Value]]:
        if self._gathering is None or self._next is None:
            self._gathering = {}
            self._next = asyncio.create_task(self._run(self._gathering))
            self._next.add_done_callback(_retrieve)
        self._gathering[key] = None
        self._loading[key] = self._next
        return self._next

    async def _run(self, keys: dict[Key, None]) -> Mapping[Key, Value]:
        self._gathering = self._next = None
        try:
            return await self._load(list(keys))
        finally:
            for key in keys:
                del self._loading[key]


def _retrieve(task: asyncio.Task[Mapping[Key, Value]]) -> None:
    if not task.cancelled():
        task.exception()  # everybody who waited may have gone away
