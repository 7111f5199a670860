"""Which version of each model is the champion, and the bundle that its live data is measured against."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from obstore.exceptions import BaseError as ObjectStoreError

from mojomesh_chassis.bundles import Bundle, fetch_bundle
from mojomesh_chassis.consuming import CatchesUp
from mojomesh_chassis.errors import MeshError
from mojomesh_chassis.objects import Objects
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.events import ModelPromoted, PredictionsMade

RETRY_S = 10.0  # a bundle that could not be had is asked for again after this


class Champions(CatchesUp):
    """The last promotion of each model."""

    event = ModelPromoted

    def __init__(self) -> None:
        self._promotions: dict[str, ModelPromoted] = {}

    def put(self, promoted: ModelPromoted) -> None:
        """Take over a promotion, unless a later one is known."""
        known = self._promotions.get(promoted.model)
        if known is None or promoted.promotion > known.promotion:
            self._promotions[promoted.model] = promoted

    async def of(self, blocks: Sequence[PredictionsMade]) -> dict[str, ModelPromoted]:
        """The champions of the models that made `blocks`, in alphabetical order: every transaction takes their locks in one order."""
        if any(not self.made(block) for block in blocks):
            await self.caught_up()  # a scorer may have heard of a promotion before us
        models = sorted({block.model for block in blocks})
        return {model: self._promotions[model] for model in models if model in self._promotions}

    @property
    def all(self) -> list[ModelPromoted]:
        """The champions of all models."""
        return list(self._promotions.values())

    def made(self, block: PredictionsMade) -> bool:
        """Whether the champion made these predictions, as far as is known here."""
        champion = self._promotions.get(block.model)
        return champion is not None and (champion.version, champion.bundle_digest) == (block.version, block.bundle_digest)


class ChampionBundles:
    """Bundles of champions, verified. One that cannot be had or trusted is None for now: predictions are kept, windows wait."""

    def __init__(self, objects: Objects, folder: Path, public_key: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._objects = objects
        self._folder = folder
        self._public_key = public_key
        self._clock = clock
        self._bundles: dict[str, Bundle] = {}  # by model, the last one
        self._not_before: dict[str, float] = {}

    async def of(self, champion: ModelPromoted) -> Bundle | None:
        """The champion's bundle."""
        bundle = self._bundles.get(champion.model)
        if bundle is not None and bundle.digest == champion.bundle_digest:
            return bundle
        if self._clock() < self._not_before.get(champion.bundle_digest, 0.0):
            return None
        try:
            # Verifying hashes and parses files for a good part of a second, hence a thread, with a loop of its own for the fetching.
            bundle = await asyncio.to_thread(asyncio.run, self._fetch(champion.bundle_digest))
        except (MeshError, ObjectStoreError, OSError) as error:
            self._not_before[champion.bundle_digest] = self._clock() + RETRY_S
            log.error("drift_not_measured", model=champion.model, version=champion.version, reason=str(error))
            return None
        self._bundles[champion.model] = bundle
        return bundle

    async def _fetch(self, digest: str) -> Bundle:
        return await fetch_bundle(self._objects, digest, self._folder, self._public_key)
