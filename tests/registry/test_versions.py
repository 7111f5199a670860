import asyncio
import shutil
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from mojomesh_chassis.bundles import digest_of, publish_bundle, sign_bundle
from mojomesh_chassis.database import open_database
from mojomesh_chassis.errors import TransientError
from mojomesh_chassis.objects import open_objects
from mojomesh_contracts.bundles import BASELINE_FILE, MOJO_FILE, BundleSchema, Column
from mojomesh_contracts.events import FoldTrained, Metrics, ModelDeployed, ModelPromoted, ModelReady, SwapPhase
from mojomesh_registry.errors import ChampionChanged
from mojomesh_registry.versions import Cause, announce_champion, promote, registered_model, version_of


async def test_the_first_version_that_meets_the_minimum_is_promoted(loop: Any) -> None:
    ready = await loop.offer(loop.make_bundle(auc=0.7))

    version = await loop.version(1)

    (promoted,) = await loop.heard(ModelPromoted, 1)
    assert version["state"] == "champion"
    assert version["reasons"] == []
    assert (promoted.version, promoted.promotion, promoted.bundle_digest) == (1, 1, ready.bundle_digest)
    assert (promoted.cause, promoted.caused_by) == ("gate", ready.event_id)
    assert (await loop.model())["champion"] == {"version": 1, "bundle_digest": ready.bundle_digest, "promotion": 1}


async def test_a_model_without_versions_has_no_champion(loop: Any) -> None:
    model = await loop.model()
    assert model["champion"] is None
    assert model["versions"] == []
    assert model["definition"]["gate"]["min"] == 0.6
    assert (await loop.http.get("/v1/models")).json()["models"] == [
        {"model": "delay", "definition_version": 1, "champion": None, "n_versions": 0}
    ]


async def test_a_version_below_the_minimum_is_kept_with_the_reason(loop: Any) -> None:
    await loop.offer(loop.make_bundle(auc=0.55))

    version = await loop.version(1)

    assert version["state"] == "rejected"
    assert version["reasons"] == ["auc 0.5500 is below the gate's minimum 0.6"]
    assert (await loop.model())["champion"] is None


async def test_a_better_version_replaces_the_champion_and_a_worse_does_not(loop: Any) -> None:
    await loop.offer(loop.make_bundle(auc=0.65))
    first = (await loop.version(1)) and (await loop.model())["champion"]
    await loop.offer(loop.make_bundle(auc=0.60, against=first, champion_auc=0.65))
    await loop.offer(loop.make_bundle(auc=0.70, against=first, champion_auc=0.65))

    worse, better = await loop.version(2), await loop.version(3)

    assert (worse["state"], worse["judged_against"]) == ("rejected", 1)
    assert "a gain of -0.0500" in worse["reasons"][0]
    assert better["state"] == "champion"
    assert (await loop.version(1))["state"] == "retired"
    assert [(event.version, event.promotion) for event in await loop.heard(ModelPromoted, 2)] == [(1, 1), (3, 2)]


async def test_a_comparison_with_a_former_champion_is_refused(loop: Any) -> None:
    await loop.offer(loop.make_bundle())
    first = (await loop.version(1)) and (await loop.model())["champion"]
    await loop.offer(loop.make_bundle(against=first))
    await loop.offer(loop.make_bundle(auc=0.8, against=first))

    assert (await loop.version(2))["state"] == "champion"
    assert "compared with version 1, and version 2 has become the champion meanwhile" in (await loop.version(3))["reasons"][0]


async def test_a_bundle_announced_twice_is_one_version_and_its_promotion_is_announced_again(loop: Any) -> None:
    ready = await loop.offer(loop.make_bundle())
    await loop.publish(ready, ready.model_copy(update={"event_id": uuid4()}))

    again = await loop.heard(ModelPromoted, 3)

    assert len({event.event_id for event in again}) == 1
    assert [version["version"] for version in (await loop.model())["versions"]] == [1]


