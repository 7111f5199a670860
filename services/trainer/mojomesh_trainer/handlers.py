"""What starts a run: somebody's request, or an alert. A handler only keeps the run; `running` does the work."""

from collections.abc import Sequence

from mojomesh_chassis.consuming import MeshRouter
from mojomesh_chassis.database import Database
from mojomesh_chassis.definitions import subscribe_definitions
from mojomesh_contracts.bundles import Cause
from mojomesh_contracts.events import DriftDetected, Event, TrainingRequested
from mojomesh_trainer import tables
from mojomesh_trainer.running import Bell, announcements

router = MeshRouter("trainer")
subscribe_definitions(router)


@router.work(TrainingRequested)
async def on_training_requested(events: Sequence[TrainingRequested], database: Database, bell: Bell) -> list[Event]:
    """Keep a run for each request; for one that has ended, announce its end again."""
    announced = []
    for event in events:
        cause = Cause(kind="requested", event_id=event.event_id, reason=event.reason)
        async with database.begin() as db:
            run = await tables.open_run(db, event.derive_id("run"), event.model, cause, event.snapshot_time)
            announced += announcements(run)
    bell.ring()
    return announced


@router.work(DriftDetected)
async def on_drift_detected(events: Sequence[DriftDetected], database: Database, bell: Bell) -> list[Event]:
    """Keep a run for each alert; for one that has ended, announce its end again."""
    announced = []
    for event in events:
        reason = (
            f"{event.measure} of {event.feature} was {event.value:.3f}, over {event.threshold:.3f} in {event.windows} windows in a row "
            f"up to {event.window_to:%Y-%m-%d %H:%M}"
        )
        cause = Cause(kind="drift", event_id=event.event_id, reason=reason)
        async with database.begin() as db:
            run = await tables.open_run(db, event.derive_id("run"), event.model, cause, None)
            announced += announcements(run)
    bell.ring()
    return announced
