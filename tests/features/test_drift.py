"""Receipts are kept once; drift is counted once, needs several windows in a row, and cools down."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from mojomesh_chassis.bundles import Bundle
from mojomesh_chassis.database import Database, open_database
from mojomesh_chassis.definitions import Definitions
from mojomesh_contracts.bundles import Bins, BundleSchema, Golden
from mojomesh_contracts.definitions import DriftPolicy
from mojomesh_contracts.drift import bin_of_level, bin_of_number, kl, psi
from mojomesh_contracts.events import DriftDetected, ModelPromoted, Prediction, PredictionsMade, RowKey
from mojomesh_features.champions import Champions
from mojomesh_features.drift import Measured, confirmed_streak, counts_of, is_cool, measured_window
from mojomesh_features.handlers import on_models_promoted, on_predictions_made
from mojomesh_store.shards import FeatureStore
from tests.features.making import BASELINE, COLUMNS, NOON, make_block, make_predictions, make_promotion

DAY = timedelta(days=1)
POLICY = DriftPolicy(psi=0.25, kl=0.5, window=100, confirm=2, cooldown=14 * DAY)
NAMES = [column.name for column in COLUMNS]

# --- measuring -------------------------------------------------------------------------------------------------------------------------

maybe_numbers = st.lists(st.one_of(st.none(), st.floats(-20, 20), st.sampled_from([nan, inf, -inf, 1.0, 2.0, -3.5])), max_size=50)


@given(edges=st.lists(st.floats(-10, 10), max_size=9, unique=True).map(sorted), values=maybe_numbers)
def test_numbers_are_counted_as_the_contract_says(edges: list[float], values: list[float | None]) -> None:
    expected = [0] * (len(edges) + 2)
    for value in values:
        expected[bin_of_number(edges, value)] += 1

    bins = Bins(column="x", edges=edges, counts=expected, psi_p99=0, kl_p99=0)
    assert counts_of(bins, np.array(values, dtype=np.float64)) == expected


@given(values=st.lists(st.one_of(st.none(), st.integers(-2, 5).map(float), st.just(nan)), max_size=50))
def test_levels_are_counted_as_the_contract_says(values: list[float | None]) -> None:
    expected = [0] * 5
    for value in values:
        expected[bin_of_level(["a", "b", "c"], value)] += 1

    bins = Bins(column="x", levels=["a", "b", "c"], counts=expected, psi_p99=0, kl_p99=0)
    assert counts_of(bins, np.array(values, dtype=np.float64)) == expected


def test_a_threshold_is_the_larger_of_the_policys_floor_and_the_trainings_own_windows() -> None:
    measured = measured_window(BASELINE, POLICY, NAMES, [[500.0, 0.0]], [[0.5, 0.5]])

    assert {name: (column.psi_threshold, column.kl_threshold) for name, column in measured.items()} == {
        "distance": (0.3, 0.5),
        "carrier": (0.25, 0.5),
        "score": (0.3, 0.5),
    }


def test_rows_that_are_not_the_models_are_left_out() -> None:
    good = measured_window(BASELINE, POLICY, NAMES, [[500.0, None]], [[0.5, 0.5]])

    assert measured_window(BASELINE, POLICY, NAMES, [[500.0, None], [1.0], [500.0, None]], [[0.5, 0.5], [0.1, 0.9], []]) == good


def column(psi_value: float, kl_value: float = 0.0) -> Measured:
    return Measured(psi=psi_value, kl=kl_value, psi_threshold=0.25, kl_threshold=0.5)


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        ([0.9], None),
        ([0.9, 0.1, 0.9], None),
        ([0.1, 0.9, 0.9], 2),
        ([0.9, 0.9, 0.9], 3),
        ([0.9, 0.9, 0.1], None),
        ([0.25, 0.25], None),
        ([], None),
    ],
)
def test_only_windows_in_a_row_confirm(values: list[float], windows: int | None) -> None:
    streak = confirmed_streak([{"x": column(value)} for value in values], confirm=2)

    assert (streak and streak.windows) == windows


def test_of_several_columns_the_worst_is_named_by_its_worse_measure() -> None:
    windows = [{"a": column(0.5), "b": column(0.1, kl_value=2.0), "c": column(9.0)}, {"a": column(0.5), "b": column(0.1, kl_value=2.0)}]

    streak = confirmed_streak(windows, confirm=2)

    assert streak is not None
    assert (streak.column, streak.measured.worse) == ("b", ("kl", 2.0, 0.5))


def test_an_alert_waits_for_the_cool_down() -> None:
    assert is_cool(NOON, None, DAY)
    assert is_cool(NOON + DAY, NOON, DAY)
    assert not is_cool(NOON + DAY / 2, NOON, DAY)


# --- the handler -----------------------------------------------------------------------------------------------------------------------


NO_MANIFEST: Any = None  # the definition in force is asked first


class OneBundle:
    """Champions' bundles without an object store; while `bundle` is None there is none to be had."""

    def __init__(self) -> None:
        self.bundle: Bundle | None = Bundle(
            folder=Path(),
            digest="digest-1",
            schema=BundleSchema(columns=COLUMNS, label="late", classes=["0", "1"]),
            baseline=BASELINE,
            golden=Golden(tolerance=0, rows=[]),
            manifest=NO_MANIFEST,
        )

    async def of(self, _: ModelPromoted) -> Bundle | None:
        return self.bundle