async def test_a_former_champion_announced_again_does_not_become_the_last_word_of_the_topic(loop: Any) -> None:
    """models.promoted is compacted: a replica that starts later would serve what the last record names."""
    first = await loop.offer(loop.make_bundle())
    champion = (await loop.version(1)) and (await loop.model())["champion"]
    await loop.offer(loop.make_bundle(against=champion))
    await loop.version(2)

    await loop.publish(first)
    second = await loop.offer(loop.make_bundle())  # barrier: of the same key, so handled after the repeat
    await loop.version(3)
    await loop.post("/v1/models/delay/versions/3:promote", force=True, reason="a barrier")

    assert [event.promotion for event in await loop.heard(ModelPromoted, 3)] == [1, 2, 3]
    assert second.bundle_digest != first.bundle_digest


async def refused(loop: Any, event: ModelReady) -> str:
    """The reason on the dead-letter topic; and that the next good bundle is handled all the same, as version 1."""
    await loop.publish(event)
    good = await loop.offer(loop.make_bundle())
    assert (await loop.version(1))["bundle_digest"] == good.bundle_digest
    (record,) = await loop.dead_letters(ModelReady, 1)
    assert ModelReady.model_validate_json(record.value) == event
    reason: bytes = dict(record.headers)["mojomesh-reason"]
    return reason.decode()


def ready(digest: str, model: str = "delay") -> ModelReady:
    return ModelReady(event_id=uuid4(), model=model, run_id=uuid4(), bundle_digest=digest)


async def test_a_bundle_changed_in_the_store_is_refused(loop: Any) -> None:
    folder = loop.make_bundle()
    digest = await publish_bundle(open_objects(loop.settings.objects), folder)
    await open_objects(loop.settings.objects).put(f"bundles/{digest}/{BASELINE_FILE}", b'{"window": 1, "bins": []}')

    assert "the object store holds another bundle under" in await refused(loop, ready(digest))


async def test_a_bundle_changed_after_signing_is_refused_under_its_new_digest(loop: Any) -> None:
    folder = loop.make_bundle()
    (folder / BASELINE_FILE).write_text('{"window": 1, "bins": []}')
    digest = await publish_bundle(open_objects(loop.settings.objects), folder)

    assert digest == digest_of(folder)
    assert "the signature does not hold" in await refused(loop, ready(digest))


async def test_a_bundle_signed_by_somebody_else_is_refused(loop: Any, other_keys: tuple[Path, Path]) -> None:
    folder = loop.make_bundle()
    sign_bundle(folder, other_keys[0])
    digest = await publish_bundle(open_objects(loop.settings.objects), folder)

    assert "the signature does not hold" in await refused(loop, ready(digest))


async def test_an_archive_that_is_no_mojo_is_refused_although_it_is_signed(loop: Any) -> None:
    folder = loop.make_bundle()
    (folder / MOJO_FILE).write_bytes(b"public class Model {}")
    sign_bundle(folder, loop.private_key)
    digest = await publish_bundle(open_objects(loop.settings.objects), folder)

    assert "is not a MOJO" in await refused(loop, ready(digest))


async def test_a_bundle_of_another_model_is_refused(loop: Any) -> None:
    digest = await publish_bundle(open_objects(loop.settings.objects), loop.make_bundle())
    assert "is of the model 'delay', it was offered as 'fraud'" in await refused(loop, ready(digest, model="fraud"))


async def test_a_bundle_that_nobody_stored_is_refused(loop: Any) -> None:
    assert "no object" in await refused(loop, ready("0" * 64))


async def test_a_bundle_that_the_feature_sets_cannot_feed_is_rejected_and_cannot_be_forced(loop: Any) -> None:
    columns = [Column(name="tail", feature_set="flights", feature="tail", type="category")]
    await loop.offer(loop.make_bundle(schema=BundleSchema(columns=columns, label="late", classes=["0", "1"])))

    version = await loop.version(1)
    answer = await loop.post("/v1/models/delay/versions/1:promote", force=True, reason="I insist")

    assert version["reasons"] == ["column 'tail' needs 'tail', which is not a feature of 'flights'"]
    assert answer.status_code == 409
    assert "cannot be served" in answer.json()["error"]["message"]


