"""The version that serves is exchanged under load, or stays when anything is wrong with the new one."""

import asyncio
import json
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import numpy as np
import pytest

from mojomesh_chassis.bundles import digest_of, publish_bundle, sign_bundle
from mojomesh_contracts.bundles import MOJO_FILE, Golden, GoldenRow
from mojomesh_contracts.events import ModelDeployed
from tests.scorer.making import (
    TOLERANCE,
    Keys,
    Load,
    Registry,
    Scorer,
    StartScorer,
    Trained,
    all_serving,
    make_keys,
    read_events,
    under_load,
    write_bundle,
)


async def deployed(kafka: str, n: int) -> list[ModelDeployed]:
    """The first `n` certificates."""
    return await read_events(kafka, ModelDeployed, n)


def wrong_scores(load: Load, by_version: dict[int, Trained]) -> list[object]:
    """Replies whose score is not that of the version they name."""
    return [reply for reply in load.replies if abs(reply.score - by_version[reply.version].scores[reply.row][1]) > TOLERANCE]


@pytest.fixture
def versions(models: dict[str, Trained]) -> dict[int, Trained]:
    """Two versions whose scores of the same row differ visibly."""
    versions = {1: models["binomial"], 2: models["reversed"]}
    differences = np.abs(np.array(versions[1].scores) - np.array(versions[2].scores))[: Load.ROWS, 1]
    assert np.median(differences) > 0.1
    return versions


async def test_a_swap_under_load_fails_no_request_and_each_reply_is_of_the_version_it_names(
    start_scorer: StartScorer, registry: Registry, kafka: str, versions: dict[int, Trained]
) -> None:
    digests = {version: await registry.store(trained, "delay") for version, trained in versions.items()}
    await registry.promote("delay", 1, digests[1])
    scorer = await start_scorer()

    async with under_load(scorer, "delay", versions[1].rows) as load:
        await load.at_least(200)
        await registry.promote("delay", 2, digests[2])
        first, second = await deployed(kafka, 2)
        n_at_certificate = load.begun
        await load.at_least(200)
        await registry.promote("delay", 1, digests[1])
        back = (await deployed(kafka, 3))[2]
        await load.at_least(200)

    assert load.failures == []
    assert wrong_scores(load, versions) == []
    assert {reply.version for reply in load.replies} == {1, 2}
    assert {reply.door for reply in load.replies if reply.version == 2} == {"http", "grpc"}
    assert len({reply.prediction_id for reply in load.replies}) == len(load.replies)
    # No reply to a request that began after the certificate comes from the version before it.
    later = [reply for reply in load.replies if n_at_certificate < reply.number <= n_at_certificate + 200]
    assert {reply.version for reply in later} == {2}
    assert (first.version, first.previous_version, first.succeeded) == (1, None, True)
    assert (second.version, second.previous_version, second.succeeded, second.reason) == (2, 1, True, None)
    assert (second.workers, second.drained, second.failed_requests, second.golden_rows) == (2, True, 0, 20)
    assert second.max_golden_difference <= TOLERANCE
    assert sorted(worker.slot for worker in second.per_worker) == [0, 1]
    assert all(worker.load_s > worker.commit_s > 0 for worker in second.per_worker)
    assert second.p99.before_ms is not None
    assert second.p99.during_ms is not None
    assert second.p99.after_ms is not None
    assert [phase.name for phase in second.phases] == ["fetch and verify", "probe", "load", "commit", "drain"]
    # The version before was kept warm, and needs no second probe.
    assert (back.version, back.previous_version) == (1, 2)
    assert [phase.name for phase in back.phases] == ["fetch and verify", "load", "commit", "drain"]


async def test_a_swap_that_is_none_is_seen_by_the_same_load(
    start_scorer: StartScorer, registry: Registry, kafka: str, versions: dict[int, Trained]
) -> None:
    """The control: workers that are exchanged by killing them fail requests, and a version taken for another is noticed."""
    await registry.promote("delay", 1, await registry.store(versions[1], "delay"))
    scorer = await start_scorer()

    async with under_load(scorer, "delay", versions[1].rows) as load:
        await load.at_least(200)
        for worker in scorer.workers():
            worker.kill()
        while not load.failures:
            await asyncio.sleep(0.01)

    assert wrong_scores(load, {1: versions[2]}) != []


