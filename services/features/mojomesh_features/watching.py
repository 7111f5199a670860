"""Counting drift windows from the prediction log, and raising alerts: state is only what the tables hold."""

import asyncio
from datetime import datetime
from statistics import median_low

from sqlalchemy.ext.asyncio import AsyncSession

from mojomesh_chassis.bundles import Bundle
from mojomesh_contracts.definitions import DriftPolicy
from mojomesh_contracts.events import DriftDetected, ModelPromoted, PredictionsMade
from mojomesh_features import tables
from mojomesh_features.drift import confirmed_streak, is_cool, measured_window
from mojomesh_features.tables import CountedPrediction, DriftWindow


async def measure_windows(db: AsyncSession, champion: ModelPromoted, bundle: Bundle, policy: DriftPolicy, cause: PredictionsMade) -> None:
    """Measure every window that is full and not measured yet, and raise what alerts follow, announced for `cause`.

    Under the model's lock. A promotion starts anew: its windows are measured against its own baseline and no earlier streak counts.
    """
    windows = await tables.windows_of(db, champion.model, champion.promotion)
    while True:
        after = windows[-1].last_arrival if windows else -1
        counted = await tables.unmeasured(db, champion, after, policy.window)
        if len(counted) < policy.window:
            return
        window = await asyncio.to_thread(_measured, len(windows), counted, bundle, policy)
        await tables.save_window(db, champion, window)
        windows.append(window)
        if policy.enabled:
            await _raise_alert(db, champion, windows, policy, cause)


def _measured(number: int, counted: list[CountedPrediction], bundle: Bundle, policy: DriftPolicy) -> DriftWindow:
    names = [column.name for column in bundle.schema.columns]
    times: list[datetime] = [prediction.event_time for prediction in counted]
    inputs, scores = [prediction.inputs for prediction in counted], [prediction.scores for prediction in counted]
    return DriftWindow(
        number=number,
        first_arrival=counted[0].arrival,
        last_arrival=counted[-1].arrival,
        window_from=min(times),
        window_to=max(times),
        middle=median_low(times),
        columns=measured_window(bundle.baseline, policy, names, inputs, scores),
    )


async def _raise_alert(
    db: AsyncSession, champion: ModelPromoted, windows: list[DriftWindow], policy: DriftPolicy, cause: PredictionsMade
) -> None:
    streak = confirmed_streak([window.columns for window in windows], policy.confirm)
    last = windows[-1]
    if streak is None or not is_cool(last.middle, await tables.last_alert_at(db, champion.model), policy.cooldown):
        return
    measure, value, threshold = streak.measured.worse
    alert = DriftDetected(
        event_id=cause.derive_id(f"drift/{champion.model}/{champion.promotion}/{last.number}"),
        model=champion.model,
        version=champion.version,
        feature=streak.column,
        measure=measure,
        value=value,
        threshold=threshold,
        windows=streak.windows,
        window_from=last.window_from,
        window_to=last.window_to,
    )
    await tables.save_alert(db, champion, last, cause.event_id, alert)
