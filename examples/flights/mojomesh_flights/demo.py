"""The demo from beginning to end: a mesh of its own, the year, the evidence, the page."""

import asyncio
import os
import platform
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from mojomesh_chassis.bundles import Bundle, fetch_bundle
from mojomesh_chassis.dead_letters import REASON
from mojomesh_chassis.objects import open_objects
from mojomesh_chassis.publishing import open_publisher
from mojomesh_chassis.settings import MeshSettings
from mojomesh_contracts.bundles import Manifest
from mojomesh_contracts.events import EventReceived
from mojomesh_flights import evidence as said
from mojomesh_flights import gathering
from mojomesh_flights.dataset import Year, read_year
from mojomesh_flights.errors import DemoFailed
from mojomesh_flights.gathering import Outcomes, Served
from mojomesh_flights.listening import Listener, Offsets
from mojomesh_flights.load import MODEL, Load, failures
from mojomesh_flights.mesh import Mesh
from mojomesh_flights.progress import Progress
from mojomesh_flights.replay import Plan, Replay
from mojomesh_flights.report import write_report
from mojomesh_local.stack import running_stack
from mojomesh_local.state import StateFolder
from mojomesh_trainer.metrics import auc

TOLERANCE = 1e-6
Result = TypeVar("Result")

SWAP_PATIENCE_S = 20.0
AFTER_SWAP_S = 3.0
LIVE_FLIGHTS = 20_000  # the last of which the AUC is shown while the replay runs
RECEIPTS_PATIENCE_S = 30.0


def run_demo(plan: Plan, reports: Path, state: Path, *, keep: bool) -> Path:
    """Run the demo in a mesh of its own; returns the page's path. `keep` leaves the state folder for `mojomesh up`.

    Raises:
        LocalError: The mesh could not be started.
        DemoFailed: It did not do what the demo waits for.
    """
    folder = StateFolder.at(state)
    if folder.is_up:
        raise DemoFailed(f"a mesh is up in {folder.path}; end it with `mojomesh down --state {state}`")
    shutil.rmtree(folder.path, ignore_errors=True)
    progress = Progress()
    try:
        with progress.shown():
            evidence = _in_own_mesh(plan, folder.path, progress)
    finally:
        if not keep:
            shutil.rmtree(folder.path, ignore_errors=True)
    seconds = progress.seconds
    phases = [said.PhaseTime(name=phase.name, seconds=phase.seconds or 0.0) for phase in progress.phases]
    return write_report(evidence.model_copy(update={"seconds": seconds, "phases": phases}), reports)


def _in_own_mesh(plan: Plan, folder: Path, progress: Progress) -> said.Evidence:
    with progress.phase("start servers and services"):
        stack = running_stack(folder)
        mesh = stack.__enter__()
    try:
        return asyncio.run(_told_and_judged(plan, settings_of(mesh.env), folder, progress))
    finally:
        with progress.phase("stop them"):
            stack.__exit__(None, None, None)


def settings_of(env: dict[str, str]) -> MeshSettings:
    """A mesh's variables as settings, without touching this process's environment."""
    known = {field.validation_alias for field in MeshSettings.model_fields.values()}
    return MeshSettings.model_validate({name: value for name, value in env.items() if name in known})


@dataclass
class Run:
    """What one run of the demo holds in its hands."""

    plan: Plan
    settings: MeshSettings
    year: Year
    listener: Listener
    offsets: Offsets
    mesh: Mesh
    replay: Replay
    load: Load
    progress: Progress


