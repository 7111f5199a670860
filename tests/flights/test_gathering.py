from datetime import UTC, datetime, timedelta
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pytest

from mojomesh_contracts.events import ModelDeployed, SwapPhase
from mojomesh_flights import gathering
from mojomesh_flights.gathering import Outcomes, Served
from mojomesh_flights.load import Call

NOW = datetime(2026, 1, 1, tzinfo=UTC)
START = datetime(2013, 5, 1, tzinfo=UTC)


def make_call(at_s: float, *, version: int = 1, prediction_id: str = "a", score: float = 0.5, status: int | None = 200) -> Call:
    answered = status == 200
    receipt = (prediction_id, version, score) if answered else (None, None, None)
    return Call(NOW.timestamp() + at_s, "native", "UA1", status, 3.0, *receipt)


def make_certificate(drained_s: float) -> ModelDeployed:
    return ModelDeployed(
        event_id=uuid4(),
        model="flight-delay",
        version=2,
        previous_version=1,
        bundle_digest="ab",
        replica="0",
        succeeded=True,
        switched_at=NOW + timedelta(seconds=drained_s),
        phases=[SwapPhase(name="drain", seconds=0.1)],
        workers=2,
        in_flight_at_switch=1,
        drained=True,
        failed_requests=0,
        golden_rows=10,
        max_golden_difference=0.0,
    )


def make_served(ids: list[str], versions: list[int], recomputed: list[float]) -> Served:
    n = len(ids)
    zeros = np.zeros(n, dtype=np.int64)
    return Served(
        ids=ids,
        by_kafka=np.ones(n, dtype=bool),
        entity_ids=["UA1"] * n,
        versions=np.array(versions),
        event_ms=zeros,
        made_ms=zeros,
        scores=np.array(recomputed),
        frozen=np.array(recomputed),
        recomputed=np.array(recomputed),
        flights=zeros,
        tables={1: pa.table({})},
    )


def make_outcomes(n: int, gain: float) -> Outcomes:
    """`n` flights over 40 days; version 2 takes over half-way, and knows the outcome better by `gain`."""
    chance = np.random.default_rng(1)
    late = (chance.random(n) < 0.3).astype(float)
    versions = np.where(np.arange(n) < n // 2, 1, 2)
    ms = np.linspace(START.timestamp() * 1000, (START + timedelta(days=40)).timestamp() * 1000, n).astype(np.int64)
    noise = chance.random(n)
    frozen = 0.2 * late + noise
    served = np.where(versions == 2, (0.2 + gain) * late + noise, frozen)
    return Outcomes(ms, ms, versions, late, served / 3, frozen / 3)


def test_a_request_belongs_to_a_swap_from_the_promotion_to_the_last_lease() -> None:
    calls = [make_call(-1.1), make_call(0.5), make_call(1.5, version=2), make_call(3.5, version=2)]

    swap = gathering.swap(make_certificate(2.0), NOW, calls)

    assert (swap.requests, swap.failed, swap.by_version, swap.old_after_drain) == (2, 0, {1: 1, 2: 1}, 0)
    assert [answer.after_s for answer in swap.answers] == [-2.6, -1.0, 0.0, 2.0]


def test_a_failure_in_a_swap_and_an_old_version_after_it_are_seen() -> None:
    calls = [make_call(0.5, status=503), make_call(0.6, status=None), make_call(1.5, version=2), make_call(3.5, version=1)]

    swap = gathering.swap(make_certificate(2.0), NOW, calls)

    assert (swap.requests, swap.failed, swap.old_after_drain) == (3, 2, 1)


def test_the_log_agrees_with_the_receipts() -> None:
    served = make_served(["a", "b"], [1, 2], [0.5, 0.25])
    calls = [make_call(0, prediction_id="a"), make_call(1, prediction_id="b", version=2, score=0.25)]

    log = gathering.http_log(calls, [], served, 1e-6)

    assert (log.requests, log.failed, log.without_receipt, log.other_version, log.other_score) == (2, 0, 0, 0, 0)


def test_the_log_tells_failures_by_what_was_answered() -> None:
    calls = [make_call(0, prediction_id="a"), *(make_call(1, status=429) for _ in range(2)), make_call(2, status=None)]

    log = gathering.http_log(calls, [], make_served(["a"], [1], [0.5]), 1e-6)

    assert (log.failed, log.failed_by_status) == (3, {"429": 2, "no answer": 1})


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (make_call(0, prediction_id="c"), (1, 0, 0)),
        (make_call(0, prediction_id="a", version=2), (0, 1, 0)),
        (make_call(0, prediction_id="a", score=0.50001), (0, 0, 1)),
    ],
)
def test_a_log_that_disagrees_with_the_receipts_is_found_out(call: Call, found: tuple[int, int, int]) -> None:
    log = gathering.http_log([call], [], make_served(["a"], [1], [0.5]), 1e-6)

    assert (log.without_receipt, log.other_version, log.other_score) == found


def test_a_later_version_that_knows_better_gains_and_one_that_does_not_gains_nothing() -> None:
    better, same = gathering.comparison(make_outcomes(8_000, 0.3)), gathering.comparison(make_outcomes(8_000, 0.0))

    assert better is not None and same is not None
    assert better.n_flights == 4_000
    assert better.auc_gain_low > 0.05
    assert same.auc_gain_low == same.auc_gain_high == 0


def test_one_version_alone_is_compared_with_nothing() -> None:
    outcomes = make_outcomes(2_000, 0.0)

    assert gathering.comparison(outcomes[outcomes.versions == 1]) is None


def test_periods_split_time_by_label_and_by_version() -> None:
    outcomes = make_outcomes(8_000, 0.3)
    weeks = gathering.weeks(START, START + timedelta(days=40))

    by_version = gathering.periods(outcomes, weeks, by_version=True)
    merged = gathering.periods(outcomes, weeks, by_version=False)

    assert sum(period.n_flights for period in merged) == 8_000
    assert {period.version for period in by_version} == {1, 2}
    assert all(period.served_auc == period.frozen_auc for period in by_version if period.version == 1)


def test_months_begin_on_the_first() -> None:
    assert gathering.months(datetime(2013, 5, 3, tzinfo=UTC), datetime(2013, 7, 2, tzinfo=UTC)) == [
        datetime(2013, month, 1, tzinfo=UTC) for month in (5, 6, 7, 8)
    ]


def test_calibration_is_of_tenths() -> None:
    served, frozen = gathering.calibrations(make_outcomes(8_000, 0.3))

    assert (served.which, frozen.which) == ("served", "frozen")
    assert [tenth.n_flights for tenth in served.bins] == [800] * 10