class Watch:
    """The handler with all it needs, for one replica of features."""

    def __init__(self, database: Database, definitions: Definitions, *promotions: ModelPromoted) -> None:
        self.database = database
        self.definitions = definitions
        self.champions = Champions()
        for promotion in promotions:
            self.champions.put(promotion)
        self.bundles = OneBundle()

    async def deliver(self, *blocks: PredictionsMade) -> list[DriftDetected]:
        following = await on_predictions_made(blocks, self.database, self.champions, self.bundles, self.definitions)
        return [event for event in following or () if isinstance(event, DriftDetected)]

    async def made(self, *groups: list[Prediction]) -> list[DriftDetected]:
        return [alert for group in groups for alert in await self.deliver(make_block(group))]

    async def windows(self) -> list[dict[str, Any]]:
        async with self.database.begin() as db:
            found = await db.execute(text("SELECT promotion, number, columns::text FROM features.drift_windows ORDER BY promotion, number"))
            return [dict(row) for row in found.mappings()]

    async def counted(self) -> int:
        async with self.database.begin() as db:
            return int((await db.execute(text("SELECT count(*) FROM features.counted"))).scalar_one())


@pytest.fixture
def watch(feature_store: FeatureStore, definitions: Definitions) -> Watch:
    return Watch(feature_store.shards[0], definitions, make_promotion())


async def test_a_receipt_comes_back_as_it_was_given(watch: Watch, http: httpx.AsyncClient) -> None:
    row = RowKey(feature_set="flights", entity_id="F0", event_time=NOON, created_at=NOON, seq=7)
    given = make_predictions(1)[0].model_copy(update={"rows": [row], "inputs": [0.1 + 0.2, None], "request_id": uuid4()})

    await watch.made([given])

    reply = await http.get(f"/v1/predictions/{given.prediction_id}")
    assert Prediction.model_validate_json(reply.content) == given
    assert {name: reply.json()[name] for name in ("model", "version", "bundle_digest", "replica")} == {
        "model": "delay",
        "version": 1,
        "bundle_digest": "digest-1",
        "replica": "0",
    }


async def test_a_block_delivered_twice_is_kept_and_counted_once(watch: Watch, http: httpx.AsyncClient) -> None:
    block = make_block(make_predictions(150))

    for _ in range(2):
        await watch.deliver(block, block)

    listed = (await http.get("/v1/predictions", params={"model": "delay"})).json()["predictions"]
    assert [UUID(row["prediction_id"]) for row in listed] == [made.prediction_id for made in block.predictions]
    assert await watch.counted() == 150
    assert len(await watch.windows()) == 1


async def test_receipts_are_listed_page_by_page(watch: Watch, http: httpx.AsyncClient) -> None:
    await watch.made(make_predictions(25))
    seen: list[str] = []
    after, pages = 0, 0

    while page := (await http.get("/v1/predictions", params={"model": "delay", "after": after, "limit": 10})).json():
        if not page["predictions"]:
            break
        seen += [row["entity_id"] for row in page["predictions"]]
        after, pages = page["next"], pages + 1

    assert (seen, pages) == ([f"F{n}" for n in range(25)], 3)