async def _told_and_judged(plan: Plan, settings: MeshSettings, folder: Path, progress: Progress) -> said.Evidence:
    with progress.phase("read the year"):
        year = await asyncio.to_thread(read_year, plan.until)
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(open_publisher(settings))
        offsets = await stack.enter_async_context(Offsets(settings.kafka))
        listener = Listener(settings.kafka, MODEL)
        mesh = await stack.enter_async_context(Mesh(settings, listener))
        replay = Replay(year, plan, publisher, listener, offsets)
        load = Load(settings.scorer_url, plan.load, replay.choose)
        run = Run(plan, settings, year, listener, offsets, mesh, replay, load, progress)
        progress.share, progress.numbers = lambda: replay.n_published / year.facts.num_rows, _Numbers(run)
        listening = asyncio.create_task(listener.run())
        try:
            await _while_well(listening, lambda: _replay(run))
            with progress.phase("check everything again"):
                return await _while_well(listening, lambda: _judge(run, folder))
        finally:
            listening.cancel()
            await asyncio.wait([listening])


async def _while_well(background: "asyncio.Task[None]", work: Callable[[], Awaitable[Result]]) -> Result:
    """Do `work`; if what it relies on ends before, raise why."""
    task = asyncio.ensure_future(work())
    await asyncio.wait([task, background], return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
        await asyncio.wait([task])
        background.result()
    return task.result()


async def _replay(run: Run) -> None:
    first = f"{run.plan.train_until:%-d %B}"
    await run.mesh.apply(drift=run.plan.drift)
    with run.progress.phase(f"tell the facts until {first}"):
        await run.replay.history()
    with run.progress.phase("train a first model"):
        await run.mesh.train(f"the demo asks for a first version, from the facts until {first}")
    with run.progress.phase("replay what followed, ask about every flight"):
        loading = asyncio.create_task(run.load.run())
        watching = [asyncio.create_task(_note_versions(run)), asyncio.create_task(_load_more_at_swaps(run))]
        try:
            await _while_well(loading, lambda: run.replay.live(run.mesh))
        finally:
            for task in (loading, *watching):
                task.cancel()
            await asyncio.wait([loading, *watching])


async def _note_versions(run: Run) -> None:
    """Tell the person watching about alerts and swaps as they happen."""
    n_alerts = n_swaps = 0
    while True:
        for alert in run.listener.alerts[n_alerts:]:
            drifted = f"{alert.feature} drifted, {alert.measure.upper()} {alert.value:.2f} over {alert.threshold:.2f}"
            run.progress.note(f"{alert.window_to:%-d %b}: {drifted}; the clock stands still while a new version is trained")
        for swap in run.listener.deployed[n_swaps:]:
            took = sum(phase.seconds for phase in swap.phases)
            run.progress.note(f"version {swap.version} serves, swapped in within {took:.1f} s; {swap.failed_requests} requests failed")
        n_alerts, n_swaps = len(run.listener.alerts), len(run.listener.deployed)
        await asyncio.sleep(0.2)


async def _load_more_at_swaps(run: Run) -> None:
    """Ask more from the moment a bundle is ready until some seconds after it serves, or after nothing came of it."""
    n_ready = len(run.listener.ready)
    while True:
        if len(run.listener.ready) > n_ready:
            n_ready, n_deployed = len(run.listener.ready), len(run.listener.deployed)
            run.load.rate = run.plan.swap_load
            began = time.monotonic()
            while len(run.listener.deployed) == n_deployed and time.monotonic() - began < SWAP_PATIENCE_S:
                await asyncio.sleep(0.05)
            await asyncio.sleep(AFTER_SWAP_S)
            run.load.rate = run.plan.load
        await asyncio.sleep(0.05)


class _Numbers:
    """The numbers of the moment, for the live page."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rows = {entity_id: row for row, entity_id in enumerate(run.year.flights["entity_id"].to_pylist())}
        self._late = run.year.flights["late"].to_numpy()
        self._label_ms = run.year.flights["label_ms"].cast("float64").to_numpy()

    def __call__(self) -> dict[str, str]:
        replay, listener, load = self._run.replay, self._run.listener, self._run.load
        numbers = {
            "day": f"{datetime.fromtimestamp(replay.event_ms / 1000, UTC):%-d %B}" if replay.event_ms else "",
            "facts": f"{replay.n_published:,}",
        }
        if listener.deployed:
            failed = ", ".join(f"{n} × {status}" for status, n in failures(load.calls).items())
            numbers |= {
                "version": str(listener.deployed[-1].version),
                "flights asked about": f"{replay.n_requested:,}",
                "answered": f"{listener.predictions.n_requested:,}",
                "AUC of the last": self._live_auc(),
                "over HTTP": f"{len(load.calls):,} (failed: {failed or 'none'})",
            }
        return numbers

    def _live_auc(self) -> str:
        predictions = self._run.listener.predictions
        start = max(0, len(predictions) - LIVE_FLIGHTS)
        last = zip(predictions.by_kafka[start:], predictions.entity_ids[start:], predictions.scores[start:], strict=False)
        asked = [(self._rows[name], score) for by_kafka, name, score in last if by_kafka and name]
        rows = np.array([row for row, _ in asked], dtype=np.int64)
        known = self._label_ms[rows] <= self._run.replay.event_ms
        found = auc(self._late[rows][known], np.array([score for _, score in asked])[known]) if known.any() else None
        return f"{found:.3f}" if found is not None else "no labels yet"


async def _judge(run: Run, folder: Path) -> said.Evidence:
    await _receipts(run)
    bundles = await _bundles(run, folder)
    served = await asyncio.to_thread(gathering.serve_again, run.listener.predictions, bundles, run.year, run.settings.h2o)
    outcomes = Outcomes.of(served, run.year)
    swaps = _swaps(run)
    first, last = (datetime.fromtimestamp(int(outcomes.label_ms[place]) / 1000, UTC) for place in (0, -1))
    return said.Evidence(
        mojomesh=version_of("mojomesh-contracts"),
        made_at=datetime.now(UTC),
        machine=_machine(),
        phases=[],
        seconds=0.0,
        replayed=_replayed(run),
        facts=(facts := await _facts(run)),
        balanced=facts.balanced,
        versions=await _versions(run, served),
        out_of_time=gathering.out_of_time(outcomes, gathering.late_before(run.year, run.plan.train_until)),
        comparison=gathering.comparison(outcomes),
        by_month=gathering.periods(outcomes, gathering.months(first, last), by_version=False),
        by_week=gathering.periods(outcomes, gathering.weeks(first, last), by_version=True),
        calibration=list(gathering.calibrations(outcomes)),
        drift=await _drift(run),
        http=gathering.http_log(run.load.calls, swaps, served, TOLERANCE),
        swaps=swaps,
        recomputed=gathering.recomputed(served),
        lookups=gathering.lookups(served, run.year, bundles),
        lineage=await _lineage(run, served),
    )


async def _receipts(run: Run) -> None:
    """Wait until the receipt of every answered HTTP request has come by Kafka: they travel off the hot path."""
    answered = {call.prediction_id for call in run.load.calls if not call.failed}
    deadline = time.monotonic() + RECEIPTS_PATIENCE_S
    while answered - set(run.listener.predictions.ids) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)


async def _bundles(run: Run, folder: Path) -> dict[int, Bundle]:
    """Every version that served, its signature verified once more."""
    if run.settings.public_key is None:
        raise DemoFailed("the mesh names no public key, so no bundle can be verified")
    objects, serving = open_objects(run.settings.objects), {promoted.version: promoted.bundle_digest for promoted in run.listener.promoted}
    return {
        version: await fetch_bundle(objects, digest, folder / "demo-bundles", run.settings.public_key)
        for version, digest in serving.items()
    }


def _replayed(run: Run) -> said.Replayed:
    first, last = (datetime.fromtimestamp(run.year.facts["event_ms"][place].as_py() / 1000, UTC) for place in (0, -1))
    return said.Replayed(
        first_event=first,
        last_event=last,
        pace=run.plan.pace,
        history_pace=run.plan.history_pace,
        http_rate=run.plan.load,
        http_rate_at_swaps=run.plan.swap_load,
        held_s=sum(hold.seconds for hold in run.replay.holds),
        waited_s=run.replay.waited_s,
        drift=run.plan.drift,
    )


async def _facts(run: Run) -> said.Facts:
    letters = await run.offsets.dead_letters(EventReceived)
    return said.Facts(
        published=run.replay.n_published + run.replay.n_bad,
        sent_bad_on_purpose=run.replay.n_bad,
        stored=await run.mesh.stored(),
        dead_letters=[said.DeadLetter(value=letter["value"], reason=letter[REASON]) for letter in letters],
    )


async def _versions(run: Run, served: Served) -> list[said.VersionEvidence]:
    return [_version(run, served, await run.mesh.version(version["version"])) for version in await run.mesh.versions()]


def _version(run: Run, served: Served, lineage: dict[str, Any]) -> said.VersionEvidence:
    manifest, version = Manifest.model_validate(lineage["manifest"]), int(lineage["version"])
    asked = served.event_ms[(served.versions == version) & served.by_kafka]
    promoted = [event for event in run.listener.promoted if event.version == version]
    return said.VersionEvidence(
        version=version,
        state=lineage["state"],
        refused_for=lineage["reasons"],
        cause=manifest.cause,
        alert=next((alert for alert in run.listener.alerts if alert.event_id == manifest.cause.event_id), None),
        held_s=sum(hold.seconds for hold in run.replay.holds if hold.alert.event_id == manifest.cause.event_id),
        run_id=str(manifest.run_id),
        fold_runner=manifest.fold_runner,
        pipeline_run=manifest.pipeline_run,
        n_rows=manifest.n_rows,
        train_from=manifest.train_from,
        train_to=manifest.train_to,
        folds=manifest.folds,
        metrics=manifest.metrics,
        naive=manifest.naive,
        comparison=manifest.comparison,
        parity=manifest.parity,
        bundle_digest=lineage["bundle_digest"],
        snapshot_digest=manifest.snapshot_digest,
        promoted_at=promoted[0].promoted_at if promoted else None,
        serves_from=datetime.fromtimestamp(int(asked.min()) / 1000, UTC) if len(asked) else None,
        certificate=next((event for event in run.listener.deployed if event.version == version), None),
    )


def _swaps(run: Run) -> list[said.Swap]:
    """Every take-over from one version by another; the first version took over from nobody."""
    promoted_at = {event.version: event.promoted_at for event in run.listener.promoted}
    return [
        gathering.swap(certificate, promoted_at[certificate.version], run.load.calls)
        for certificate in run.listener.deployed
        if certificate.previous_version is not None and certificate.succeeded
    ]


async def _drift(run: Run) -> list[said.DriftWindow]:
    return [
        said.DriftWindow(
            version=window["version"],
            window_from=window["window_from"],
            window_to=window["window_to"],
            psi={name: column["psi"] for name, column in window["columns"].items()},
            psi_threshold={name: column["psi_threshold"] for name, column in window["columns"].items()},
        )
        for window in (await run.mesh.drift())["windows"]
    ]


async def _lineage(run: Run, served: Served) -> said.Lineage:
    """The last of the sampled predictions whose flight has arrived and that used most rows, with its receipt as features keeps it."""
    label_ms, late = run.year.flights["label_ms"], run.year.flights["late"]
    rows = {sample["prediction_id"]: int(served.flights[served.position[sample["prediction_id"]]]) for sample in run.listener.samples}
    arrived = [sample for sample in run.listener.samples if (row := rows[sample["prediction_id"]]) >= 0 and label_ms[row].is_valid]
    if not arrived:
        raise DemoFailed("none of the predictions that were sampled is of a flight that has arrived")
    sample = max(reversed(arrived), key=lambda sample: len(sample["rows"]))
    row = rows[sample["prediction_id"]]
    return said.Lineage(
        receipt=await run.mesh.prediction(sample["prediction_id"]),
        version=sample["version"],
        came_true=bool(late[row].as_py()),
        arrival=datetime.fromtimestamp(label_ms[row].as_py() / 1000, UTC),
    )


def _machine() -> dict[str, str]:
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "python": platform.python_version(),
        "h2o": version_of("h2o"),
    }
