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
from mojomesh_contracts.bundles import BASELINE_FILE, GOLDEN_FILE, MOJO_FILE, SCHEMA_FILE, Baseline, BundleSchema, Golden
from mojomesh_contracts.events import Challenger
from mojomesh_contracts.traffic import bucket_of
from mojomesh_scorer.contributions import Explainer
from mojomesh_scorer.encoding import Encoded, Encoder, Matrix, recoder
from mojomesh_scorer.errors import LoadFailed, NotServed, SchemaMismatch
from mojomesh_scorer.golden import check_golden, golden_rows
from mojomesh_scorer.mojo import Mojo

WARM_TIMES = 12_000  # Java's last compiler begins at some 10,000 calls

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
        baseline = Baseline.model_validate_json((folder / BASELINE_FILE).read_bytes())
        deciles = next((bins.edges for bins in baseline.bins if bins.column == "score"), None)
        self.score_edges = deciles or np.linspace(0.1, 0.9, 9).tolist()
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
        self._mojo.warm(inputs, WARM_TIMES)  # the first requests must not wait for the compiler; the other object runs the same code
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

    def score_aside(self, matrix: Matrix) -> Matrix:
        """Score encoded rows, in a thread that is not the event loop's."""
        with self._turn:
            return self._aside.score(matrix)

    def _score_aside(self, encode: Callable[[Encoder], Encoded]) -> tuple[Encoded, Matrix]:
        encoded = encode(self.encoder)
        return encoded, self.score_aside(encoded.matrix)

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


def stand_back() -> None:
    """Let threads that answer go first, three to one: Linux takes a thread's id here, though POSIX gives a process one priority."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


class Models:
    """One reference a model says what serves; commit switches it, between two requests.

    Beside this champion others may serve: a challenger the entities of its buckets, a shadow nobody.
    """

    def __init__(self) -> None:
        self.shadows: dict[LoadedModel, list[LoadedModel]] = {}
        """By champion; only those that have some."""
        self._staged: dict[tuple[str, str], LoadedModel] = {}  # by name and digest
        self._serving: dict[str, LoadedModel] = {}
        self._previous: dict[str, LoadedModel] = {}
        self._beside: dict[str, list[LoadedModel]] = {}
        self._by_bucket: dict[str, dict[int, LoadedModel]] = {}
        self._loader = ThreadPoolExecutor(1, "loader", stand_back)

    @property
    def serving(self) -> list[LoadedModel]:
        return list(self._serving.values())

    def versions(self, name: str) -> list[LoadedModel]:
        """All that can be asked for by number: the champion, then those beside it."""
        return [self._serving[name], *self._beside.get(name, [])] if name in self._serving else []

    def find(self, name: str, version: int | None = None, entity_id: str | None = None) -> LoadedModel:
        """The version that is asked for, or else the one that serves the entity: the champion, unless a challenger has its bucket.

        Raises:
            NotServed: The model is not served, or not that version of it.
        """
        model = self._serving.get(name)
        if model is None:
            raise NotServed(f"no version of model '{name}' is served; served are: {', '.join(self._serving) or 'none yet'}")
        if version is not None:
            served = {model.version: model for model in self.versions(name)}
            if version not in served:
                raise NotServed(f"version {version} of model '{name}' is not served; version {' or '.join(map(str, served))} is")
            return served[version]
        if entity_id is not None and (by_bucket := self._by_bucket.get(name)):
            return by_bucket.get(bucket_of(name, entity_id), model)
        return model

    def split(self, name: str, entity_ids: Sequence[str | None], version: int | None) -> dict[LoadedModel, Sequence[int]]:
        """The places of rows by the version that `find` finds for each."""
        if version is not None or not self._by_bucket.get(name):
            return {self.find(name, version): range(len(entity_ids))}
        places: dict[LoadedModel, list[int]] = {}
        for place, entity_id in enumerate(entity_ids):
            places.setdefault(self.find(name, None, entity_id), []).append(place)
        return {**places}

    def serving_now(self, name: str) -> LoadedModel | None:
        """The champion, if any."""
        return self._serving.get(name)

    async def stage(self, name: str, version: int, digest: str, folder: Path) -> LoadedModel:
        """Load a version beside the one that serves; the one before, still warm, or a challenger is taken as it is.

        Raises:
            LoadFailed: It cannot be loaded.
        """
        held = [*self._beside.get(name, []), *([self._previous[name]] if name in self._previous else [])]
        warm = next((model for model in held if (model.version, model.digest) == (version, digest)), None)
        if warm is None:
            load = partial(LoadedModel, name, version, digest, folder)
            warm = await asyncio.get_running_loop().run_in_executor(self._loader, load)
        self._staged[name, digest] = warm
        return warm

    def commit(self, name: str, digest: str) -> int:
        """Let the staged version serve from now on; returns how many requests the old one is answering.

        Raises:
            LoadFailed: It was not staged.
        """
        new = self._take_staged(name, digest)
        old = self._serving.get(name)
        self._serving[name] = new
        self._cast_shadows(name, old)
        if old is None:
            return 0
        self._previous[name] = old
        return old.leases

    def surround(self, name: str, challengers: Sequence[Challenger]) -> None:
        """Let these versions, all of them staged, score beside the champion from now on, and no others.

        Raises:
            LoadFailed: One was not staged.
        """
        beside = {self._take_staged(name, one.bundle_digest): one.buckets for one in challengers}
        self._beside[name] = list(beside)
        self._by_bucket[name] = {bucket: model for model, buckets in beside.items() for bucket in buckets}
        self._cast_shadows(name, None)

    def _take_staged(self, name: str, digest: str) -> LoadedModel:
        if (staged := self._staged.pop((name, digest), None)) is None:
            raise LoadFailed(f"bundle {digest} of model '{name}' was not staged")
        return staged

    def _cast_shadows(self, name: str, old: LoadedModel | None) -> None:
        if old is not None:
            self.shadows.pop(old, None)
        if (champion := self._serving.get(name)) is None:
            return
        self.shadows.pop(champion, None)
        challengers = {champion, *self._by_bucket.get(name, {}).values()}
        for model in self._beside.get(name, []):
            if model in challengers:
                continue
            try:
                recoder(champion.schema, model.schema)
            except SchemaMismatch as error:
                log.warning("shadow_cannot_score", model=name, version=model.version, reason=str(error))
            else:
                self.shadows.setdefault(champion, []).append(model)

    def discard(self, name: str, digest: str) -> None:
        """Forget what is staged."""
        self._staged.pop((name, digest), None)

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