async def test_a_window_is_measured_as_the_contract_says(watch: Watch, http: httpx.AsyncClient) -> None:
    await watch.made(make_predictions(60), make_predictions(90, first=60, drift=1.0))

    (window,) = (await http.get("/v1/drift/delay")).json()["windows"]

    assert (window["number"], window["n_rows"], window["version"], window["promotion"]) == (0, 100, 1, 1)
    inputs = [made.inputs for made in [*make_predictions(60), *make_predictions(40, first=60, drift=1.0)]]
    counts = [0] * 11
    for row in inputs:
        counts[bin_of_number(BASELINE.bins[0].edges or [], row[0])] += 1
    assert window["columns"]["distance"]["psi"] == pytest.approx(psi(BASELINE.bins[0].counts, counts))
    assert window["columns"]["distance"]["kl"] == pytest.approx(kl(BASELINE.bins[0].counts, counts))
    assert window["columns"]["carrier"]["psi"] < 0.05


async def drifting(watch: Watch, cuts: Sequence[int], redelivered: bool) -> list[dict[str, Any]]:
    predictions = make_predictions(350, drift=0.4)
    blocks = [make_block(predictions[begin:end]) for begin, end in zip([0, *cuts], [*cuts, 350], strict=True)]
    await watch.deliver(blocks[0])
    for before, block in pairwise(blocks):
        await watch.deliver(*([before, block] if redelivered else [block]))
    return await watch.windows()


async def test_windows_do_not_depend_on_batches_or_redelivery(new_postgres: Any, definitions: Definitions) -> None:
    results = []
    for cuts, redelivered in (([], False), ([50, 120, 199, 200, 201], False), ([50, 120, 199, 200, 201], True)):
        async with open_database(new_postgres().url) as database:
            results.append(await drifting(Watch(database, definitions, make_promotion()), cuts, redelivered))

    assert len(results[0]) == 3
    assert results[0] == results[1] == results[2]


FORGET = (
    """
    CREATE FUNCTION features.forget() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN NEW.entity_id := gen_random_uuid()::text; RETURN NEW; END'
    """,
    "CREATE TRIGGER forget BEFORE INSERT ON features.counted FOR EACH ROW EXECUTE FUNCTION features.forget()",
)
"""Makes the table a mere counter: it no longer knows whom it has counted."""


async def test_control_without_the_memory_of_what_was_counted_redelivery_counts_twice(postgres: Any, definitions: Definitions) -> None:
    async with open_database(postgres.owner_url) as owner:
        async with owner.begin() as db:
            for statement in FORGET:
                await db.execute(text(statement))
        watch = Watch(owner, definitions, make_promotion())

        assert len(await drifting(watch, [50, 120, 199, 200, 201], redelivered=True)) > 3
        assert await watch.counted() > 350


async def test_drift_is_announced_when_confirmed_and_not_before(watch: Watch) -> None:
    assert await watch.made(make_predictions(100)) == []
    assert await watch.made(make_predictions(100, first=100, drift=1.0)) == []
    (alert,) = await watch.made(make_predictions(100, first=200, drift=1.0))

    assert (alert.model, alert.version, alert.feature, alert.windows) == ("delay", 1, "distance", 2)
    assert alert.value > alert.threshold
    assert (alert.window_from, alert.window_to) == (NOON + timedelta(hours=200), NOON + timedelta(hours=299))


async def test_one_window_over_the_threshold_is_chance(watch: Watch) -> None:
    alerts = await watch.made(*(make_predictions(100, first=100 * n, drift=float(n % 2)) for n in range(10)))

    assert alerts == []
    assert len(await watch.windows()) == 10


async def test_an_alert_is_announced_again_when_its_cause_is_delivered_again(watch: Watch) -> None:
    await watch.made(make_predictions(100, drift=1.0))
    cause = make_block(make_predictions(100, first=100, drift=1.0))

    first = await watch.deliver(cause)
    again = await watch.deliver(make_block(make_predictions(3, first=500)), cause)
    later = await watch.made(make_predictions(3, first=600))

    assert len(first) == 1
    assert again == first
    assert later == []


async def test_between_two_alerts_lies_the_cool_down_of_event_time(watch: Watch, http: httpx.AsyncClient) -> None:
    """A window is 100 hours of flights: the cool-down of 14 days is 336."""
    alerts = await watch.made(*(make_predictions(100, first=100 * n, drift=1.0) for n in range(10)))

    starts = [int((alert.window_from - NOON) / timedelta(hours=1)) for alert in alerts]
    assert starts == [100, 500, 900]
    assert (await http.get("/v1/drift/delay")).json()["alerts"] == [alert.model_dump(mode="json") | {} for alert in alerts]


