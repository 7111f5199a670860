"""`python -m tests.features.unguarded`: the features service without what guards its readers, for the controls of `test_cache_faults`."""

from collections.abc import Hashable, Iterable
from typing import Any, TypeVar

from mojomesh_chassis.serving import serve
from mojomesh_features import app, reading
from mojomesh_features.coalescing import Coalescer
from mojomesh_features.settings import FeaturesSettings
from mojomesh_store.online import OnlineStore

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Trusting(OnlineStore):
    """To whom no answer is an error, not a miss."""

    async def _asking(self, command: Any, anyway: bool = False) -> Any:
        return await command


class Apart(Coalescer[Key, Value]):
    """Loads for each who asks."""

    async def get(self, keys: Iterable[Key]) -> dict[Key, Value]:
        return dict(await self._load(list(keys)))


if __name__ == "__main__":
    # The modules do not export what they import, but it is there that it must be another.
    app.OnlineStore = Trusting  # type: ignore[attr-defined]  # see above
    reading.Coalescer = Apart  # type: ignore[attr-defined]  # see above
    serve("features", app.build, FeaturesSettings)