async def test_a_model_that_is_not_defined_is_rejected_and_kept(bench: Any) -> None:
    await bench.offer(bench.make_bundle())
    assert "is not defined here" in (await bench.version(1))["reasons"][0]


async def test_a_rejected_version_is_promoted_by_hand_only_by_force_and_with_a_reason(loop: Any) -> None:
    await loop.offer(loop.make_bundle(auc=0.5))
    await loop.version(1)
    promote = "/v1/models/delay/versions/1:promote"

    plain, without_reason = await loop.post(promote), await loop.post(promote, force=True)
    forced = await loop.post(promote, force=True, reason="the label was wrong")

    assert plain.status_code == 409
    assert "below the gate's minimum" in plain.json()["error"]["message"]
    assert without_reason.status_code == 422
    assert forced.json() == {"model": "delay", "version": 1, "promotion": 1}
    (recorded,) = (await loop.version(1))["promotions"]
    assert (recorded["cause"], recorded["forced"], recorded["reason"]) == ("hand", True, "the label was wrong")
    assert [event.cause for event in await loop.heard(ModelPromoted, 1)] == ["hand"]


async def three_versions(loop: Any) -> None:
    """Versions 1 to 3, each the champion after the one before."""
    for number in (1, 2, 3):
        await loop.offer(loop.make_bundle(against=(await loop.model())["champion"]))
        assert (await loop.version(number))["state"] == "champion"