async def test_a_stale_promotion_is_ignored_and_one_that_comes_again_has_the_same_certificate(
    start_scorer: StartScorer, registry: Registry, kafka: str, versions: dict[int, Trained]
) -> None:
    digests = {version: await registry.store(trained, "delay") for version, trained in versions.items()}
    scorer = await start_scorer()

    await registry.promote("delay", 2, digests[2], promotion=2)
    await registry.promote("delay", 1, digests[1], promotion=1)
    await registry.promote("delay", 2, digests[2], promotion=2)

    first, again = await deployed(kafka, 2)
    assert first == again
    assert (await scorer.score("delay", {}))["version"] == 2


async def test_reloading_by_hand_serves_what_is_named_or_what_was_promoted(
    start_scorer: StartScorer, registry: Registry, versions: dict[int, Trained]
) -> None:
    digests = {version: await registry.store(trained, "delay") for version, trained in versions.items()}
    await registry.promote("delay", 1, digests[1])
    scorer = await start_scorer()

    async def reload(**asked: object) -> httpx.Response:
        return await scorer.admin.post("/admin/reload-model", json={"model": "delay", **asked}, headers=scorer.authorized)

    named = await reload(version=2, bundle_digest=digests[2])
    assert (named.status_code, named.json()["version"], named.json()["previous_version"]) == (200, 2, 1)
    assert (await scorer.score("delay", {}))["version"] == 2

    assert (await reload()).json()["version"] == 1
    assert (await scorer.score("delay", {}))["version"] == 1

    missing = await reload(version=3, bundle_digest="0" * 64)
    assert (missing.status_code, missing.json()["succeeded"]) == (409, False)
    assert (await scorer.score("delay", {}))["version"] == 1