async def test_a_single_request_from_the_far_future_does_not_stop_alerts(watch: Watch) -> None:
    def with_liar(first: int) -> list[Prediction]:
        made = make_predictions(100, first=first, drift=1.0)
        return [made[0].model_copy(update={"event_time": NOON + 365_00 * DAY}), *made[1:]]

    alerts = await watch.made(*(with_liar(100 * n) for n in range(10)))

    assert len(alerts) == 3


async def test_load_tests_do_not_count(watch: Watch) -> None:
    """They ask for the same entities at the same times again and again, or send values of their own."""
    await watch.made(make_predictions(50, drift=1.0))
    for _ in range(5):
        await watch.made(make_predictions(50, drift=1.0))
        await watch.made([made.model_copy(update={"entity_id": None}) for made in make_predictions(50, first=900, drift=1.0)])

    assert await watch.counted() == 50
    assert await watch.windows() == []


async def test_control_requests_about_other_times_do_count(watch: Watch) -> None:
    for n in range(5):
        await watch.made(make_predictions(50, drift=1.0, at=NOON + n * DAY / 7))

    assert await watch.counted() == 250


async def test_a_promotion_starts_anew(watch: Watch) -> None:
    await watch.made(make_predictions(100, drift=1.0), make_predictions(60, first=100, drift=1.0))
    await on_models_promoted([make_promotion(version=2, promotion=2), make_promotion()], watch.champions)

    late = await watch.deliver(make_block(make_predictions(100, first=200, drift=1.0), version=1))
    first = await watch.deliver(make_block(make_predictions(100, first=300, drift=1.0), version=2))
    second = await watch.deliver(make_block(make_predictions(100, first=400, drift=1.0), version=2))

    assert late == first == []
    assert [alert.version for alert in second] == [2]
    assert [(window["promotion"], window["number"]) for window in await watch.windows()] == [(1, 0), (2, 0), (2, 1)]


async def test_the_cool_down_outlasts_a_promotion(watch: Watch) -> None:
    assert len(await watch.made(*(make_predictions(100, first=100 * n, drift=1.0) for n in range(2)))) == 1
    watch.champions.put(make_promotion(version=2, promotion=2))

    blocks = [make_block(make_predictions(100, first=200 + 100 * n, drift=1.0), version=2) for n in range(4)]
    alerts = [alert for block in blocks for alert in await watch.deliver(block)]

    assert [alert.window_from for alert in alerts] == [NOON + timedelta(hours=500)]


async def test_a_policy_switched_off_measures_and_does_not_alert(watch: Watch, definitions: Definitions) -> None:
    model = definitions.model("delay")
    definitions.put(model.model_copy(update={"drift": model.drift.model_copy(update={"enabled": False})}), 2)

    alerts = await watch.made(*(make_predictions(100, first=100 * n, drift=1.0) for n in range(5)))

    assert alerts == []
    assert len(await watch.windows()) == 5


async def test_while_the_bundle_cannot_be_had_receipts_are_kept_and_windows_wait(watch: Watch) -> None:
    bundle, watch.bundles.bundle = watch.bundles.bundle, None
    assert await watch.made(make_predictions(250, drift=1.0)) == []
    assert (await watch.counted(), await watch.windows()) == (250, [])

    watch.bundles.bundle = bundle
    alerts = await watch.made(make_predictions(1, first=250))

    assert len(await watch.windows()) == 2
    assert len(alerts) == 1


async def test_inputs_that_no_model_could_have_seen_stop_nothing(watch: Watch) -> None:
    garbage = [made.model_copy(update={"inputs": [nan], "scores": []}) for made in make_predictions(30, first=900)]

    await watch.made(garbage, make_predictions(100))

    assert len(await watch.windows()) == 1


@pytest.fixture
async def second_replica(postgres: Any, definitions: Definitions) -> AsyncIterator[Watch]:
    async with open_database(postgres.url) as database:
        yield Watch(database, definitions, make_promotion())


async def test_replicas_that_count_at_once_count_each_once(watch: Watch, second_replica: Watch) -> None:
    predictions = make_predictions(1000, drift=0.5)
    blocks = [make_block(predictions[begin : begin + 20]) for begin in range(0, 1000, 20)]

    alerts = await asyncio.gather(*(replica.deliver(block) for block in blocks for replica in (watch, second_replica)))

    assert await watch.counted() == 1000
    windows = await watch.windows()
    assert [window["number"] for window in windows] == list(range(10))
    assert len({alert.event_id for announced in alerts for alert in announced}) == len(
        {(alert.window_from, alert.window_to) for announced in alerts for alert in announced}
    )
