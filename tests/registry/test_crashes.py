"""Killed at any point, registry loses nothing and doubles nothing; each promise with the guard that keeps it, and without."""

import signal
from typing import Any

import asyncpg
import httpx
import pytest

from mojomesh_contracts.events import ModelPromoted, TrainingRequested


async def execute(loop: Any, statement: str) -> None:
    connection = await asyncpg.connect(loop.settings.postgres)
    await connection.execute(statement)
    await connection.close()


async def killed_while_asked_to_train(killable: Any, process: Any) -> None:
    process.arm("registry.committed")
    with pytest.raises(httpx.TransportError):
        await killable.post("/v1/models/delay:train", reason="before the kill")
    assert await process.died() == -signal.SIGKILL


async def test_a_request_that_was_committed_is_published_after_a_kill(killable: Any, process: Any) -> None:
    await killed_while_asked_to_train(killable, process)

    await process.start()
    await killable.post("/v1/models/delay:train", reason="after it")

    assert [event.reason for event in await killable.heard(TrainingRequested, 2)] == ["before the kill", "after it"]


async def test_without_its_outbox_row_the_same_request_is_lost(killable: Any, process: Any) -> None:
    """The control: what the outbox keeps is what is published, and nothing else would bring it back."""
    await killed_while_asked_to_train(killable, process)
    await execute(killable, "DELETE FROM registry.outbox WHERE sent_at IS NULL")

    await process.start()
    await killable.post("/v1/models/delay:train", reason="after it")

    assert [event.reason for event in await killable.heard(TrainingRequested, 1)] == ["after it"]


@pytest.mark.parametrize("point", ["registry.registered", "registry.after_handler", "registry.after_publish", "registry.after_relay"])
async def test_a_bundle_becomes_one_version_and_one_promotion_wherever_the_kill_falls(killable: Any, process: Any, point: str) -> None:
    process.arm(point)
    ready = await killable.offer(killable.make_bundle())
    assert await process.died() == -signal.SIGKILL

    await process.start()
    next_bundle = await killable.offer(killable.make_bundle(against={"version": 1, "bundle_digest": ready.bundle_digest}))

    assert (await killable.version(2))["bundle_digest"] == next_bundle.bundle_digest
    model = await killable.model()
    assert [(one["version"], one["state"]) for one in model["versions"]] == [(2, "champion"), (1, "retired")]
    assert [one["promotion"] for one in model["promotions"]] == [1, 2]
    first, *others = await heard_until(killable, promotion=2)
    assert (first.promotion, first.caused_by) == (1, ready.event_id)
    # A repeat is the same event, so consumers know it; and it never comes after a later promotion.
    assert [event.promotion for event in (first, *others)] == sorted(event.promotion for event in (first, *others))
    assert len({event.event_id for event in (first, *others)}) == 2


async def heard_until(bench: Any, promotion: int) -> list[ModelPromoted]:
    count = 1
    while (heard := await bench.heard(ModelPromoted, count))[-1].promotion < promotion:
        count += 1
    return list(heard)
