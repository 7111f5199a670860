"""Worker processes come and go; what they promised stays."""

import asyncio
import signal
from uuid import uuid4

import httpx
import psutil
import pytest

from mojomesh_contracts.events import ScoreRequested
from tests.scorer.making import Registry, StartScorer, Trained, all_serving, read_predictions, under_load


async def test_a_worker_killed_under_load_is_replaced_with_its_models_loaded(
    start_scorer: StartScorer, registry: Registry, models: dict[str, Trained]
) -> None:
    trained = models["binomial"]
    await registry.promote("delay", 1, await registry.store(trained, "delay"))
    scorer = await start_scorer()
    before = await all_serving(scorer, 2)

    async with under_load(scorer, "delay", trained.rows) as load:
        await load.at_least(100)
        psutil.Process(before[0]).kill()
        while psutil.pid_exists(before[0]):
            await asyncio.sleep(0.01)
        after = await all_serving(scorer, 2)
        n_failed = len(load.failures)
        await load.at_least(100)

    # Only requests in flight on the dead worker's connections, one a client, may have failed; a client that retries sees none.
    assert n_failed <= 4
    assert len(load.failures) == n_failed
    assert before[1] in after and before[0] not in after
    assert all(abs(reply.score - trained.scores[reply.row][1]) <= 1e-6 for reply in load.replies)


@pytest.mark.parametrize("has_spare", [True, False])
async def test_a_killed_worker_is_replaced_by_the_spare_process_or_by_a_new_one(
    start_scorer: StartScorer, registry: Registry, models: dict[str, Trained], has_spare: bool
) -> None:
    """The control takes the spare away first."""
    await registry.promote("delay", 1, await registry.store(models["binomial"], "delay"))
    scorer = await start_scorer()
    before = await all_serving(scorer, 2)
    spare = await scorer.spare()
    if not has_spare:
        psutil.Process(spare).kill()

    psutil.Process(before[0]).kill()
    while before[0] in (after := await all_serving(scorer, 2)):
        await asyncio.sleep(0.01)

    assert spare not in before and before[1] in after
    assert (spare in after) == has_spare
    assert await scorer.spare(after=spare) not in after  # there is one again


async def test_without_the_supervisor_nobody_replaces_a_killed_worker(
    start_scorer: StartScorer, registry: Registry, models: dict[str, Trained]
) -> None:
    """The control of the test above: the supervisor stands still while the worker dies, and goes on afterwards."""
    await registry.promote("delay", 1, await registry.store(models["binomial"], "delay"))
    scorer = await start_scorer()
    before = await all_serving(scorer, 2)
    supervisor = psutil.Process(scorer.child.pid)

    supervisor.suspend()
    psutil.Process(before[0]).kill()
    await asyncio.sleep(3)
    assert [worker.pid for worker in scorer.workers()] == [before[1]]

    supervisor.resume()
    while before[0] in await all_serving(scorer, 2):  # until it has heard of the death
        await asyncio.sleep(0.01)


async def test_workers_die_with_a_killed_supervisor(start_scorer: StartScorer, registry: Registry, models: dict[str, Trained]) -> None:
    await registry.promote("delay", 1, await registry.store(models["binomial"], "delay"))
    scorer = await start_scorer()
    workers = [psutil.Process(pid) for pid in [*await all_serving(scorer, 2), await scorer.spare()]]

    psutil.Process(scorer.child.pid).kill()

    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        await asyncio.sleep(0.02)
    with pytest.raises(httpx.TransportError):
        await scorer.http.get("/v2/health/live")


