"""Takes runs that wait and carries each to its end: snapshot, folds, final model, bundle, announcement."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4, uuid5

import httpx

from mojomesh_chassis.bundles import fetch_bundle
from mojomesh_chassis.database import Database
from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.errors import MeshError, PermanentError, TransientError
from mojomesh_chassis.faults import fault
from mojomesh_chassis.objects import Objects
from mojomesh_chassis.publishing import Publisher
from mojomesh_chassis.telemetry import log, tracer
from mojomesh_contracts.bundles import Cause, FoldResult, SnapshotQuery, SnapshotTaken
from mojomesh_contracts.definitions import Model
from mojomesh_contracts.events import Event, FoldTrained, ModelReady
from mojomesh_trainer import tables
from mojomesh_trainer.bundling import Champion, Folds, Tools, make_bundle
from mojomesh_trainer.cluster import H2OFailed, H2OUnreachable
from mojomesh_trainer.errors import RunFailed, RunInterrupted
from mojomesh_trainer.folds import TooLittleHistory, from_ms, plan_folds
from mojomesh_trainer.runners import FoldRunner
from mojomesh_trainer.settings import TrainerSettings
from mojomesh_trainer.snapshots import Snapshot
from mojomesh_trainer.tables import LeaseLost, Run, State
from mojomesh_trainer.training import FoldPredictions, TrainingTask, predictions_key, result_key, unload_snapshot

POLL_S = 1.0
SNAPSHOT_TIMEOUT_S = 300.0


class Bell:
    """Rung when a run may be waiting; the poll is the guarantee."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def heard(self) -> None:
        """Wait until it is rung, or until it is time to look anyway."""
        try:
            async with asyncio.timeout(POLL_S):
                await self._rung.wait()
        except TimeoutError:
            return
        self._rung.clear()