async def test_of_promotions_at_once_by_people_who_saw_the_same_champion_one_wins(loop: Any) -> None:
    await three_versions(loop)

    answers = await asyncio.gather(
        *(loop.post(f"/v1/models/delay/versions/{version}:promote", expected_promotion=3) for version in (1, 2, 1, 2))
    )

    (winner,) = (answer.json() for answer in answers if answer.status_code == 200)
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    assert (await loop.model())["champion"]["version"] == winner["version"]
    assert [event.promotion for event in await loop.heard(ModelPromoted, 4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("looks_again", [False, True])
async def test_of_two_transactions_that_read_the_same_champion_the_second_fails_unless_it_looks_again(loop: Any, looks_again: bool) -> None:
    """The compare-and-set itself, and its control: with the number read anew it is no longer in the way."""
    await three_versions(loop)
    cause = Cause("hand", uuid4(), datetime.now(UTC))
    async with open_database(loop.settings.postgres_urls[0]) as database:
        async with database.begin() as db:
            seen = await registered_model(db, "delay")
        async with database.begin() as db:
            await promote(db, await registered_model(db, "delay"), await version_of(db, "delay", 1), cause)

        with nullcontext() if looks_again else pytest.raises(ChampionChanged):
            async with database.begin() as db:
                await promote(db, await registered_model(db, "delay") if looks_again else seen, await version_of(db, "delay", 2), cause)

    assert (await loop.model())["champion"]["version"] == (2 if looks_again else 1)


async def test_a_promotion_by_who_saw_a_former_champion_is_refused(loop: Any) -> None:
    await three_versions(loop)

    answer = await loop.post("/v1/models/delay/versions/1:promote", expected_promotion=2)

    assert answer.status_code == 409
    assert "meanwhile promotion 3 made version 3 the champion" in answer.json()["error"]["message"]


async def test_promoting_the_champion_changes_nothing_and_announces_it_again(loop: Any) -> None:
    await loop.offer(loop.make_bundle())
    await loop.version(1)

    answer = await loop.post("/v1/models/delay/versions/1:promote")

    assert answer.json() == {"model": "delay", "version": 1, "promotion": 1}
    assert len({event.event_id for event in await loop.heard(ModelPromoted, 2)}) == 1


async def test_while_a_champion_is_announced_again_nobody_is_promoted(loop: Any) -> None:
    """Else the older promotion could be committed, and sent, after the newer one."""
    await three_versions(loop)
    async with open_database(loop.settings.postgres_urls[0]) as database, database.begin() as announcing:
        await announce_champion(announcing, await registered_model(announcing, "delay"))

        with pytest.raises(TransientError, match="a lock was not to be had"):
            async with database.begin() as db:
                await db.execute(text("SET LOCAL lock_timeout = '50ms'"))
                await registered_model(db, "delay")


async def test_rollback_returns_step_by_step_and_ends_at_the_first_version(loop: Any) -> None:
    await three_versions(loop)

    steps = [(await loop.post("/v1/models/delay:rollback", reason="worse live")) for _ in range(3)]

    assert [step.json().get("version") for step in steps] == [2, 1, None]
    assert steps[2].status_code == 409
    assert "nothing to roll 'delay' back to" in steps[2].json()["error"]["message"]
    told = [(event.version, event.promotion, event.cause) for event in await loop.heard(ModelPromoted, 5)]
    assert told[3:] == [(2, 4, "rollback"), (1, 5, "rollback")]


async def test_rollback_before_any_training_says_what_to_do(loop: Any) -> None:
    answer = await loop.post("/v1/models/delay:rollback")
    assert answer.status_code == 404
    assert "train it first" in answer.json()["error"]["message"]


async def test_the_lineage_of_a_version_names_its_cause_folds_jobs_and_deployments(loop: Any) -> None:
    ready = await loop.offer(loop.make_bundle())
    version = await loop.version(1)
    start = loop.start
    folds = [
        FoldTrained(
            event_id=uuid4(),
            run_id=ready.run_id,
            model="delay",
            fold=number,
            train_from=start,
            train_to=start + timedelta(days=60),
            test_from=start + timedelta(days=60),
            test_to=start + timedelta(days=75),
            n_train=1000,
            n_test=100,
            metrics=Metrics(n_rows=100, auc=0.7),
            h2o_job=f"$job_{number}_{attempt}",
            block_run=f"{number}{attempt}",
            seconds=1.5,
        )
        for number, attempt in ((0, 1), (1, 1), (1, 2))
    ]
    swap = ModelDeployed(
        event_id=uuid4(),
        model="delay",
        version=1,
        previous_version=None,
        bundle_digest=ready.bundle_digest,
        replica="0",
        succeeded=True,
        switched_at=start,
        phases=[SwapPhase(name="load", seconds=0.2)],
        workers=2,
        in_flight_at_switch=3,
        drained=True,
        failed_requests=0,
        golden_rows=1,
        max_golden_difference=0.0,
    )

    await loop.publish(*folds, *folds[:1], swap, swap)

    while len((lineage := await loop.version(1))["folds"]) < 2 or not lineage["deployments"] or lineage["folds"][1]["block_run"] != "12":
        await asyncio.sleep(0.02)
    assert [fold["h2o_job"] for fold in lineage["folds"]] == ["$job_0_1", "$job_1_2"]
    assert [one["event_id"] for one in lineage["deployments"]] == [str(swap.event_id)]
    assert lineage["cause"]["reason"] == "a test"
    assert lineage["run_id"] == str(ready.run_id) == version["manifest"]["run_id"]
    assert lineage["manifest"]["snapshot_digest"] == "0" * 64
    assert [promotion["caused_by"] for promotion in lineage["promotions"]] == [str(ready.event_id)]


async def test_an_unknown_version_names_those_there_are(loop: Any) -> None:
    await loop.offer(loop.make_bundle())
    await loop.version(1)
    answer = await loop.http.get("/v1/models/delay/versions/7")
    assert answer.status_code == 404
    assert "has no version 7; it has 1 to 1" in answer.json()["error"]["message"]


@pytest.mark.parametrize("missing", [BASELINE_FILE, MOJO_FILE])
async def test_a_bundle_of_which_a_file_is_gone_is_refused(loop: Any, missing: str) -> None:
    digest = await publish_bundle(open_objects(loop.settings.objects), loop.make_bundle())
    (Path(open_objects(loop.settings.objects).path_of(f"bundles/{digest}")) / missing).unlink()
    assert missing in await refused(loop, ready(digest))


async def test_registry_needs_no_state_of_its_own_on_disk(loop: Any, tmp_path: Path) -> None:
    await loop.offer(loop.make_bundle())
    await loop.version(1)
    shutil.rmtree(open_objects(loop.settings.objects).path_of("bundles"))
    assert (await loop.version(1))["state"] == "champion"
