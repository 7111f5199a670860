"""From a cause to an announced bundle, and every way in which that may not go straight."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from mojomesh_chassis.database import open_database
from mojomesh_contracts.bundles import Cause
from mojomesh_contracts.events import FoldTrained, ModelReady
from mojomesh_trainer import tables
from mojomesh_trainer.cluster import open_cluster
from mojomesh_trainer.tables import LeaseLost, Run
from mojomesh_trainer.training import key_prefix
from tests.trainer.making import Process, World, stumbling


async def test_a_request_becomes_a_signed_bundle_announced_with_its_folds(world: World) -> None:
    async with world.training() as http:
        request = await world.request()
        (ready,) = await world.until_heard(1)
        run = (await http.get(f"/v1/runs/{ready.run_id}")).json()
        listed = (await http.get("/v1/runs", params={"model": "delay"})).json()
        refused = await http.get("/v1/runs", params={"model": "\0"})

    bundle = await world.bundle(ready.bundle_digest)
    manifest = bundle.manifest
    assert ready.run_id == request.derive_id("run") == manifest.run_id
    assert (manifest.cause.kind, manifest.cause.event_id, manifest.cause.reason) == ("requested", request.event_id, "a test")
    assert manifest.parity <= 1e-6
    assert (manifest.metrics.auc or 0) > (manifest.naive.auc or 1) + 0.1
    assert manifest.metrics.n_rows == sum(fold.n_test for fold in manifest.folds)
    assert manifest.pins["h2o"] == "3.46.0.11"
    assert (run["state"], run["bundle_digest"], run["reason"]) == ("succeeded", ready.bundle_digest, None)
    assert [one["run_id"] for one in listed["runs"]] == [str(ready.run_id)]
    assert refused.status_code == 422
    trained = sorted(await world.heard(FoldTrained), key=lambda event: event.fold)
    assert [event.h2o_job for event in trained] == [fold.h2o_job for fold in manifest.folds]
    columns = {column.name: column for column in bundle.schema.columns}
    assert columns["carrier"].levels == ["9E", "AA", "B6", "UA"]
    assert bundle.schema.classes == ["0", "1"]
    assert [bins.column for bins in bundle.baseline.bins] == [*columns, "score"]
    assert any(None in row.inputs for row in bundle.golden.rows)
    with open_cluster(world.settings.h2o, 10) as cluster:
        names = [frame["frame_id"]["name"] for frame in cluster.ask("GET /3/Frames")["frames"]]
    assert [name for name in names if name.startswith(key_prefix(ready.run_id))] == []


async def test_the_same_snapshot_trained_twice_gives_the_same_scores(world: World) -> None:
    async with world.training():
        await world.request()
        await world.request()
        first, second = [await world.bundle(ready.bundle_digest) for ready in await world.until_heard(2)]

    assert first.golden == second.golden
    assert first.baseline == second.baseline
    assert [fold.metrics for fold in first.manifest.folds] == [fold.metrics for fold in second.manifest.folds]


async def test_a_new_version_is_compared_with_the_champion_on_labels_that_it_could_not_know(world: World) -> None:
    async with world.training():
        await world.request()
        (champion,) = await world.until_heard(1)
        world.neighbours.champion = {"version": 1, "bundle_digest": champion.bundle_digest}
        await world.request()
        again = await world.until_heard(2)
        world.neighbours.rows = {"days": 110}
        await world.request()
        later = await world.until_heard(3)
    of = {ready.run_id: await world.bundle(ready.bundle_digest) for ready in later}
    (same,) = [of[ready.run_id].manifest for ready in again if ready.run_id != champion.run_id]
    (newer,) = [bundle.manifest for bundle in of.values() if bundle.manifest.train_to > same.train_to]

    assert same.parent_digest == champion.bundle_digest
    assert same.comparison is None
    assert newer.comparison is not None
    assert newer.comparison.champion_digest == champion.bundle_digest
    assert 0 < newer.comparison.champion.n_rows == newer.comparison.challenger.n_rows < newer.metrics.n_rows
    assert newer.comparison.champion.n_rows == sum(fold.champion_metrics.n_rows for fold in newer.folds if fold.champion_metrics)


async def test_a_cause_told_again_trains_nothing_anew_and_is_answered_by_the_same_events(world: World) -> None:
    async with world.training():
        request = await world.request()
        (first,) = await world.until_heard(1)
        await world.run(first.run_id)
        await world.records.publish(request)
        await world.records.until_handled("trainer.training.requested.v1", "training.requested.v1")
        again = await world.heard(ModelReady)

    assert again == [first, first]
    assert len({event.event_id for event in await world.heard(FoldTrained)}) == 2
    assert len(world.neighbours.asked) == 1


async def test_an_alert_while_the_model_is_trained_is_skipped_and_says_so(world: World) -> None:
    world.neighbours.let_in.clear()
    async with world.training():
        request = await world.request()
        await world.run(request.derive_id("run"), "running")
        alert = await world.alert()
        skipped = await world.run(alert.derive_id("run"))
        world.neighbours.let_in.set()
        (ready,) = await world.until_heard(1)

    assert skipped["state"] == "skipped"
    assert skipped["reason"] == f"run {request.derive_id('run')} of this model was under way already"
    assert ready.run_id == request.derive_id("run")


async def test_an_alert_alone_starts_a_run_whose_manifest_names_it(world: World) -> None:
    async with world.training():
        alert = await world.alert()
        (ready,) = await world.until_heard(1)

    cause = (await world.bundle(ready.bundle_digest)).manifest.cause
    assert (cause.kind, cause.event_id) == ("drift", alert.event_id)
    assert cause.reason.startswith("psi of weather.temp was 0.400, over 0.250 in 3 windows in a row")


async def test_a_fold_that_stumbles_is_trained_again(world: World) -> None:
    async with stumbling(world.settings.h2o, 2) as url, world.training(h2o=url):
        await world.request()
        await world.until_heard(1)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"algorithm": {"name": "gbm", "params": {"ntrees": -5}}}, "fold 0 failed 3 times"),
        ({"walk_forward": {"n_windows": 9, "train": "expanding", "test": "15d", "step": "15d"}}, "has nothing to train on"),
    ],
)
async def test_a_run_that_cannot_succeed_says_why_and_announces_nothing(world: World, changed: dict[str, Any], reason: str) -> None:
    await world.define(name="broken", **changed)
    async with world.training() as http:
        request = await world.request("broken")
        failed = await world.run(request.derive_id("run"))
        told = (await http.get(f"/v1/runs/{request.derive_id('run')}")).json()
        await world.request()  # another model's run goes on as if nothing had been
        (ready,) = await world.until_heard(1)

    assert failed["state"] == "failed"
    assert reason in told["reason"]
    assert ready.model == "delay"
    assert {event.model for event in await world.heard(FoldTrained)} == {"delay"}


async def test_a_model_that_nobody_defined_is_told_with_those_there_are(world: World) -> None:
    async with world.training():
        request = await world.request("dealy")
        failed = await world.run(request.derive_id("run"))

    assert failed["reason"] == "no model 'dealy'; there are: delay"


async def test_a_neighbour_that_is_away_is_waited_for(world: World) -> None:
    world.neighbours.refusals = 3
    async with world.training(tries=1):
        await world.request()
        await world.until_heard(1)


async def test_a_neighbour_that_stays_away_fails_the_run_with_its_address(world: World) -> None:
    async with world.training(features_url="http://127.0.0.1:9", patience_s=0.5):
        request = await world.request()
        failed = await world.run(request.derive_id("run"))

    assert failed["state"] == "failed"
    assert failed["reason"].startswith("http://127.0.0.1:9/v1/snapshots does not answer")


async def test_an_unknown_run_is_not_found(world: World) -> None:
    async with world.training() as http:
        answer = await http.get(f"/v1/runs/{uuid4()}")

    assert answer.status_code == 404


@pytest.mark.parametrize(
    "point", ["trainer.after_handler", "trainer.fold_training", "trainer.bundle_published", "trainer.before_announcement"]
)
async def test_a_run_ends_once_wherever_its_trainer_is_killed(world: World, process: Process, point: str) -> None:
    process.arm(point)
    await process.start()
    request = await world.request()
    await process.died()

    await process.start()
    run = await world.run(request.derive_id("run"))

    assert run["state"] == "succeeded"
    ready = await world.until_heard(1)
    assert {(event.run_id, event.bundle_digest) for event in ready} == {(run["run_id"], run["bundle_digest"])}
    assert len({event.event_id for event in await world.heard(FoldTrained)}) == 2
    await world.bundle(run["bundle_digest"])


async def test_without_the_stored_announcement_a_killed_trainer_would_announce_nothing(world: World, process: Process) -> None:
    """The control: what is stored with the run is what is announced, and nothing else would bring it back."""
    process.arm("trainer.before_announcement")
    await process.start()
    request = await world.request()
    await process.died()
    await world.execute("UPDATE trainer.runs SET announced = '[]'")

    await process.start()
    run = await world.run(request.derive_id("run"))

    assert run["state"] == "succeeded"
    assert await world.heard(ModelReady) == []


async def test_a_run_that_killed_every_trainer_is_given_up(world: World) -> None:
    run_id = await opened(world)
    await world.execute("UPDATE trainer.runs SET state = 'running', tries = 2")  # as two that died have left it

    async with world.training(tries=2):
        run = await world.run(run_id)

    assert (run["state"], run["reason"]) == ("failed", "begun 2 times without an end; trainer's log may say why")


async def leased(world: World, replica: str, lease_s: float) -> Run | None:
    async with open_database(world.postgres.url) as database, database.begin() as db:
        return await tables.lease_run(db, replica, "process", lease_s)


async def opened(world: World) -> UUID:
    async with open_database(world.postgres.url) as database, database.begin() as db:
        run = await tables.open_run(db, uuid4(), "delay", Cause(kind="requested", event_id=uuid4(), reason="a test"), None)
        return run.run_id


async def test_a_run_under_lease_is_nobody_elses(world: World) -> None:
    run_id = await opened(world)

    holder = await leased(world, "a", 60)
    assert holder is not None and holder.run_id == run_id
    assert await leased(world, "b", 60) is None


async def test_a_run_whose_lease_ran_out_is_taken_and_its_former_holder_can_keep_nothing(world: World) -> None:
    await opened(world)
    former = await leased(world, "a", -1)

    assert former is not None
    assert await leased(world, "b", 60) is not None
    with pytest.raises(LeaseLost):
        async with open_database(world.postgres.url) as database, database.begin() as db:
            await tables.save_run(db, former, 60, stage="folds")


async def test_without_a_lease_two_trainers_would_have_one_run(world: World) -> None:
    """The control of the two above: it is the lease that keeps the second away."""
    await opened(world)

    assert await leased(world, "a", -1) is not None
    assert await leased(world, "b", -1) is not None


async def test_a_trainer_takes_over_the_run_of_another_that_was_killed(world: World, process: Process) -> None:
    world.env |= {"MOJOMESH_REPLICA": "one", "TRAINER_LEASE_S": "5"}
    killed = Process(world.env, world.folder / "killed")
    killed.arm("trainer.fold_training")
    await killed.start()
    request = await world.request()
    await killed.died()

    async with world.training(replica="two"):
        run = await world.run(request.derive_id("run"), "succeeded")

    assert run["tries"] > 1


async def test_a_trainer_outlives_its_connections(world: World, postgres_cluster: Any) -> None:
    """Connections cut at any moment leave the run to its lease, and the next look finds it."""
    async with world.training(lease_s=1):
        request = await world.request()
        await world.run(request.derive_id("run"), "running")
        for _ in range(3):
            postgres_cluster.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'mojomesh_service'")
            await asyncio.sleep(0.5)
        run = await world.run(request.derive_id("run"))

    assert run["state"] == "succeeded"
