"""Folds in a real Mage: what the manifest names can be asked for in Mage and in H2O."""

from typing import Any

import httpx
import pytest

from mojomesh_contracts.events import FoldTrained, ModelReady
from mojomesh_trainer.cluster import open_cluster
from mojomesh_trainer.runners import API_KEY
from tests.trainer.making import World

pytestmark = pytest.mark.mesh


@pytest.fixture
def in_mage(world: World, mage_env: dict[str, str]) -> World:
    world.env |= mage_env | {"TRAINER_FOLD_RUNNER": "mage"}
    return world


async def asked(mage_env: dict[str, str], path: str) -> Any:
    async with httpx.AsyncClient(base_url=mage_env["MOJOMESH_MAGE"], headers={"X-API-KEY": API_KEY}, trust_env=False) as http:
        account = {"email": mage_env["MOJOMESH_MAGE_EMAIL"], "password": mage_env["MOJOMESH_MAGE_PASSWORD"]}
        session = (await http.post("/api/sessions", json={"session": account})).json()["session"]
        http.cookies.set("oauth_token", session["token"])
        return (await http.get(path)).json()


async def test_mage_and_h2o_know_the_runs_and_jobs_that_the_manifest_names(in_mage: World, mage_env: dict[str, str]) -> None:
    async with in_mage.training():
        await in_mage.request()
        (ready,) = await in_mage.until_heard(1)

    manifest = (await in_mage.bundle(ready.bundle_digest)).manifest
    run = (await asked(mage_env, f"/api/pipeline_runs/{manifest.pipeline_run}"))["pipeline_run"]
    assert (manifest.fold_runner, run["pipeline_uuid"], run["status"]) == ("mage", "walk_forward", "completed")
    blocks = {str(block["id"]): block for block in run["block_runs"]}
    assert [blocks[fold.block_run or ""]["block_uuid"] for fold in manifest.folds] == ["train_fold:fold_0", "train_fold:fold_1"]
    assert all(blocks[fold.block_run or ""]["status"] == "completed" for fold in manifest.folds)
    with open_cluster(in_mage.settings.h2o, 10) as cluster:
        jobs = [cluster.job(fold.h2o_job) for fold in manifest.folds]
    assert [job["status"] for job in jobs] == ["DONE", "DONE"]
    assert len({job["key"]["name"] for job in jobs}) == 2
    assert {event.block_run for event in await in_mage.heard(FoldTrained)} == {fold.block_run for fold in manifest.folds}


async def test_a_fold_that_fails_in_mage_fails_the_run_in_h2os_words(in_mage: World) -> None:
    await in_mage.define(name="broken", algorithm={"name": "gbm", "params": {"ntrees": -5}})
    async with in_mage.training():
        request = await in_mage.request("broken")
        failed = await in_mage.run(request.derive_id("run"))

    assert failed["state"] == "failed"
    assert "failed in train_fold:fold_" in failed["reason"]
    assert "ntrees" in failed["reason"]
    assert await in_mage.heard(ModelReady) == []


async def test_a_pipeline_run_that_was_begun_is_waited_for_and_not_begun_again(in_mage: World, mage_env: dict[str, str]) -> None:
    """A trainer may die after it asked Mage and before it noted the answer."""
    async with in_mage.training():
        request = await in_mage.request()
        run = await in_mage.run(request.derive_id("run"), "succeeded")
        # As if trainer had died when its row did not name the pipeline run yet.
        await in_mage.execute("UPDATE trainer.runs SET state = 'waiting', pipeline_run = NULL, announced = '[]'")
        again = await in_mage.run(request.derive_id("run"), "succeeded")

    assert again["pipeline_run"] == run["pipeline_run"]
    runs = (await asked(mage_env, "/api/pipeline_runs?pipeline_uuid=walk_forward&_limit=50"))["pipeline_runs"]
    assert len([one for one in runs if one["variables"]["run_id"] == str(request.derive_id("run"))]) == 1
