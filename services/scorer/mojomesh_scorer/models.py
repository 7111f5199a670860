"""The model versions that one worker holds: staged, serving, and the one before."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from mojomesh_chassis.telemetry import log
from mojomesh_contracts.bundles import GOLDEN_FILE, MOJO_FILE, SCHEMA_FILE, BundleSchema, Golden
from mojomesh_scorer.contributions import Explainer
from mojomesh_scorer.encoding import Encoded, Encoder, Matrix
from mojomesh_scorer.errors import LoadFailed, NotServed
from mojomesh_scorer.golden import check_golden, golden_rows
from mojomesh_scorer.mojo import Mojo

WARM_ROWS = 12_000  # of each object, by single rows and by blocks; Java's last compiler begins at some 10,000 calls

IN_PLACE_ROWS = 64
"""Blocks up to this size are scored on the event loop, some 0.5 ms; larger ones leave it."""


class LoadedModel:
    """One version of a model, ready to score. Requests that it is answering hold a lease on it."""

    def __init__(self, name: str, version: int, digest: str, folder: Path) -> None:
        """Load it from a folder that the supervisor has verified, and score its golden rows.

        Raises:
            LoadFailed: It cannot be loaded, or a golden row's score is not what it must be.
        """
        self.name = name
        self.version = version
        self.digest = digest
        self.schema = BundleSchema.model_validate_json((folder / SCHEMA_FILE).read_bytes())
        golden = Golden.model_validate_json((folder / GOLDEN_FILE).read_bytes())
        self.encoder = Encoder(self.schema)
        inputs, wanted = golden_rows(golden, self.schema)
        # Two objects, since one belongs to one thread: the event loop's, and the one that large blocks take turns at.
        self._mojo, self._aside = (Mojo(folder / MOJO_FILE, self.schema, inputs) for _ in range(2))
        self._turn = threading.Lock()
        self._mojo_path = folder / MOJO_FILE
        self._explainer: Explainer | None = None
        self._explaining = threading.Lock()
        self.scored_by = self._mojo.scored_by
        log.info("model_loaded", model=name, version=version, scored_by=self.scored_by, not_flat_because=self._mojo.not_flat_because)
        self.golden_rows = len(wanted)
        self.golden_difference = max(check_golden(mojo.score(inputs), wanted, golden.tolerance) for mojo in (self._mojo, self._aside))
        self._warm(inputs)
        self.leases = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def score(self, n_rows: int, encode: Callable[[Encoder], Encoded]) -> tuple[Encoded, Matrix]:
        """Encode and score a block; a large one in a thread, so that nobody waits behind it."""
        if n_rows <= IN_PLACE_ROWS:
            encoded = encode(self.encoder)
            return encoded, self._mojo.score(encoded.matrix)
        return await asyncio.to_thread(self._score_aside, encode)

    def score_row(self, row: Sequence[float]) -> list[float]:
        """Score one encoded row, on the event loop."""
        return self._mojo.score_row(row)

    def _score_aside(self, encode: Callable[[Encoder], Encoded]) -> tuple[Encoded, Matrix]:
        encoded = encode(self.encoder)
        with self._turn:
            return encoded, self._aside.score(encoded.matrix)

    async def explain(self, rows: Sequence[Sequence[float]]) -> Matrix:
        """Contributions of encoded rows as `Explainer.explain` has them, in a thread; the first call loads what they need.

        Raises:
            NotExplained: The model is of a kind that has none.
            TooLarge: More rows than a request may have explained.
        """
        with self.leased():
            return await asyncio.to_thread(self._explain, np.array(rows, dtype=np.float64))

    def _explain(self, block: Matrix) -> Matrix:
        with self._explaining:
            if self._explainer is None:
                self._explainer = Explainer(self._mojo_path, len(self.schema.columns))
            return self._explainer.explain(block)

    def _warm(self, inputs: Matrix) -> None:
        """Score until Java has compiled what scores, by single rows and by blocks: the first requests must not wait for that."""
        row = inputs[0].tolist()
        for mojo in (self._mojo, self._aside):
            for _ in range(WARM_ROWS):
                mojo.score_row(row)
            for _ in range(0, WARM_ROWS, len(inputs)):
                mojo.score(inputs)

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Hold the version: whoever drains it waits for the end of this."""
        self.leases += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.leases -= 1
            if not self.leases:
                self._idle.set()

    async def drained(self) -> None:
        """Wait until nobody holds it."""
        await self._idle.wait()


def _stand_back() -> None:
    """Let threads that answer go first, three to one: Linux takes a thread's id here, though POSIX gives a process one priority."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


class Models:
    """One reference a model says what serves; commit switches it, between two requests."""

    def __init__(self) -> None:
        self._staged: dict[str, LoadedModel] = {}
        self._serving: dict[str, LoadedModel] = {}
        self._previous: dict[str, LoadedModel] = {}
        self._loader = ThreadPoolExecutor(1, "loader", _stand_back)

    @property
    def serving(self) -> list[LoadedModel]:
        return list(self._serving.values())

    def find(self, name: str, version: int | None = None) -> LoadedModel:
        """The version of the model that serves.

        Raises:
            NotServed: None does, or not the version that is asked for.
        """
        model = self._serving.get(name)
        if model is None:
            raise NotServed(f"no version of model '{name}' is served; served are: {', '.join(self._serving) or 'none yet'}")
        if version is not None and version != model.version:
            raise NotServed(f"version {version} of model '{name}' is not served; version {model.version} is")
        return model

    def serving_now(self, name: str) -> LoadedModel | None:
        """The version of the model that serves, if any."""
        return self._serving.get(name)

    async def stage(self, name: str, version: int, digest: str, folder: Path) -> LoadedModel:
        """Load a version beside the one that serves; the one before, still warm, is taken as it is.

        Raises:
            LoadFailed: It cannot be loaded.
        """
        warm = self._previous.get(name)
        if warm is None or (warm.version, warm.digest) != (version, digest):
            load = partial(LoadedModel, name, version, digest, folder)
            warm = await asyncio.get_running_loop().run_in_executor(self._loader, load)
        self._staged[name] = warm
        return warm

    def commit(self, name: str, digest: str) -> int:
        """Let the staged version serve from now on; returns how many requests the old one is answering.

        Raises:
            LoadFailed: It was not staged.
        """
        new = self._staged.get(name)
        if new is None or new.digest != digest:
            raise LoadFailed(f"bundle {digest} of model '{name}' was not staged")
        del self._staged[name]
        old = self._serving.get(name)
        self._serving[name] = new
        if old is None:
            return 0
        self._previous[name] = old
        return old.leases

    def discard(self, name: str) -> None:
        """Forget what is staged."""
        self._staged.pop(name, None)

    async def drain(self, name: str, timeout_s: float) -> bool:
        """Wait for the requests that the version before is answering; whether all ended in time."""
        if (old := self._previous.get(name)) is None:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await old.drained()
        except TimeoutError:
            return False
        return True