async def _tampered(registry: Registry, good: Path) -> str:
    """One byte of a file in the object store is another than when it was signed."""
    digest = await publish_bundle(registry.objects, good)
    mojo = bytearray(await registry.objects.get(f"bundles/{digest}/{MOJO_FILE}"))
    mojo[len(mojo) // 2] ^= 1
    await registry.objects.put(f"bundles/{digest}/{MOJO_FILE}", bytes(mojo))
    return digest


async def _wrong_key(registry: Registry, good: Path) -> str:
    """Signed, but by somebody else."""
    sign_bundle(good, make_keys(good.parent / uuid4().hex).private)
    return await publish_bundle(registry.objects, good)


async def _bomb(registry: Registry, good: Path) -> str:
    """Signed by the right key, and unpacks to a thousand times its size."""
    with zipfile.ZipFile(good / MOJO_FILE, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("trees/t99_000.bin", bytes(100 * 2**20))
    sign_bundle(good, registry.keys.private)
    return await publish_bundle(registry.objects, good)


async def _wrong_golden_rows(registry: Registry, good: Path) -> str:
    """Signed by the right key, but the MOJO does not score as it says."""
    rows = [GoldenRow(inputs=[None] * 6, scores=[0.5, 0.5])]
    (good / "golden.json").write_text(Golden(tolerance=TOLERANCE, rows=rows).model_dump_json())
    sign_bundle(good, registry.keys.private)
    return await publish_bundle(registry.objects, good)


async def _wrong_levels(registry: Registry, good: Path) -> str:
    """Signed by the right key, but two levels have changed places."""
    schema = json.loads((good / "schema.json").read_text())
    schema["columns"][0]["levels"].reverse()
    (good / "schema.json").write_text(json.dumps(schema))
    sign_bundle(good, registry.keys.private)
    return await publish_bundle(registry.objects, good)


async def _crashing(registry: Registry, good: Path) -> str:
    """Signed by the right key, and its trees lead genmodel out of its arrays."""
    broken = good / "broken.zip"
    with zipfile.ZipFile(good / MOJO_FILE) as old, zipfile.ZipFile(broken, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, content[: len(content) // 2] if entry.filename.endswith(".bin") else content)
    broken.replace(good / MOJO_FILE)
    sign_bundle(good, registry.keys.private)
    return await publish_bundle(registry.objects, good)


BAD: dict[str, tuple[Callable[[Registry, Path], Awaitable[str]], str]] = {
    "tampered": (_tampered, "its digest is"),
    "wrong key": (_wrong_key, "signature does not hold"),
    "bomb": (_bomb, "times its size"),
    "wrong golden rows": (_wrong_golden_rows, "golden rows: a score differs"),
    "wrong levels": (_wrong_levels, "other levels of 'carrier'"),
    "crashing": (_crashing, "probe ended"),
}


async def test_a_bad_bundle_leaves_the_old_version_serving(
    start_scorer: StartScorer, registry: Registry, kafka: str, versions: dict[int, Trained], keys: Keys, tmp_path: Path
) -> None:
    await registry.promote("delay", 1, await registry.store(versions[1], "delay"))
    scorer = await start_scorer()
    pids = set(await all_serving(scorer, 2))

    async with under_load(scorer, "delay", versions[1].rows) as load:
        for number, (make_bad, reason) in enumerate(BAD.values(), start=2):
            digest = await make_bad(registry, write_bundle(tmp_path / uuid4().hex, versions[2], "delay", keys))
            await registry.promote("delay", number, digest)
            certificate = (await deployed(kafka, number))[-1]
            assert not certificate.succeeded
            assert reason in (certificate.reason or "")
            assert certificate.previous_version == 1
        await registry.promote("delay", 20, await registry.store(versions[2], "another"))
        certificate = (await deployed(kafka, len(BAD) + 2))[-1]
        assert "the bundle is of model 'another'" in (certificate.reason or "")
        await load.at_least(50)

    assert load.failures == []
    assert {reply.version for reply in load.replies} == {1}
    assert wrong_scores(load, versions) == []
    assert set(await all_serving(scorer, 2)) == pids
    # The control: the same bundle, left as it was signed, is served.
    good = write_bundle(tmp_path / uuid4().hex, versions[2], "delay", keys)
    await registry.promote("delay", 21, await publish_bundle(registry.objects, good))
    certificate = (await deployed(kafka, len(BAD) + 3))[-1]
    assert (certificate.succeeded, certificate.bundle_digest) == (True, digest_of(good))
    assert (await scorer.score("delay", {}))["version"] == 21


async def test_the_spare_process_tries_each_version_first_and_is_thrown_away_if_it_fails(
    start_scorer: StartScorer, registry: Registry, kafka: str, versions: dict[int, Trained], keys: Keys, tmp_path: Path
) -> None:
    await registry.promote("delay", 1, await registry.store(versions[1], "delay"))
    scorer = await start_scorer()
    pids = set(await all_serving(scorer, 2))
    first = await scorer.spare()

    await registry.promote("delay", 2, await registry.store(versions[2], "delay"))
    assert (await deployed(kafka, 2))[-1].succeeded
    assert await scorer.spare() == first
    await registry.promote("delay", 3, await _crashing(registry, write_bundle(tmp_path / uuid4().hex, versions[1], "delay", keys)))
    assert not (await deployed(kafka, 3))[-1].succeeded

    assert await scorer.spare(after=first) not in {first, *pids}
    workers = (await scorer.admin.get("/admin/workers", headers=scorer.authorized)).json()
    assert {worker["pid"] for worker in workers} == pids
    assert [worker["serving"] for worker in workers] == [{"delay": 2}] * 2


@asynccontextmanager
async def _killed(scorer: Scorer) -> AsyncIterator[None]:
    yield
    while scorer.child.running:
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("guarded", [True, False])
async def test_a_scorer_killed_between_load_and_switch_comes_back_with_what_was_promoted(
    start_scorer: StartScorer, registry: Registry, kafka: str, versions: dict[int, Trained], tmp_path: Path, guarded: bool
) -> None:
    """The control does not let it die there, and sees the switch in the first process."""
    faults = tmp_path / "faults"
    faults.mkdir()
    digests = {version: await registry.store(trained, "delay") for version, trained in versions.items()}
    await registry.promote("delay", 1, digests[1])
    scorer = await start_scorer(MOJOMESH_FAULT=str(faults))
    workers = scorer.workers()
    if not guarded:
        await registry.promote("delay", 2, digests[2])
        await deployed(kafka, 2)
        assert (await scorer.score("delay", {}))["version"] == 2
        return

    async with _killed(scorer):
        (faults / "scorer.after_load").touch()
        await registry.promote("delay", 2, digests[2])

    while any(worker.is_running() and worker.status() != "zombie" for worker in workers):
        await asyncio.sleep(0.02)
    again = await start_scorer(MOJOMESH_FAULT=str(faults))
    answer = await again.score("delay", versions[2].rows[0])
    assert answer["version"] == 2
    assert abs(answer["score"] - versions[2].scores[0][1]) <= TOLERANCE
    assert [certificate.version for certificate in await deployed(kafka, 2)] == [1, 2]
