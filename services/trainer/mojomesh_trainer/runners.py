"""Who trains the folds of a run: Mage, or this process. Both leave the same files beside the run."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol

import httpx

from mojomesh_chassis.faults import fault
from mojomesh_chassis.objects import Objects
from mojomesh_chassis.telemetry import log
from mojomesh_trainer.cluster import H2OFailed, H2OUnreachable
from mojomesh_trainer.errors import RunFailed, RunInterrupted
from mojomesh_trainer.training import TrainingTask, predictions_key, result_key, train_fold

FOLD_TRIES = 3
POLL_S = 0.25
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
                result, predictions = await asyncio.to_thread(train_fold, task, fold)
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


class MageRunner:
    """Mage's pipeline `walk_forward`, started by its API trigger: a dynamic block with one child a fold."""

    name: Literal["mage", "local"] = "mage"

    def __init__(self, url: str, email: str, password: str) -> None:
        self._url = url
        self._account = {"email": email, "password": password}

    async def train(self, task: TrainingTask, pipeline_run: str | None, keep: KeepPipelineRun) -> dict[int, str]:
        """See `FoldRunner`."""
        try:
            async with httpx.AsyncClient(base_url=self._url, timeout=30, trust_env=False) as http:
                await self._sign_in(http)
                if pipeline_run is None or (await self._state(http, pipeline_run)) in ("failed", "cancelled"):
                    pipeline_run = await self._trigger(http, task)
                    await keep(pipeline_run)
                while (state := await self._state(http, pipeline_run)) not in ("completed", "failed", "cancelled"):
                    if state == "running":
                        fault("trainer.fold_training")
                    await asyncio.sleep(POLL_S)
                blocks = await self._blocks(http, pipeline_run)
                if state != "completed":
                    raise RunFailed(f"Mage's pipeline run {pipeline_run} {state}: {await self._why(http, blocks)}")
                return {
                    int(name.rpartition("_")[2]): str(block["id"])
                    for block in blocks
                    if (name := block["block_uuid"]).startswith("train_fold:")
                }
        except httpx.HTTPError as error:
            raise RunInterrupted(f"Mage at {self._url} does not answer: {error!r}") from error

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
                json={"pipeline_run": {"variables": {"task": task.model_dump_json()}}},
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

    async def _why(self, http: httpx.AsyncClient, blocks: list[Json]) -> str:
        failed = next((block for block in blocks if block["status"] == "failed"), None)
        if failed is None:
            return "no block failed; Mage's log may say more"
        error = (failed.get("metrics") or {}).get("error") or {}
        return f"{failed['block_uuid']}: {error.get('error') or error.get('message') or error or 'see its log in Mage'}"

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
