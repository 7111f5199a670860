"""Turns what the demo saw into evidence: joins the client's log, the receipts, the files and H2O's own scores."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mojomesh_chassis.bundles import Bundle
from mojomesh_contracts.events import Metrics, ModelDeployed
from mojomesh_flights import evidence as said
from mojomesh_flights.dataset import Year
from mojomesh_flights.listening import Predictions
from mojomesh_flights.load import Call, failures
from mojomesh_flights.recomputing import Recomputer, decode
from mojomesh_trainer.cluster import open_cluster
from mojomesh_trainer.metrics import auc, calibration_error, logloss, measure

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

N_CALIBRATION_BINS = 10
N_RESAMPLES = 100
SEED = 2013
AROUND_SWAP_S = 5.0
SWAP_MARGIN_S = 1.0  # before the promotion and after the drain: whatever the swap does to a request shows there too
LEAST_FLIGHTS = 500  # a week with fewer says little
H2O_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Served:
    """Every prediction of the run as arrays, and what the first version would have said to the same inputs."""

    ids: list[str]
    by_kafka: Bools
    entity_ids: list[str | None]
    versions: Integers
    event_ms: Integers
    made_ms: Integers
    scores: Floats
    frozen: Floats
    recomputed: Floats
    flights: Integers  # row of Year.flights; -1: asked without an entity
    tables: dict[int, pa.Table]  # decoded inputs by version

    @cached_property
    def position(self) -> dict[str, int]:
        return {prediction_id: number for number, prediction_id in enumerate(self.ids)}


def serve_again(predictions: Predictions, bundles: dict[int, Bundle], year: Year, h2o: str) -> Served:
    """Score every receipt's inputs again, with the version it names and with the first version."""
    n_columns = len(next(iter(bundles.values())).schema.columns)
    inputs = np.frombuffer(predictions.inputs, dtype=np.float64).reshape(len(predictions), n_columns)
    versions = np.frombuffer(predictions.versions, dtype=np.int32).astype(np.int64)
    recomputed, frozen = np.full(len(predictions), np.nan), np.full(len(predictions), np.nan)
    first, tables = bundles[min(bundles)], {}
    with tempfile.TemporaryDirectory() as folder, open_cluster(h2o, H2O_TIMEOUT_S) as cluster:
        recomputer = Recomputer(cluster, Path(folder))
        for version in np.unique(versions).tolist():
            bundle, chosen = bundles[version], versions == version
            tables[version] = decode(inputs[chosen], bundle.schema)
            recomputed[chosen], frozen[chosen] = recomputer.scores(tables[version], bundle.schema, bundle.mojo_path, first.mojo_path)
        recomputer.clear()
    rows = {entity_id: row for row, entity_id in enumerate(year.flights["entity_id"].to_pylist())}
    return Served(
        ids=predictions.ids,
        by_kafka=np.frombuffer(predictions.by_kafka, dtype=np.int8).astype(bool),
        entity_ids=predictions.entity_ids,
        versions=versions,
        event_ms=np.frombuffer(predictions.event_ms, dtype=np.int64),
        made_ms=np.frombuffer(predictions.made_ms, dtype=np.int64),
        scores=np.frombuffer(predictions.scores, dtype=np.float64),
        frozen=frozen,
        recomputed=recomputed,
        flights=np.array([rows[entity_id] if entity_id else -1 for entity_id in predictions.entity_ids]),
        tables=tables,
    )


def recomputed(served: Served) -> list[said.Recomputed]:
    """How far any score of a version is from what H2O makes of the same inputs."""
    found = []
    for version in np.unique(served.versions).tolist():
        chosen = served.versions == version
        difference = float(np.abs(served.scores[chosen] - served.recomputed[chosen]).max())
        found.append(said.Recomputed(version=version, predictions=int(chosen.sum()), max_difference=difference))
    return found


def lookups(served: Served, year: Year, bundles: dict[int, Bundle]) -> said.Lookups:
    """Compare what was looked up online for each flight with the same columns computed from the files.

    A level that the version had not seen in training is missing in its inputs, and counts as equal.
    """
    compared = different = 0
    for version, table in served.tables.items():
        rows = served.flights[served.versions == version]
        mine = served.by_kafka[served.versions == version]
        files = year.flights.take(pa.array(rows[mine]))
        looked_up = table.filter(pa.array(mine))
        wrong = np.zeros(len(files), dtype=bool)
        for column in bundles[version].schema.columns:
            if column.type == "category":
                levels = set(column.levels or [])
                expected = [value if value in levels else None for value in files[column.name].to_pylist()]
                wrong |= np.array([a != b for a, b in zip(expected, looked_up[column.name].to_pylist(), strict=True)], dtype=bool)
            else:
                a, b = _floats(files[column.name]), _floats(looked_up[column.name])
                wrong |= ~((a == b) | (np.isnan(a) & np.isnan(b)))
        compared += len(files)
        different += int(wrong.sum())
    return said.Lookups(compared=compared, different=different)


