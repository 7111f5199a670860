"""Whether what came in during a window is as its feature set's definition expects."""

from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

from mojomesh_contracts.definitions import Quality
from mojomesh_contracts.events import QualityBreached
from mojomesh_store.tallies import Tally


class QualityWindow(NamedTuple):
    """What the mesh came to know of a feature set in (window_from, window_to]."""

    feature_set: str
    window_from: datetime
    window_to: datetime
    tally: Tally  # its newest event time is that of all windows so far


class Finding(NamedTuple):
    """One expectation that was not met."""

    expectation: str
    feature: str | None
    value: float
    reason: str
    event_ids: list[str]


def breaches_of(window: QualityWindow, quality: Quality) -> list[QualityBreached]:
    """What of a window is not as expected: the same events, with the same ids, whoever asks and how often."""
    name, window_from, window_to, tally = window
    return [
        QualityBreached(
            event_id=uuid5(NAMESPACE_URL, f"quality.breached {name} {window_to.isoformat()} {found.expectation} {found.feature}"),
            feature_set=name,
            expectation=found.expectation,
            feature=found.feature,
            window_from=window_from,
            window_to=window_to,
            value=found.value,
            reason=found.reason,
            n_rows=tally.n_rows,
            n_held=tally.n_held,
            examples=[UUID(event_id) for event_id in found.event_ids],
        )
        for found in _findings(window, quality)
    ]


def _findings(window: QualityWindow, quality: Quality) -> Iterator[Finding]:
    tally = window.tally
    for feature, odd in tally.odd.items():
        yield Finding("values", feature, odd.n, f"{odd.n} of {tally.n_rows + tally.n_held} rows, as in: {odd.reason}", odd.event_ids)
    for feature, expected in quality.features.items():
        share = tally.missing.get(feature, 0) / max(1, tally.n_rows)
        if expected.missing is not None and share > expected.missing:
            yield Finding("missing", feature, share, f"'{feature}' is missing in {share:.1%} of rows, expected {expected.missing:.1%}", [])
    if (rows := quality.rows) is not None and not rows.min <= tally.n_rows <= (tally.n_rows if rows.max is None else rows.max):
        wanted = f"at least {rows.min}" if tally.n_rows < rows.min else f"at most {rows.max}"
        yield Finding("rows", None, tally.n_rows, f"{tally.n_rows} rows came in {quality.window}, expected {wanted}", [])
    if quality.freshness is not None and tally.newest_event_time is not None:
        age = window.window_to - tally.newest_event_time
        if age > quality.freshness:
            reason = f"the newest event time is {age} old, expected at most {quality.freshness}"
            yield Finding("freshness", None, age.total_seconds(), reason, [])
