"""Who trains the folds of a run: Mage, or this process. Both leave the same files beside the run."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NoReturn, Protocol, TypeVar

import httpx

from mojomesh_chassis.errors import NotFound
from mojomesh_chassis.faults import fault
from mojomesh_chassis.objects import Objects
from mojomesh_chassis.telemetry import log
from mojomesh_trainer.cluster import H2OFailed, H2OUnreachable
from mojomesh_trainer.errors import RunFailed, RunInterrupted
from mojomesh_trainer.training import FoldFailure, TrainingTask, failure_key, predictions_key, result_key, train_fold

FOLD_TRIES = 3
POLL_S = 0.25
ENDED_BADLY = ("failed", "cancelled")
T = TypeVar("T")
Json = dict[str, Any]
KeepPipelineRun = Callable[[str], Awaitable[None]]


class FoldRunner(Protocol):
    """Trains every fold that has no result yet."""

    name: Literal["mage", "local"]

    async def train(self, task: TrainingTask, pipeline_run: str | None, keep: KeepPipelineRun) -> dict[int, str]:
        """Return when every fold's files are there; Mage's block run by fold, if Mage trained them.

        `pipeline_run` is the one begun by an earlier try; `keep` keeps that of this one.

        Raises:
            RunFailed: A fold failed, after its retries; with H2O's reason.
            RunInterrupted: H2O or Mage is away.
        """


class LocalRunner:
    """One fold after the other, in this process: for tests and small installations."""

    name: Literal["mage", "local"] = "local"

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def train(self, task: TrainingTask, pipeline_run: str | None, keep: KeepPipelineRun) -> dict[int, str]:
        """See `FoldRunner`."""
        for plan in task.plans:
            if not await self._objects.exists(result_key(task.results, plan.fold)):
                await self._train_fold(task, plan.fold)
        return {}

    async def _train_fold(self, task: TrainingTask, fold: int) -> None:
        for tries in range(1, FOLD_TRIES + 1):
            try:
                result, predictions = await in_thread(lambda unwanted: train_fold(task, fold, unwanted))
                break
            except H2OUnreachable as error:
                raise RunInterrupted(str(error)) from error
            except H2OFailed as error:
                log.warning("fold_failed", run_id=str(task.run_id), fold=fold, tries=tries, reason=str(error))
                if tries == FOLD_TRIES:
                    raise RunFailed(f"fold {fold} failed {tries} times: {error}") from error
        fault("trainer.fold_training")
        await self._objects.put(predictions_key(task.results, fold), predictions.to_bytes())
        await self._objects.put(result_key(task.results, fold), result.model_dump_json().encode())


async def in_thread(work: Callable[[Callable[[], bool]], T]) -> T:
    """Do blocking work in a thread. It cannot be cancelled, but it is told: what `work` gets says whether it is unwanted by now."""
    unwanted = False
    try:
        return await asyncio.to_thread(work, lambda: unwanted)
    finally:
        unwanted = True


class MageRunner:
    """Mage's pipeline `walk_forward`, started by its API trigger: a dynamic block with one child a fold."""

    name: Literal["mage", "local"] = "mage"

    def __init__(self, url: str, email: str, password: str, objects: Objects) -> None:
        self._url = url
        self._objects = objects
        self._account = {"email": email, "password": password}

    async def train(self, task: TrainingTask, pipeline_run: str | None, keep: KeepPipelineRun) -> dict[int, str]:
        """See `FoldRunner`."""
        try:
            async with httpx.AsyncClient(base_url=self._url, timeout=30, trust_env=False) as http:
                await self._sign_in(http)
                if pipeline_run is None or (await self._state(http, pipeline_run)) in ENDED_BADLY:
                    pipeline_run = await self._begun(http, task) or await self._trigger(http, task)
                    await keep(pipeline_run)
                state = await self._ended(http, pipeline_run, task)
                blocks = await self._blocks(http, pipeline_run)
                if state in ENDED_BADLY:
                    await self._raise_why(task, pipeline_run, blocks)
                return {
                    int(name.rpartition("_")[2]): str(block["id"])
                    for block in blocks
                    if (name := block["block_uuid"]).startswith("train_fold:")
                }
        except httpx.HTTPError as error:
            raise RunInterrupted(f"Mage at {self._url} does not answer: {error!r}") from error

    async def _ended(self, http: httpx.AsyncClient, pipeline_run: str, task: TrainingTask) -> str:
        """How the pipeline run ended; one that does not in good time is cancelled."""
        in_time = task.timeout_s * (len(task.plans) + 1)
        try:
            async with asyncio.timeout(in_time):
                while (state := await self._state(http, pipeline_run)) not in ("completed", *ENDED_BADLY):
                    if state == "running":
                        fault("trainer.fold_training")
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            await self._asked(http.put(f"/api/pipeline_runs/{pipeline_run}", json={"pipeline_run": {"status": "cancelled"}}))
            raise RunInterrupted(f"Mage's pipeline run {pipeline_run} did not end within {in_time:g} s; it is cancelled") from error
        return state

    async def _begun(self, http: httpx.AsyncClient, task: TrainingTask) -> str | None:
        """The pipeline run that a trainer began for this run and died before it could keep it."""
        found = (await self._asked(http.get("/api/pipeline_runs", params={"pipeline_uuid": "walk_forward", "_limit": "50"})))[
            "pipeline_runs"
        ]
        return next(
            (
                str(begun["id"])
                for begun in found
                if (begun["variables"] or {}).get("run_id") == str(task.run_id) and begun["status"] not in ENDED_BADLY
            ),
            None,
        )

    async def _sign_in(self, http: httpx.AsyncClient) -> None:
        http.headers["X-API-KEY"] = API_KEY
        session = (await self._asked(http.post("/api/sessions", json={"session": self._account})))["session"]
        http.cookies.set("oauth_token", session["token"])  # as a cookie, not as a bearer token: Mage takes it apart only there

    async def _trigger(self, http: httpx.AsyncClient, task: TrainingTask) -> str:
        schedules = (await self._asked(http.get("/api/pipelines/walk_forward/pipeline_schedules")))["pipeline_schedules"]
        trigger = next((schedule for schedule in schedules if schedule["schedule_type"] == "api"), None)
        if trigger is None:
            raise RunFailed("Mage's pipeline walk_forward has no API trigger; start Mage on the project in services/trainer/pipelines")
        begun = await self._asked(
            http.post(
                f"/api/pipeline_schedules/{trigger['id']}/pipeline_runs/{trigger['token']}",
                json={"pipeline_run": {"variables": {"run_id": str(task.run_id), "task": task.model_dump_json()}}},
            )
        )
        return str(begun["pipeline_run"]["id"])

    async def _state(self, http: httpx.AsyncClient, pipeline_run: str) -> str:
        return str((await self._asked(http.get(f"/api/pipeline_runs/{pipeline_run}")))["pipeline_run"]["status"])

    async def _blocks(self, http: httpx.AsyncClient, pipeline_run: str) -> list[Json]:
        found: list[Json] = (await self._asked(http.get("/api/block_runs", params={"pipeline_run_id": pipeline_run, "_limit": 500})))[
            "block_runs"
        ]
        return found

    async def _raise_why(self, task: TrainingTask, pipeline_run: str, blocks: list[Json]) -> NoReturn:
        failed = next((block["block_uuid"] for block in blocks if block["status"] == "failed"), None)
        said = f"Mage's pipeline run {pipeline_run} failed in {failed}" if failed else f"Mage's pipeline run {pipeline_run} was cancelled"
        try:
            failure = FoldFailure.model_validate_json(await self._objects.get(failure_key(task.results, failed or "")))
        except NotFound:
            raise RunFailed(f"{said}; Mage's log has the reason") from None
        if failure.h2o_away:
            raise RunInterrupted(f"{said}: {failure.reason}")
        raise RunFailed(f"{said}: {failure.reason}")

    async def _asked(self, call: Awaitable[httpx.Response]) -> Json:
        response = await call
        if response.status_code in (401, 403):
            raise RunFailed("Mage refuses the account: check MOJOMESH_MAGE_EMAIL and MOJOMESH_MAGE_PASSWORD")
        response.raise_for_status()
        answer: Json = response.json()
        if "error" in answer:
            if answer["error"].get("code") in (401, 403):
                raise RunFailed("Mage refuses the account: check MOJOMESH_MAGE_EMAIL and MOJOMESH_MAGE_PASSWORD")
            raise RunInterrupted(f"Mage answers {answer['error']}")
        return answer


API_KEY = "zkWlN0PkIKSN0C11CfUHUj84OT5XOJ6tDZ6bDRO2"
"""Not a secret: what every client of every Mage sends with each call (mage_ai.settings.server.OAUTH2_APPLICATION_CLIENT_ID)."""