@dataclass(frozen=True)
class Outcomes:
    """Each flight that was asked about once over Kafka and has arrived, in the order in which the labels became known."""

    label_ms: Integers
    event_ms: Integers
    versions: Integers
    late: Floats
    served: Floats
    frozen: Floats

    @classmethod
    def of(cls, served: Served, year: Year) -> "Outcomes":
        label_ms = _floats(year.flights["label_ms"])[served.flights]
        known = served.by_kafka & ~np.isnan(label_ms)
        order = np.flatnonzero(known)[np.argsort(label_ms[known], kind="stable")]
        late = _floats(year.flights["late"])[served.flights]
        return cls(
            label_ms[order].astype(np.int64),
            served.event_ms[order],
            served.versions[order],
            late[order],
            served.scores[order],
            served.frozen[order],
        )

    def __getitem__(self, chosen: Bools) -> "Outcomes":
        return Outcomes(
            self.label_ms[chosen],
            self.event_ms[chosen],
            self.versions[chosen],
            self.late[chosen],
            self.served[chosen],
            self.frozen[chosen],
        )

    def __len__(self) -> int:
        return len(self.late)


def periods(outcomes: Outcomes, starts: Sequence[datetime], *, by_version: bool) -> list[said.Period]:
    """Live quality per stretch of time from one start to the next; `by_version`: one entry for each version that served in it."""
    found = []
    for start, end in pairwise(starts):
        within = outcomes[(outcomes.label_ms >= _ms(start)) & (outcomes.label_ms < _ms(end))]
        for version in np.unique(within.versions).tolist() if by_version else [None]:
            part = within if version is None else within[within.versions == version]
            if len(part) >= LEAST_FLIGHTS:
                found.append(
                    said.Period(
                        starts_at=start,
                        version=version,
                        n_flights=len(part),
                        late=float(part.late.mean()),
                        served_auc=_auc(part.late, part.served),
                        frozen_auc=_auc(part.late, part.frozen),
                        served_logloss=_logloss(part.late, part.served),
                        frozen_logloss=_logloss(part.late, part.frozen),
                    )
                )
    return found


def months(first: datetime, last: datetime) -> list[datetime]:
    """Midnights in UTC of the first of each month, from the one before `first` to the one after `last`."""
    starts = [datetime(first.year, first.month, 1, tzinfo=UTC)]
    while starts[-1] < last:
        starts.append((starts[-1] + timedelta(days=32)).replace(day=1))
    return starts


