"""Swapping the version that serves: every step may fail, and then the old one goes on serving."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import numpy as np

from mojomesh_chassis.bundles import Bundle, fetch_bundle
from mojomesh_chassis.errors import BadBundle, NotFound, PermanentError
from mojomesh_chassis.faults import fault
from mojomesh_chassis.objects import Objects
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.events import Latency, LeftOut, ModelDeployed, ModelPromoted, SwapPhase, TrafficFollowed, TrafficSet
from mojomesh_scorer.control import Counted, Loaded
from mojomesh_scorer.errors import WorkerLost
from mojomesh_scorer.latencies import added, p99_ms
from mojomesh_scorer.pool import Beside, Pool, Served, Switched
from mojomesh_scorer.probing import score_in_probe
from mojomesh_scorer.settings import Settings

AFTER_S = 0.5


@dataclass
class _Swap:
    """What is known so far of one swap."""

    model: str
    version: int
    digest: str
    previous: Served | None
    phases: list[SwapPhase] = field(default_factory=list)
    loaded: list[Loaded] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases.append(SwapPhase(name=name, seconds=time.perf_counter() - start))


class Swaps:
    """The models to serve, and the way to the next version of each."""

    def __init__(self, settings: Settings, objects: Objects, pool: Pool, bundles: Path) -> None:
        self._settings = settings
        self._objects = objects
        self._pool = pool
        self._bundles = bundles
        self._promoted: dict[str, ModelPromoted] = {}
        self._followed: dict[str, TrafficFollowed] = {}
        self._certificates: dict[str, ModelDeployed] = {}
        self._proven: set[str] = set()
        self._one_at_a_time = asyncio.Lock()

    async def follow(self, promoted: ModelPromoted) -> ModelDeployed | None:
        """Serve what was promoted; the certificate says whether it came to that. None for a promotion that is stale.

        A promotion that comes again is answered by its certificate again.
        """
        async with self._one_at_a_time:
            known = self._promoted.get(promoted.model)
            if known is not None and promoted.promotion < known.promotion:
                log.info("promotion_stale", model=promoted.model, promotion=promoted.promotion, known=known.promotion)
                return None
            if known is not None and promoted.promotion == known.promotion:
                return self._certificates[promoted.model]
            certificate = await self._swap(promoted.model, promoted.version, promoted.bundle_digest)
            self._promoted[promoted.model] = promoted
            self._certificates[promoted.model] = certificate
            return certificate

    async def surround(self, traffic: TrafficSet) -> TrafficFollowed | None:
        """Let the versions named, and no others, score beside their model's champion. None for a setting that is stale.

        One that must not be used is left out: its entities stay with the champion.
        """
        async with self._one_at_a_time:
            known = self._followed.get(traffic.model)
            if known is not None and traffic.setting <= known.setting:
                log.info("traffic_stale", model=traffic.model, setting=traffic.setting, known=known.setting)
                return known if traffic.setting == known.setting else None
            versions, left_out = [], []
            for one in traffic.challengers:
                try:
                    served = await self._prepare(_Swap(traffic.model, one.version, one.bundle_digest, previous=None))
                except (PermanentError, WorkerLost) as error:
                    log.error("challenger_refused", model=traffic.model, version=one.version, reason=str(error))
                    left_out.append(LeftOut(version=one.version, reason=str(error)))
                else:
                    versions.append((served, tuple(one.buckets)))
            await self._pool.surround(Beside(traffic.model, tuple(versions)))
            log.info("traffic_set", model=traffic.model, setting=traffic.setting, versions=[served.version for served, _ in versions])
            followed = self._followed[traffic.model] = TrafficFollowed(
                event_id=uuid4(),  # each attempt is a fact of its own
                model=traffic.model,
                setting=traffic.setting,
                replica=self._settings.replica,
                followed_at=datetime.now(UTC),
                left_out=left_out,
            )
            return followed

    async def reload(self, model: str, version: int | None, digest: str | None) -> ModelDeployed:
        """Load and serve by hand, all steps anew: the version named, or the one promoted last.

        Raises:
            NotFound: Nothing is named, and nothing was promoted.
        """
        async with self._one_at_a_time:
            promoted = self._promoted.get(model)
            if version is None or digest is None:
                if promoted is None:
                    raise NotFound(f"no version of model '{model}' was ever promoted; name version and bundle_digest")
                version, digest = promoted.version, promoted.bundle_digest
            self._proven.discard(digest)
            return await self._swap(model, version, digest)

    async def replay(self, digest: str, inputs: list[float | None]) -> list[float]:
        """The scores that a bundle gives an encoded row, computed anew from the object store.

        Raises:
            NotFound: There is no such bundle.
            BadBundle: It is damaged, or its MOJO does not take such a row.
        """
        bundle = await self._fetch(digest)
        if len(inputs) != len(bundle.schema.columns):
            raise PermanentError(f"the bundle's model has {len(bundle.schema.columns)} columns, the row has {len(inputs)}")
        scores = await score_in_probe(bundle.folder, np.array([inputs], dtype=np.float64), self._settings.heap_mb)
        return [float(score) for score in scores[0]]

    async def _swap(self, model: str, version: int, digest: str) -> ModelDeployed:
        swap = _Swap(model, version, digest, previous=self._pool.served.get(model))
        before = await self._pool.counts()
        try:
            served = await self._prepare(swap)
        except (PermanentError, WorkerLost) as error:
            log.error("swap_failed", model=model, version=version, reason=str(error))
            return self._certificate(swap, reason=str(error), switched=[], drained=True, failed_requests=0, p99=Latency())
        fault("scorer.after_load")
        with swap.phase("commit"):
            switched = await self._pool.commit(served)
        with swap.phase("drain"):
            drained = await self._pool.drain(model, self._settings.drain_s)
        during = await self._pool.counts()
        failed = sum(count.failed_requests - (before[pid].failed_requests if pid in before else 0) for pid, count in during.items())
        p99 = await self._p99(before, during)
        log.info("model_swapped", model=model, version=version, previous=swap.previous.version if swap.previous else None, drained=drained)
        return self._certificate(swap, reason=None, switched=switched, drained=drained, failed_requests=failed, p99=p99)

    async def _p99(self, before: dict[int, Counted], during: dict[int, Counted]) -> Latency:
        to_before, to_during = (added(count.latencies for count in counts.values()) for counts in (before, during))
        if sum(to_during) <= sum(to_before):
            return Latency(before_ms=p99_ms(to_before))
        await asyncio.sleep(AFTER_S)
        to_after = added(count.latencies for count in (await self._pool.counts()).values())
        return Latency(before_ms=p99_ms(to_before), during_ms=p99_ms(to_during, to_before), after_ms=p99_ms(to_after, to_during))

    async def _prepare(self, swap: _Swap) -> Served:
        """Bring the version to where only the switch is left.

        Raises:
            PermanentError: The bundle must not be used, or is not there.
            WorkerLost: Workers die over it.
        """
        with swap.phase("fetch and verify"):
            bundle = await self._fetch(swap.digest)
            if bundle.manifest.model != swap.model:
                raise BadBundle(f"the bundle is of model '{bundle.manifest.model}', promoted was '{swap.model}'")
        served = Served(swap.model, swap.version, swap.digest, bundle.folder)
        if swap.digest not in self._proven:  # a rollback to a version that served before needs no second probe
            with swap.phase("probe"):
                await self._pool.prove(served)
            self._proven.add(swap.digest)
        with swap.phase("load"):
            try:
                swap.loaded = await self._pool.prepare(served)
            except WorkerLost as error:
                # It may have died of something else; a bundle that kills workers kills them again.
                log.warning("worker_lost_in_swap", model=swap.model, reason=str(error))
                swap.loaded = await self._pool.prepare(served)
        return served

    async def _fetch(self, digest: str) -> Bundle:
        return await fetch_bundle(self._objects, digest, self._bundles, self._settings.verifying_key)

    def _certificate(
        self, swap: _Swap, *, reason: str | None, switched: list[Switched], drained: bool, failed_requests: int, p99: Latency
    ) -> ModelDeployed:
        return ModelDeployed(
            event_id=uuid4(),  # each attempt is a fact of its own
            model=swap.model,
            version=swap.version,
            previous_version=swap.previous.version if swap.previous else None,
            bundle_digest=swap.digest,
            replica=self._settings.replica,
            succeeded=reason is None,
            reason=reason,
            switched_at=datetime.now(UTC),
            phases=swap.phases,
            workers=len(swap.loaded),
            in_flight_at_switch=sum(switch.in_flight for switch in switched),
            drained=drained,
            failed_requests=failed_requests,
            golden_rows=max((loaded.golden_rows for loaded in swap.loaded), default=0),
            max_golden_difference=max((loaded.max_golden_difference for loaded in swap.loaded), default=0.0),
            scored_by=swap.loaded[0].scored_by if swap.loaded else None,
            per_worker=[switch.worker for switch in switched],
            p99=p99,
        )
