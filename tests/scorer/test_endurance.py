"""What must hold for longer than a moment: swaps, deaths and damage, again and again, under load at a fixed rate.

Each has a short form for every day; `make test-long` runs the long ones.
"""

import asyncio
import io
import json
import random
import stat
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from mojomesh_chassis.bundles import publish_bundle, sign_bundle
from mojomesh_contracts.bundles import GOLDEN_FILE, MANIFEST_FILE, MOJO_FILE, SCHEMA_FILE, SIGNATURE_FILE, SIGNED_FILES, Golden, GoldenRow
from mojomesh_contracts.events import ModelDeployed, ScoreRequested
from tests.scorer.making import (
    TOLERANCE,
    Keys,
    Registry,
    Scorer,
    StartScorer,
    Trained,
    all_serving,
    make_keys,
    read_predictions,
    records_of,
    write_bundle,
)
from tests.scorer.pacing import N_ROWS, Answered, Broken, paced

NOTICED_S = 0.1  # until when a client may not have heard that its connection ended
LONG = [pytest.mark.long, pytest.mark.timeout(1800)]


@asynccontextmanager
async def certificates_of(kafka: str) -> AsyncIterator[Callable[[int], Awaitable[ModelDeployed]]]:
    """Waits for the certificate of a version."""
    async with records_of(kafka, ModelDeployed.topic.name) as records:

        async def of(version: int) -> ModelDeployed:
            while True:
                certificate = ModelDeployed.model_validate_json((await records.getone()).value)
                if certificate.version == version:
                    return certificate

        yield of


async def exact_scores(scorer: Scorer, trained: Trained) -> list[float]:
    """What the serving version answers to each row, asked calmly: H2O's own scores, from here on to be met to the last bit."""
    scores: list[float] = [(await scorer.score("delay", row))["score"] for row in trained.rows[:N_ROWS]]
    assert all(abs(score - true[1]) <= TOLERANCE for score, true in zip(scores, trained.scores, strict=False))
    return scores


