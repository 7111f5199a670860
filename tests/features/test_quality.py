"""Windows of what came in: complete when they are judged, judged once, and told."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.outbox import Relay
from mojomesh_chassis.publishing import Publisher
from mojomesh_contracts.definitions import DefinitionError, FeatureSet, parse_definition
from mojomesh_contracts.events import QualityBreached
from mojomesh_features import judging
from mojomesh_features.judging import OUTBOX, Judge
from mojomesh_features.quality import QualityWindow
from mojomesh_store import rows, tallies
from mojomesh_store.shards import FeatureStore, open_feature_store
from mojomesh_store.tallies import Odd, Tally

SECOND = timedelta(seconds=1)
QUALITY = {
    "window": "1s",
    "features": {"distance": {"max": 10}, "carrier": {"missing": 0.25}},
    "rows": {"min": 2, "max": 4},
    "freshness": "1h",
}


def feature_set(quality: dict[str, Any]) -> FeatureSet:
    features = {"distance": {"type": "number"}, "carrier": {"type": "category"}}
    found = parse_definition({"kind": "FeatureSet", "name": "flights", "entity": "id", "features": features, "quality": quality})
    assert isinstance(found, FeatureSet)
    return found


@pytest.fixture
def start() -> datetime:
    """The beginning of a window that was over long ago."""
    return datetime.now(UTC).replace(microsecond=0) - 5 * SECOND


@pytest.fixture
async def publisher() -> AsyncIterator[Publisher]:
    publisher = Publisher("127.0.0.1:9")  # nothing is sent but by the test that has a Kafka
    yield publisher
    await publisher.close()


@pytest.fixture
def judge(feature_store: FeatureStore, publisher: Publisher) -> Judge:
    return make_judge(feature_store, publisher)


def make_judge(feature_store: FeatureStore, publisher: Publisher, quality: dict[str, Any] = QUALITY) -> Judge:
    return Judge(feature_store, Definitions(feature_set(quality)), Relay(feature_store.shards[0], OUTBOX, publisher))


async def came_in(store: FeatureStore, at: datetime, tally: Tally, shard: int = 0) -> None:
    async with store.shards[shard].begin() as db:
        await tallies.save(db, {"flights": tally}, at)


def told(breaches: list[QualityBreached], window_to: datetime) -> dict[tuple[str, str | None], float]:
    return {(breach.expectation, breach.feature): breach.value for breach in breaches if breach.window_to == window_to}


async def test_every_expectation_that_a_window_does_not_meet_is_told(judge: Judge, feature_store: FeatureStore, start: datetime) -> None:
    event_id = uuid4()
    fresh = Tally(3, 1, start, {"carrier": 1}, {"distance": Odd(2, "'distance' is 11, expected at most 10", [str(event_id)])})
    await came_in(feature_store, start + SECOND, fresh)  # the last instant of the first window
    await came_in(feature_store, start + 1.5 * SECOND, Tally(2, 0, start - 2 * timedelta(hours=1), {}, {}))
    await came_in(feature_store, start + 1.9 * SECOND, Tally(3, 0, start, {"carrier": 1}, {}))

    breaches = await judge.judge()

    assert told(breaches, start + SECOND) == {("values", "distance"): 2, ("missing", "carrier"): 1 / 3}
    assert told(breaches, start + 2 * SECOND) == {("rows", None): 5}
    assert told(breaches, start + 3 * SECOND) == {("rows", None): 0}
    first = breaches[0]
    assert (first.n_rows, first.n_held, first.examples) == (3, 1, [event_id])
    assert first.reason == "2 of 4 rows, as in: 'distance' is 11, expected at most 10"


async def test_what_is_as_expected_is_not_told(judge: Judge, feature_store: FeatureStore, start: datetime) -> None:
    await came_in(feature_store, start + SECOND, Tally(4, 0, start - timedelta(minutes=59), {"carrier": 1}, {}))

    assert told(await judge.judge(), start + SECOND) == {}


async def test_a_feed_that_falls_silent_grows_stale(feature_store: FeatureStore, publisher: Publisher, start: datetime) -> None:
    judge = make_judge(feature_store, publisher, {"window": "1s", "freshness": "1m"})
    await came_in(feature_store, start + SECOND, Tally(1, 0, start - 58 * SECOND, {}, {}))

    breaches = await judge.judge()

    assert told(breaches, start + 2 * SECOND) == {}
    assert told(breaches, start + 3 * SECOND) == {("freshness", None): 61}


async def test_a_time_in_which_nobody_counted_is_not_judged(judge: Judge, feature_store: FeatureStore, start: datetime) -> None:
    """As when nothing was expected of the set for a while."""
    long_ago = start - timedelta(days=3)
    async with feature_store.shards[0].begin() as db:
        await judging._save(db, QualityWindow("flights", long_ago - SECOND, long_ago, Tally()), [])
    await came_in(feature_store, start + SECOND, Tally(9, 0, start, {}, {}))

    breaches = await judge.judge()

    assert min(breach.window_to for breach in breaches) == start + SECOND


async def test_shards_count_together(new_postgres: Any, publisher: Publisher, start: datetime) -> None:
    async with open_feature_store([new_postgres().url for _ in range(2)]) as store:
        for shard in range(2):
            await came_in(store, start + SECOND, Tally(1, 0, start, {}, {}), shard)

        assert told(await make_judge(store, publisher).judge(), start + SECOND) == {}


async def test_two_judges_and_a_repeat_tell_once(judge: Judge, feature_store: FeatureStore, publisher: Publisher, start: datetime) -> None:
    await came_in(feature_store, start + SECOND, Tally(9, 0, start, {}, {}))

    found = await asyncio.gather(judge.judge(), make_judge(feature_store, publisher).judge())
    again = await judge.judge()

    assert [breach.value for breaches in (*found, again) for breach in breaches if breach.value] == [9]


async def test_a_window_waits_for_writers_that_are_on_their_way(judge: Judge, feature_store: FeatureStore) -> None:
    async with feature_store.shards[0].begin() as db:
        created_at = await rows.write_time(db)
        await came_in(feature_store, created_at - 2 * SECOND, Tally(2, 0, created_at, {}, {}))
        await asyncio.sleep(1.1)  # their window is over
        task = asyncio.create_task(judge.judge())
        await asyncio.sleep(0.1)
        assert not task.done()
        await tallies.save(db, {"flights": Tally(7, 0, created_at, {}, {})}, created_at)
    breaches = await task

    assert 7 in [breach.n_rows for breach in breaches]


async def test_a_window_that_does_not_wait_misses_them(judge: Judge, feature_store: FeatureStore) -> None:
    """The control."""

    class Hasty(FeatureStore):
        async def pass_snapshot(self, snapshot_time: datetime | None = None) -> datetime:
            return snapshot_time or datetime.now(UTC)

    hasty = make_judge(Hasty(feature_store.shards), Publisher("127.0.0.1:9"))
    async with feature_store.shards[0].begin() as db:
        created_at = await rows.write_time(db)
        await came_in(feature_store, created_at - 2 * SECOND, Tally(2, 0, created_at, {}, {}))
        await asyncio.sleep(1.1)
        early = await hasty.judge()
        await tallies.save(db, {"flights": Tally(7, 0, created_at, {}, {})}, created_at)

    assert 7 not in [breach.n_rows for breach in early + await judge.judge()]


async def test_a_breach_reaches_kafka_and_is_shown(
    feature_store: FeatureStore, kafka: str, records: Any, start: datetime, http: Any, definitions: Definitions
) -> None:
    definitions.put(feature_set(QUALITY), 2)
    await came_in(feature_store, start + SECOND, Tally(9, 0, start, {}, {}))
    publisher = Publisher(kafka)
    try:
        breaches = await make_judge(feature_store, publisher).judge()
        await Relay(feature_store.shards[0], OUTBOX, publisher).send_batch()
    finally:
        await publisher.close()

    sent = [QualityBreached.model_validate_json(record.value) for record in await records.read(QualityBreached.topic.name)]
    assert sorted(sent, key=lambda breach: breach.window_to) == breaches
    windows = (await http.get("/v1/quality/flights")).json()["windows"]
    assert (windows[0]["n_rows"], [found["reason"] for found in windows[0]["breaches"]]) == (
        9,
        ["9 rows came in 0:00:01, expected at most 4"],
    )


@pytest.mark.parametrize(
    ("quality", "reason"),
    [
        ({"features": {"wings": {"min": 1}}}, "'wings', which is not a feature"),
        ({"features": {"carrier": {"min": 1}}}, "min and max are for numbers, 'carrier' is a category"),
        ({"features": {"distance": {"one_of": ["a"]}}}, "one_of is for categories, 'distance' is a number"),
        ({"window": "30d"}, "a window lasts from 1 s to 7 d"),
        ({"freshnes": "1h"}, "Extra inputs are not permitted"),
    ],
)
def test_an_expectation_that_makes_no_sense_is_refused(quality: dict[str, Any], reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        feature_set(quality)
