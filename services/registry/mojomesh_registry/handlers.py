"""What registry does when it hears of bundles, folds and swaps."""

import tempfile
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import tuple_
from sqlalchemy.dialects.postgresql import insert

from mojomesh_chassis.bundles import fetch_bundle
from mojomesh_chassis.consuming import MeshRouter
from mojomesh_chassis.database import Database
from mojomesh_chassis.faults import fault
from mojomesh_chassis.objects import Objects
from mojomesh_chassis.outbox import Relay
from mojomesh_chassis.telemetry import log
from mojomesh_contracts.events import Event, FoldTrained, ModelDeployed, ModelReady, ShadowCompared, TrafficFollowed
from mojomesh_registry.tables import Deployment, Fold, Follower, Shadow
from mojomesh_registry.versions import register

router = MeshRouter("registry")


@router.work(ModelReady)
async def on_models_ready(events: list[ModelReady], database: Database, objects: Objects, public_key: Path, relay: Relay) -> list[Event]:
    """Verify each bundle, make it a version, judge it. What follows goes through the outbox, so nothing is returned."""
    for event in events:
        with tempfile.TemporaryDirectory(prefix="mojomesh-registry-") as folder:
            bundle = await fetch_bundle(objects, event.bundle_digest, Path(folder), public_key)
            async with database.begin() as db:
                version = await register(db, event, bundle, datetime.now(UTC))
        fault("registry.registered")
        relay.wake()
        log.info("version_registered", model=version.model, version=version.version, refusals=version.refusals)
    return []


@router.work(FoldTrained, batch=100)
async def on_folds_trained(events: list[FoldTrained], database: Database) -> list[Event]:
    """Keep each fold for the lineage of the version that its run will become."""
    async with database.begin() as db:
        for event in sorted(events, key=lambda event: (event.run_id, event.fold)):
            row = insert(Fold).values(run_id=event.run_id, fold=event.fold, model=event.model, event=event.model_dump(mode="json"))
            await db.execute(row.on_conflict_do_update(index_elements=["run_id", "fold"], set_={"event": row.excluded.event}))
    return []


@router.work(ModelDeployed, batch=100)
async def on_models_deployed(events: list[ModelDeployed], database: Database) -> list[Event]:
    """Keep each swap certificate."""
    async with database.begin() as db:
        for event in sorted(events, key=lambda event: event.event_id):
            row = insert(Deployment).values(
                event_id=event.event_id,
                model=event.model,
                version=event.version,
                succeeded=event.succeeded,
                switched_at=event.switched_at,
                event=event.model_dump(mode="json"),
            )
            await db.execute(row.on_conflict_do_nothing())
    return []


@router.work(ShadowCompared, batch=100)
async def on_models_shadowed(events: list[ShadowCompared], database: Database) -> list[Event]:
    """Keep the last word of each counter."""
    async with database.begin() as db:
        for event in sorted(events, key=lambda event: (event.counter, event.n_rows)):
            row = insert(Shadow).values(counter=event.counter, model=event.model, n_rows=event.n_rows, event=event.model_dump(mode="json"))
            newer = {"n_rows": row.excluded.n_rows, "event": row.excluded.event}
            await db.execute(row.on_conflict_do_update(index_elements=["counter"], set_=newer, where=Shadow.n_rows < row.excluded.n_rows))
    return []


@router.work(TrafficFollowed, batch=100)
async def on_traffic_followed(events: list[TrafficFollowed], database: Database) -> list[Event]:
    """Keep the last word of each replica on each model's traffic."""
    async with database.begin() as db:
        for event in sorted(events, key=lambda event: (event.model, event.replica, event.setting, event.followed_at)):
            row = insert(Follower).values(
                **event.model_dump(mode="json", include={"model", "replica", "setting", "left_out"}), followed_at=event.followed_at
            )
            newer = {name: row.excluded[name] for name in ("setting", "followed_at", "left_out")}
            known = tuple_(Follower.setting, Follower.followed_at)
            await db.execute(
                row.on_conflict_do_update(
                    index_elements=["model", "replica"], set_=newer, where=known < tuple_(row.excluded.setting, row.excluded.followed_at)
                )
            )
    return []