@dataclass
class Trainer:
    """Works on one run at a time."""

    settings: TrainerSettings
    database: Database
    objects: Objects
    publisher: Publisher
    definitions: Definitions
    http: httpx.AsyncClient
    runner: FoldRunner
    bundles: Path
    bell: Bell

    async def work(self) -> None:
        """Take runs, until cancelled."""
        process = uuid4().hex[:8]
        while True:
            try:
                async with self.database.begin() as db:
                    run = await tables.lease_run(db, self.settings.replica, process, self.settings.lease_s)
            except TransientError as error:  # the database is away
                log.warning("no_runs_taken", reason=str(error))
                await asyncio.sleep(POLL_S)
                continue
            if run is None:
                await self.bell.heard()
            else:
                await self._drive(run)

    async def _drive(self, run: Run) -> None:
        """Carry a run to its end, while its lease is renewed; drop it when somebody else has it, or nobody can tell."""
        log.info("run_taken", run_id=str(run.run_id), model=run.model, tries=run.tries, state=run.state)
        try:
            async with asyncio.TaskGroup() as group:
                renewing = group.create_task(self._renew(run))
                await self._end(run)
                renewing.cancel()
        except* LeaseLost:
            log.warning("run_lost", run_id=str(run.run_id))
        except* TransientError as errors:
            log.warning("run_left_to_its_lease", run_id=str(run.run_id), reason=str(errors.exceptions[0]))

    async def _renew(self, run: Run) -> None:
        while True:
            await asyncio.sleep(self.settings.lease_s / 3)
            try:
                async with asyncio.timeout(self.settings.lease_s / 3):
                    await self._save(run)
            except TimeoutError as error:
                raise RunInterrupted("the lease could not be renewed in time") from error

    async def _end(self, run: Run) -> None:
        with tracer.start_as_current_span(f"train {run.model}"):
            try:
                if run.state != "announcing":
                    if run.tries > self.settings.tries:
                        raise RunFailed(f"begun {self.settings.tries} times without an end; trainer's log may say why")
                    await self._train(run)
                await self._announce(run)
            except TransientError as error:
                await self._pause(run, error)
            except PermanentError as error:
                await self._give_up(run, "failed", str(error))
            except (MeshError, LeaseLost):
                raise
            except Exception as error:  # noqa: BLE001  a bug that one model meets must not keep the others from being trained
                log.error("run_failed_by_a_bug", run_id=str(run.run_id), exc_info=error)
                await self._give_up(run, "failed", f"a bug in mojomesh, {type(error).__name__}: {error}; trainer's log has the traceback")

    async def _train(self, run: Run) -> None:
        model = self.definitions.model(run.model)
        cause = Cause.model_validate(run.cause)
        champion = await self._champion(model)
        await self._save(run, stage="snapshot")
        taken = await self._snapshot(run, model)
        snapshot = await asyncio.to_thread(Snapshot.read, self.objects.path_of(taken.path))
        task = self._task(run, model, taken, snapshot)
        await self._save(run, stage="folds", fold_runner=self.runner.name)

        async def keep(pipeline_run: str) -> None:
            run.pipeline_run = pipeline_run
            await self._save(run, pipeline_run=pipeline_run)

        try:
            block_runs = await self.runner.train(task, run.pipeline_run, keep)
            folds = await self._folds(task, run, block_runs)
            await self._save(run, stage="final model")
            tools = Tools(self.objects, self.settings.signing_key, self.settings.public_key)
            digest = await make_bundle(task, cause, taken, snapshot, folds, champion, tools)
        except PermanentError:
            await self._unload(task)
            raise
        await self._unload(task)
        fault("trainer.bundle_published")
        run.announced = [event.model_dump(mode="json") for event in _announcements(run, folds.results, digest)]
        await self._save(run, state="announcing", stage=None, bundle_digest=digest, announced=run.announced)

    async def _unload(self, task: TrainingTask) -> None:
        try:
            await asyncio.to_thread(unload_snapshot, task)
        except (H2OUnreachable, H2OFailed) as error:  # no reason to fail a run
            log.warning("snapshot_left_in_h2o", run_id=str(task.run_id), reason=str(error))

    async def _announce(self, run: Run) -> None:
        fault("trainer.before_announcement")
        await self.publisher.publish(announcements(run))
        async with self.database.begin() as db:
            await tables.end_run(db, run, "succeeded")
        log.info("run_succeeded", run_id=str(run.run_id), model=run.model)

    async def _champion(self, model: Model) -> Champion | None:
        known = await self._asked("GET", f"{self.settings.registry_url}/v1/models/{model.name}")
        if (champion := known["champion"]) is None:
            return None
        return Champion(
            champion["version"], await fetch_bundle(self.objects, champion["bundle_digest"], self.bundles, self.settings.public_key)
        )

    async def _snapshot(self, run: Run, model: Model) -> SnapshotTaken:
        assert run.snapshot_time is not None  # fixed when the run was first leased
        query = SnapshotQuery(model=model, snapshot_time=run.snapshot_time)
        answer = await self._asked("POST", f"{self.settings.features_url}/v1/snapshots", query.model_dump(mode="json"))
        taken = SnapshotTaken.model_validate(answer)
        if taken.n_rows == 0:
            raise RunFailed(
                f"no row of '{model.spine}' has a known label in '{model.label.feature_set}.{model.label.column}' yet: "
                "publish some, then train"
            )
        return taken

    def _task(self, run: Run, model: Model, taken: SnapshotTaken, snapshot: Snapshot) -> TrainingTask:
        first, last = (from_ms(int(end)) for end in (snapshot.label_ms.min(), snapshot.label_ms.max()))
        try:
            plans = plan_folds(first, last, snapshot.label_delay, model.walk_forward)
        except TooLittleHistory as error:
            raise RunFailed(str(error)) from error
        return TrainingTask(
            run_id=run.run_id,
            model=model,
            columns=taken.columns,
            snapshot_url=self.objects.path_of(taken.path),
            h2o_url=self.settings.h2o,
            objects_url=self.settings.objects,
            plans=plans,
            results=f"runs/{run.run_id}",
            timeout_s=self.settings.timeout_s,
        )

    async def _folds(self, task: TrainingTask, run: Run, block_runs: dict[int, str]) -> Folds:
        results, predictions = [], []
        for plan in task.plans:
            result = FoldResult.model_validate_json(await self.objects.get(result_key(task.results, plan.fold)))
            results.append(result.model_copy(update={"block_run": block_runs.get(plan.fold)}))
            predictions.append(FoldPredictions.from_bytes(await self.objects.get(predictions_key(task.results, plan.fold))))
        return Folds(self.runner, run.pipeline_run, results, predictions)

    async def _asked(self, method: str, url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = await self.http.request(method, url, json=body, timeout=SNAPSHOT_TIMEOUT_S)
        except httpx.TransportError as error:
            raise RunInterrupted(f"{url} does not answer: {error!r}") from error
        answer: dict[str, Any] = response.json()
        if response.is_client_error:
            raise RunFailed(f"{url} refused: {answer.get('error', {}).get('message', answer)}")
        if response.is_error:
            raise RunInterrupted(f"{url} answered {response.status_code}")
        return answer

    async def _save(self, run: Run, **values: Any) -> None:
        async with self.database.begin() as db:
            await tables.save_run(db, run, self.settings.lease_s, **values)

    async def _pause(self, run: Run, error: TransientError) -> None:
        """Put the run back until what it needs may be there again; give up when that takes too long, unless its bundle is there already."""
        if not run.announced and datetime.now(UTC) - run.created_at > timedelta(seconds=self.settings.patience_s):
            await self._give_up(run, "failed", f"{error} (tried for {self.settings.patience_s:g} s)")
            return
        log.warning("run_interrupted", run_id=str(run.run_id), reason=str(error))
        async with self.database.begin() as db:
            await tables.pause_run(db, run, max(error.retry_after_s, self.settings.pause_s), str(error))

    async def _give_up(self, run: Run, state: State, reason: str) -> None:
        log.warning("run_ended", run_id=str(run.run_id), model=run.model, state=state, reason=reason)
        async with self.database.begin() as db:
            await tables.end_run(db, run, state, reason)


@asynccontextmanager
async def working(trainer: Trainer) -> AsyncIterator[asyncio.Task[None]]:
    """Work in the background; a run in hand at the end is left to its lease, and goes on in the next process."""
    task = asyncio.create_task(trainer.work())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def announcements(run: Run) -> list[Event]:
    """The events that a run ended with; none before its bundle was published."""
    return [(ModelReady if "bundle_digest" in event else FoldTrained).model_validate(event) for event in run.announced]


def _announcements(run: Run, results: list[FoldResult], digest: str) -> list[Event]:
    trained = [
        FoldTrained(
            event_id=uuid5(run.run_id, f"fold-{result.fold}"),
            run_id=run.run_id,
            model=run.model,
            **result.model_dump(exclude={"champion_metrics", "challenger_metrics"}),
        )
        for result in results
    ]
    return [*trained, ModelReady(event_id=uuid5(run.run_id, "ready"), model=run.model, run_id=run.run_id, bundle_digest=digest)]