def weeks(first: datetime, last: datetime) -> list[datetime]:
    """Every seven days from the midnight before `first`, past `last`."""
    start = first.replace(hour=0, minute=0, second=0, microsecond=0)
    return [start + timedelta(weeks=number) for number in range((last - start).days // 7 + 2)]


def comparison(outcomes: Outcomes) -> said.Comparison | None:
    """What served against the first version frozen, on every flight that a later version scored; None if there was no later one.

    The interval of the gain in AUC holds 95 % of resamples of whole days: flights of one day share its weather.
    """
    later = outcomes[outcomes.versions > outcomes.versions.min()]
    if not len(later):
        return None
    chance, days = np.random.default_rng(SEED), later.event_ms // 86_400_000
    rows_of_day = np.split(np.argsort(days, kind="stable"), np.cumsum(np.unique(days, return_counts=True)[1])[:-1])
    gains = []
    for _ in range(N_RESAMPLES):
        rows = np.concatenate([rows_of_day[day] for day in chance.integers(len(rows_of_day), size=len(rows_of_day))])
        gains.append(_auc(later.late[rows], later.served[rows]) - _auc(later.late[rows], later.frozen[rows]))
    low, high = np.percentile(gains, [2.5, 97.5])
    return said.Comparison(
        n_flights=len(later),
        served_auc=_auc(later.late, later.served),
        frozen_auc=_auc(later.late, later.frozen),
        auc_gain_low=float(low),
        auc_gain_high=float(high),
        served_logloss=_logloss(later.late, later.served),
        frozen_logloss=_logloss(later.late, later.frozen),
    )


def calibrations(outcomes: Outcomes) -> Iterator[said.Calibration]:
    """Mean score against the share of late flights, in tenths of equal count."""
    for which, scores in (("served", outcomes.served), ("frozen", outcomes.frozen)):
        tenths = np.array_split(np.argsort(scores, kind="stable"), N_CALIBRATION_BINS)
        bins = [
            said.CalibrationBin(mean_score=float(scores[tenth].mean()), share_late=float(outcomes.late[tenth].mean()), n_flights=len(tenth))
            for tenth in tenths
        ]
        yield said.Calibration(which=which, error=calibration_error(outcomes.late, scores), bins=bins)


def out_of_time(outcomes: Outcomes, late_before: float) -> said.OutOfTime:
    """Live predictions against a naive model that always answers `late_before`, the share of late flights before there was a model."""
    naive = np.tile([1 - late_before, late_before], (len(outcomes), 1))
    live = measure("binary", outcomes.late, np.column_stack([1 - outcomes.served, outcomes.served]), naive)
    usual: Metrics = measure("binary", outcomes.late, naive, naive)
    return said.OutOfTime(n_flights=len(outcomes), served=live, naive=usual)


def swap(certificate: ModelDeployed, asked_at: datetime, calls: Sequence[Call]) -> said.Swap:
    """What the client's log says about a promotion, until the last lease on the old version was given back."""
    began, drained_at = asked_at.timestamp(), certificate.switched_at.timestamp()
    switched_at = min((call.due_at for call in calls if call.version == certificate.version), default=drained_at)
    during = [call for call in calls if began - SWAP_MARGIN_S <= call.due_at <= drained_at + SWAP_MARGIN_S]
    latencies = _latencies(during)
    near = [call for call in calls if abs(call.due_at - switched_at) <= AROUND_SWAP_S]
    return said.Swap(
        version=certificate.version,
        seconds=drained_at - began,
        margin_s=SWAP_MARGIN_S,
        requests=len(during),
        failed=sum(call.failed for call in during),
        by_version=dict(Counter(call.version for call in during if call.version is not None)),
        old_after_drain=sum(call.version != certificate.version for call in calls if drained_at < call.due_at < drained_at + AROUND_SWAP_S),
        p50_ms=float(np.percentile(latencies, 50)),
        p99_ms=float(np.percentile(latencies, 99)),
        max_ms=float(latencies.max()),
        answers=[
            said.Answer(after_s=round(call.due_at - switched_at, 3), latency_ms=round(call.latency_ms, 2), version=call.version)
            for call in near
        ],
    )


def http_log(calls: Sequence[Call], swaps: Sequence[said.Swap], served: Served, tolerance: float) -> said.HttpLog:
    """Join the client's log with the receipts on prediction id."""
    answered = [call for call in calls if not call.failed]
    with_receipt = [(call, served.position[call.prediction_id]) for call in answered if call.prediction_id in served.position]
    latencies = _latencies(answered)
    return said.HttpLog(
        requests=len(calls),
        failed=sum(call.failed for call in calls),
        failed_by_status=failures(calls),
        by_door=dict(Counter(call.door for call in calls)),
        p50_ms=float(np.percentile(latencies, 50)),
        p99_ms=float(np.percentile(latencies, 99)),
        without_receipt=len(answered) - len(with_receipt),
        other_version=sum(call.version != served.versions[place] for call, place in with_receipt),
        other_score=_count(with_receipt, lambda call, place: not abs((call.score or 0.0) - served.recomputed[place]) <= tolerance),
        during_swaps=sum(swap.requests for swap in swaps),
        failed_during_swaps=sum(swap.failed for swap in swaps),
    )


def _count(joined: Sequence[tuple[Call, int]], true_of: Callable[[Call, int], bool]) -> int:
    return sum(true_of(call, place) for call, place in joined)


def _latencies(calls: Sequence[Call]) -> Floats:
    return np.array([call.latency_ms for call in calls] or [np.nan])


def _auc(labels: Floats, scores: Floats) -> float:
    found = auc(labels, scores)
    return found if found is not None else float("nan")


def _logloss(labels: Floats, scores: Floats) -> float:
    return logloss(labels, np.column_stack([1 - scores, scores]))


def _floats(column: pa.ChunkedArray) -> Floats:
    values: Floats = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values


def _ms(time: datetime) -> int:
    return round(time.timestamp() * 1000)


def late_before(year: Year, until: datetime) -> float:
    """Share of late flights among those whose label was known by then."""
    known = _floats(year.flights["label_ms"]) < _ms(until)
    return float(_floats(year.flights["late"])[known].mean())