@pytest.mark.parametrize(("n_swaps", "rate"), [pytest.param(3, 100, id="short"), pytest.param(50, 1000, id="long", marks=LONG)])
async def test_swaps_under_load_fail_nothing_and_each_answer_is_of_one_version_to_the_last_bit(
    start_scorer: StartScorer, registry: Registry, kafka: str, models: dict[str, Trained], n_swaps: int, rate: int
) -> None:
    """Odd versions are one model, even ones the other, whose classes are exchanged; every swap verifies and loads anew."""
    trained = [models["reversed"], models["binomial"]]  # by version modulo 2
    digests = [await registry.store(each, "delay") for each in trained]
    await registry.promote("delay", 1, digests[1])
    scorer = await start_scorer()
    async with certificates_of(kafka) as certificate_of:
        odd = await exact_scores(scorer, trained[1])
        await registry.promote("delay", 2, digests[0])
        await certificate_of(2)
        scores = [await exact_scores(scorer, trained[0]), odd]

        async with paced(scorer, "delay", trained[0].rows, rate) as log:
            log.acknowledged = log.promoted = 2
            await log.at_least(rate)
            for version in range(3, 3 + n_swaps):
                log.promoted = version
                await registry.promote("delay", version, digests[version % 2])
                certificate = await certificate_of(version)
                log.acknowledged = version
                assert (certificate.succeeded, certificate.drained, certificate.failed_requests) == (True, True, 0), certificate
                await log.at_least(rate // 4)

    assert log.failed == []
    assert [answer for answer in log.answered if answer.score != scores[answer.version % 2][answer.row]] == []
    # Never the version before one that was acknowledged when the request began, nor one that was not promoted yet.
    assert [answer for answer in log.answered if not answer.acknowledged <= answer.version <= answer.promoted] == []
    assert {(answer.door, answer.version) for answer in log.answered} == {
        (door, 2 + n) for door in ("http", "grpc") for n in range(n_swaps + 1)
    }
    await check_receipts(kafka, log.answered)


async def check_receipts(kafka: str, answered: list[Answered]) -> None:
    """Each answer's receipt, found by its prediction id, names the same version and score."""
    by_id = {answer.prediction_id: answer for answer in answered}
    assert len(by_id) == len(answered)
    known = await read_predictions(kafka, by_id)
    assert [answer for id_, answer in by_id.items() if known[id_].scores[-1] != answer.score] == []


@dataclass(frozen=True)
class Kill:
    """A worker's end, and the clients' ports that were connected to the HTTP door of the others."""

    gone: float
    spared: set[int]

    def explains(self, broken: Broken) -> bool:
        """Whether the request was in flight on a connection of the worker that died."""
        return broken.began <= self.gone and broken.local_port not in self.spared


async def kill(scorer: Scorer, pid: int) -> Kill:
    spared = {
        connection.raddr.port
        for worker in scorer.workers()
        if worker.pid != pid
        for connection in worker.net_connections("tcp")
        if connection.laddr.port == scorer.http_port and connection.raddr
    }
    psutil.Process(pid).kill()
    while psutil.pid_exists(pid):  # its connections are open until the last thread is gone
        await asyncio.sleep(0.001)
    await asyncio.sleep(NOTICED_S)
    return Kill(time.monotonic(), spared)


@pytest.mark.parametrize(
    ("n_kills", "every_s", "rate"), [pytest.param(3, 1, 100, id="short"), pytest.param(24, 5, 1000, id="long", marks=LONG)]
)
async def test_workers_killed_again_and_again_break_only_what_was_in_flight_on_their_connections(
    start_scorer: StartScorer, registry: Registry, models: dict[str, Trained], kafka: str, n_kills: int, every_s: int, rate: int
) -> None:
    trained = models["binomial"]
    await registry.promote("delay", 1, await registry.store(trained, "delay"))
    scorer = await start_scorer()
    scores = await exact_scores(scorer, trained)
    await all_serving(scorer, 2)  # so that both have connections
    wanted: set[str] = set()

    async def request_over_kafka() -> None:
        requests = [ScoreRequested(event_id=uuid4(), model="delay", entity_id=f"F{n}", values=trained.rows[n]) for n in range(N_ROWS)]
        wanted.update(str(request.derive_id("prediction")) for request in requests)
        await registry.publisher.publish(requests)

    kills = []
    async with paced(scorer, "delay", trained.rows, rate, retrying=True) as log:
        await log.at_least(rate)
        for number in range(n_kills):
            due = time.monotonic() + every_s
            await request_over_kafka()
            kills.append(await kill(scorer, (await all_serving(scorer, 2))[number % 2]))
            await request_over_kafka()
            await all_serving(scorer, 2)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await log.at_least(rate)

    assert kills[0].spared
    assert log.failed == []
    assert [broken for broken in log.broken if not any(kill.explains(broken) for kill in kills)] == []
    assert [answer for answer in log.answered if answer.score != scores[answer.row]] == []
    assert (await read_predictions(kafka, wanted)).keys() >= wanted


async def test_without_a_keeper_clients_fail_though_they_ask_twice(
    start_scorer: StartScorer, registry: Registry, models: dict[str, Trained]
) -> None:
    """The control of the test above: the supervisor stands still while its workers die one after the other."""
    trained = models["binomial"]
    await registry.promote("delay", 1, await registry.store(trained, "delay"))
    scorer = await start_scorer()
    pids = await all_serving(scorer, 2)
    supervisor = psutil.Process(scorer.child.pid)

    async with paced(scorer, "delay", trained.rows, rate=50, retrying=True) as log:
        await log.at_least(50)
        supervisor.suspend()
        for pid in pids:
            psutil.Process(pid).kill()
        while {broken.door for broken in log.failed} != {"http", "grpc"}:
            await asyncio.sleep(0.01)
        supervisor.resume()


async def _changed_in_store(registry: Registry, good: Path, name: str, change: Callable[[bytes], bytes]) -> str:
    digest = await publish_bundle(registry.objects, good)
    content = await registry.objects.get(f"bundles/{digest}/{name}")
    await registry.objects.put(f"bundles/{digest}/{name}", change(content))
    return digest


async def _signed_again(registry: Registry, good: Path) -> str:
    sign_bundle(good, registry.keys.private)
    return await publish_bundle(registry.objects, good)


async def _flipped(registry: Registry, rng: random.Random, good: Path) -> str:
    """One bit of one file in the object store is another than when it was signed."""

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    return await _changed_in_store(registry, good, rng.choice(SIGNED_FILES), flip)


async def _cut(registry: Registry, rng: random.Random, good: Path) -> str:
    """One file in the object store, perhaps the signature, ends too early."""
    name = rng.choice([*SIGNED_FILES, SIGNATURE_FILE])
    return await _changed_in_store(registry, good, name, lambda content: content[: rng.randrange(len(content))])


async def _wrong_key(registry: Registry, rng: random.Random, good: Path) -> str:
    """Signed, but by somebody else."""
    sign_bundle(good, make_keys(good.parent / uuid4().hex).private)
    return await publish_bundle(registry.objects, good)


async def _other_signature(registry: Registry, rng: random.Random, good: Path) -> str:
    """Signed by the right key, but it is the signature of another bundle."""
    signature = (good / SIGNATURE_FILE).read_bytes()
    manifest = json.loads((good / MANIFEST_FILE).read_text())
    (good / MANIFEST_FILE).write_text(json.dumps(manifest | {"seed": rng.randrange(1000, 2000)}))
    (good / SIGNATURE_FILE).write_bytes(signature)
    return await publish_bundle(registry.objects, good)


async def _leading_out(registry: Registry, rng: random.Random, good: Path) -> str:
    """Signed by the right key; a file of the archive would be unpacked somewhere else."""
    name = rng.choice(["../../{}", "/tmp/{}", "trees/../../{}", "..\\{}"]).format(uuid4().hex)
    with zipfile.ZipFile(good / MOJO_FILE, "a", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo(rng.choice([name, "trees/link"]))
        if entry.filename == "trees/link":
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(entry, "/etc/hostname")
    return await _signed_again(registry, good)


async def _bomb(registry: Registry, rng: random.Random, good: Path) -> str:
    """Signed by the right key; unpacks to a multiple of its size, or says so, or has a file twice."""
    with zipfile.ZipFile(good / MOJO_FILE, "a", zipfile.ZIP_DEFLATED) as archive:
        if rng.random() < 0.5:
            archive.writestr("trees/t99_000.bin", bytes(rng.randrange(20, 200) * 2**20))
        else:
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr("model.ini", archive.read("model.ini"))
    return await _signed_again(registry, good)


async def _wrong_schema(registry: Registry, rng: random.Random, good: Path) -> str:
    """Signed by the right key, but the schema is of another model."""
    schema = json.loads((good / SCHEMA_FILE).read_text())
    columns = schema["columns"]
    match rng.randrange(5):
        case 0:
            columns[0]["levels"].reverse()
        case 1:
            columns.pop(rng.randrange(len(columns)))
        case 2:
            columns[rng.randrange(len(columns))]["name"] = "renamed"
        case 3:
            columns.reverse()
        case 4:
            schema["classes"].reverse()
    (good / SCHEMA_FILE).write_text(json.dumps(schema))
    return await _signed_again(registry, good)


async def _broken_trees(registry: Registry, rng: random.Random, good: Path) -> str:
    """Signed by the right key; every tree ends too early, which leads genmodel out of its arrays."""
    part = rng.uniform(0.1, 0.6)
    made = io.BytesIO()
    with zipfile.ZipFile(good / MOJO_FILE) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, content[: int(len(content) * part)] if entry.filename.endswith(".bin") else content)
    (good / MOJO_FILE).write_bytes(made.getvalue())
    return await _signed_again(registry, good)


async def _wrong_golden_rows(registry: Registry, rng: random.Random, good: Path) -> str:
    """Signed by the right key, but the MOJO does not score as it says."""
    late = rng.random()
    rows = [GoldenRow(inputs=[None] * 6, scores=[1 - late, late])]
    (good / GOLDEN_FILE).write_text(Golden(tolerance=TOLERANCE, rows=rows).model_dump_json())
    return await _signed_again(registry, good)


DAMAGES = [
    *(_flipped, _cut, _wrong_key, _other_signature, _leading_out, _bomb),
    *(_wrong_schema, _broken_trees, _wrong_golden_rows),
]


@pytest.mark.parametrize(("n_bundles", "rate"), [pytest.param(len(DAMAGES), 50, id="short"), pytest.param(200, 100, id="long", marks=LONG)])
async def test_no_damaged_bundle_is_admitted_and_the_old_version_serves_throughout(
    start_scorer: StartScorer,
    registry: Registry,
    kafka: str,
    models: dict[str, Trained],
    keys: Keys,
    tmp_path: Path,
    n_bundles: int,
    rate: int,
) -> None:
    await registry.promote("delay", 1, await registry.store(models["binomial"], "delay"))
    scorer = await start_scorer()
    scores = await exact_scores(scorer, models["binomial"])
    pids = set(await all_serving(scorer, 2))
    rng = random.Random(20130101)

    admitted = []
    async with certificates_of(kafka) as certificate_of, paced(scorer, "delay", models["binomial"].rows, rate) as log:
        for number in range(n_bundles):
            damage = DAMAGES[number % len(DAMAGES)]
            digest = await damage(registry, rng, write_bundle(tmp_path / uuid4().hex, models["reversed"], "delay", keys))
            await registry.promote("delay", 2 + number, digest)
            certificate = await certificate_of(2 + number)
            if certificate.succeeded or not certificate.reason or certificate.previous_version != 1:
                admitted.append((damage.__name__, certificate))
        await log.at_least(rate)

    assert admitted == []
    assert log.failed == []
    assert [answer for answer in log.answered if (answer.version, answer.score) != (1, scores[answer.row])] == []
    assert set(await all_serving(scorer, 2)) == pids


async def test_damage_that_verification_cannot_see_is_admitted(
    start_scorer: StartScorer, registry: Registry, kafka: str, models: dict[str, Trained], keys: Keys, tmp_path: Path
) -> None:
    """The control of the test above: the damage is done in good time, so that digest and signature are of what is damaged."""
    await registry.promote("delay", 1, await registry.store(models["binomial"], "delay"))
    await start_scorer()
    bundle = write_bundle(tmp_path / uuid4().hex, models["reversed"], "delay", keys)
    changed = (bundle / MANIFEST_FILE).read_bytes().replace(b'"seed":42', b'"seed":43')
    (bundle / MANIFEST_FILE).write_bytes(changed)

    async with certificates_of(kafka) as certificate_of:
        await registry.promote("delay", 2, await publish_bundle(registry.objects, bundle))
        assert not (await certificate_of(2)).succeeded
        sign_bundle(bundle, keys.private)
        await registry.promote("delay", 3, await publish_bundle(registry.objects, bundle))
        assert (await certificate_of(3)).succeeded