async def test_a_second_scorer_on_the_same_ports_is_refused(start_scorer: StartScorer, registry: Registry) -> None:
    scorer = await start_scorer(SCORER_WORKERS="1")

    second = await asyncio.create_subprocess_exec(
        *scorer.child.command.argv, env={**scorer.child.command.env, "SCORER_ADMIN_PORT": "0"}, stderr=asyncio.subprocess.PIPE
    )
    _, complaint = await second.communicate()

    assert second.returncode != 0
    assert b"Address already in use" in complaint
    assert len(scorer.workers()) == 1


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
async def test_a_scorer_that_is_asked_to_stop_loses_no_receipt(
    start_scorer: StartScorer, registry: Registry, models: dict[str, Trained], kafka: str, stop: signal.Signals
) -> None:
    trained = models["binomial"]
    await registry.promote("delay", 1, await registry.store(trained, "delay"))
    scorer = await start_scorer()

    answers = [await scorer.score("delay", row) for row in trained.rows[:50]]
    psutil.Process(scorer.child.pid).send_signal(stop)
    while scorer.child.running:
        await asyncio.sleep(0.02)

    ids = {answer["prediction_id"] for answer in answers}
    await read_predictions(kafka, ids)


async def test_receipts_that_have_no_room_to_wait_are_dropped_and_counted(
    start_scorer: StartScorer, registry: Registry, models: dict[str, Trained]
) -> None:
    trained = models["binomial"]
    await registry.promote("delay", 1, await registry.store(trained, "delay"))
    scorer = await start_scorer(SCORER_WORKERS="1", SCORER_RECEIPTS_WAITING="0")

    for row in trained.rows[:20]:
        await scorer.score("delay", row)

    metrics = (await scorer.admin.get("/metrics")).text.splitlines()
    assert 'mojomesh_scorer_receipts_dropped_total{part="workers"} 20.0' in metrics


async def test_requests_on_kafka_go_on_when_a_worker_is_killed(
    start_scorer: StartScorer, registry: Registry, models: dict[str, Trained], kafka: str
) -> None:
    trained = models["binomial"]
    await registry.promote("delay", 1, await registry.store(trained, "delay"))
    scorer = await start_scorer()
    pids = await all_serving(scorer, 2)
    requests = [ScoreRequested(event_id=uuid4(), model="delay", entity_id=f"F{n}", values=trained.rows[n % 100]) for n in range(3000)]

    await registry.publisher.publish(requests[:1500])
    psutil.Process(pids[1]).kill()
    await registry.publisher.publish(requests[1500:])

    wanted = {str(request.derive_id("prediction")) for request in requests}
    known = await read_predictions(kafka, wanted)
    assert known.keys() == wanted


async def test_connections_are_shared_among_workers(start_scorer: StartScorer, registry: Registry, models: dict[str, Trained]) -> None:
    await registry.promote("delay", 1, await registry.store(models["binomial"], "delay"))
    scorer = await start_scorer()
    await all_serving(scorer, 2)

    connections = [await asyncio.open_connection("127.0.0.1", scorer.http_port) for _ in range(64)]
    for reader, writer in connections:  # an answer on each shows that it was accepted
        writer.write(b"GET /v2/health/live HTTP/1.1\r\nhost: scorer\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
    shares = [
        sum(open.status == psutil.CONN_ESTABLISHED and open.laddr.port == scorer.http_port for open in worker.net_connections("tcp"))
        for worker in scorer.workers()
    ]
    for _, writer in connections:
        writer.close()

    assert sum(shares) >= 64
    assert min(shares) >= 16


async def test_a_crash_of_java_is_the_end_of_one_worker_and_ready_is_what_serves(
    start_scorer: StartScorer, registry: Registry, models: dict[str, Trained]
) -> None:
    await registry.promote("delay", 1, await registry.store(models["binomial"], "delay"))
    scorer = await start_scorer()
    before = await all_serving(scorer, 2)

    psutil.Process(before[0]).send_signal(signal.SIGSEGV)
    while before[0] in (pids := await all_serving(scorer, 2)):
        await asyncio.sleep(0.01)
    assert before[1] in pids  # the other never noticed

    for worker in scorer.workers():
        worker.kill()
    while (await scorer.admin.get("/health/ready")).status_code == 200:
        await asyncio.sleep(0.005)
    assert "none of 2 workers is up" in (await scorer.admin.get("/health/ready")).text
    assert set(pids).isdisjoint(await all_serving(scorer, 2))
    assert (await scorer.admin.get("/health/ready")).status_code == 200
