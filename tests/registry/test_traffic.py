"""Who scores beside the champion: shares, shadows, and what a promotion makes of them."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from mojomesh_contracts.bundles import BundleSchema, Column
from mojomesh_contracts.drift import psi
from mojomesh_contracts.events import LeftOut, ShadowCompared, TrafficFollowed, TrafficSet
from mojomesh_contracts.traffic import BUCKETS, bucket_of
from mojomesh_registry.traffic import allot

CARRIER = Column(name="carrier", feature_set="flights", feature="carrier", type="category", levels=["AA", "B6"])
DISTANCE = Column(name="distance", feature_set="flights", feature="distance", type="number")


async def versions(loop: Any, n: int, **changed: Any) -> None:
    """Version 1 is the champion; the others did not pass the gate."""
    await loop.offer(loop.make_bundle())
    await loop.version(1)
    for number in range(2, n + 1):
        await loop.offer(loop.make_bundle(auc=0.55, **changed))
        await loop.version(number)


async def put(loop: Any, *challengers: dict[str, Any]) -> httpx.Response:
    answer: httpx.Response = await loop.http.put("/v1/models/delay/traffic", json={"challengers": challengers}, headers=loop.token)
    return answer


async def test_shares_become_buckets_that_scorer_is_told(loop: Any) -> None:
    await versions(loop, 3)

    answer = await put(loop, {"version": 2, "share": 0.05}, {"version": 3})

    assert answer.status_code == 200, answer.text
    assert [(one["version"], one["share"]) for one in answer.json()["challengers"]] == [(2, 0.05), (3, None)]
    (told,) = await loop.heard(TrafficSet, 1)
    assert [(one.version, len(one.buckets)) for one in told.challengers] == [(2, 50), (3, 0)]
    assert [one.bundle_digest for one in told.challengers] == [(await loop.version(number))["bundle_digest"] for number in (2, 3)]
    assert (await loop.http.get("/v1/models/delay/traffic")).json() == answer.json()
    assert (await loop.model())["challengers"] == answer.json()["challengers"]


@pytest.mark.parametrize(
    ("challengers", "reason"),
    [
        ([{"version": 1, "share": 0.1}], "version 1 is the champion"),
        ([{"version": 7, "share": 0.1}], "has no version 7"),
        ([{"version": 2, "share": 0.5}, {"version": 3, "share": 0.401}], "sum up to 0.901"),
        ([{"version": number} for number in (2, 3, 4, 5)], "at most 3"),
        ([{"version": 2, "share": 0.1}, {"version": 2}], "named twice"),
        ([{"version": 2, "share": 0.0001}], "decimal places"),
    ],
)
async def test_traffic_that_cannot_be_is_refused_with_the_reason(loop: Any, challengers: list[dict[str, Any]], reason: str) -> None:
    await versions(loop, 5)
    answer = await put(loop, *challengers)
    assert answer.is_client_error
    assert reason in answer.text
    assert (await loop.http.get("/v1/models/delay/traffic")).json()["setting"] == 0


async def test_setting_traffic_needs_the_token_and_a_champion(loop: Any) -> None:
    await loop.offer(loop.make_bundle(auc=0.55))
    await loop.version(1)
    assert (await loop.http.put("/v1/models/delay/traffic", json={"challengers": []})).status_code == 401
    assert "has no champion" in (await put(loop, {"version": 1, "share": 0.1})).text


async def test_a_shadow_needs_only_columns_of_the_champions_and_a_challenger_all_of_them(loop: Any) -> None:
    await loop.offer(loop.make_bundle(schema=BundleSchema(columns=[CARRIER], label="late", classes=["0", "1"])))
    await loop.version(1)
    await loop.offer(loop.make_bundle(auc=0.55))  # with a distance
    await loop.version(2)

    as_shadow, as_challenger = await put(loop, {"version": 2}), await put(loop, {"version": 2, "share": 0.1})
    await loop.post("/v1/models/delay/versions/2:promote", force=True, reason="more columns")
    other_way = [await put(loop, {"version": 1}), await put(loop, {"version": 1, "share": 0.1})]

    assert as_challenger.status_code == 200
    assert as_shadow.status_code == 422
    assert "version 2 cannot be a shadow of version 1: version 1 does not have version 2's column distance" in as_shadow.text
    assert [answer.status_code for answer in other_way] == [200, 422]
    assert "version 1 cannot be a challenger of version 2: version 1 does not have version 2's column distance" in other_way[1].text


async def test_a_challenger_that_is_promoted_leaves_and_the_others_keep_their_entities(loop: Any) -> None:
    await versions(loop, 3)
    await put(loop, {"version": 2, "share": 0.2}, {"version": 3, "share": 0.1})

    await loop.post("/v1/models/delay/versions/2:promote", force=True, reason="better live")
    await loop.post("/v1/models/delay:rollback")
    again = await put(loop, {"version": 2, "share": 0.2}, {"version": 3, "share": 0.1})
    await loop.post("/v1/models/delay/versions/2:promote", force=True, reason="better live")

    first, left, _, _ = told = await loop.heard(TrafficSet, 4)
    assert [event.setting for event in told] == [1, 2, 3, 4]
    assert left.challengers == first.challengers[1:]
    assert again.status_code == 200
    assert [one["version"] for one in (await loop.http.get("/v1/models/delay/traffic")).json()["challengers"]] == [3]


async def test_a_shadow_that_cannot_score_a_new_champions_rows_ends(loop: Any) -> None:
    await versions(loop, 2)
    await loop.offer(loop.make_bundle(auc=0.55, schema=BundleSchema(columns=[CARRIER], label="late", classes=["0", "1"])))
    await loop.version(3)
    await put(loop, {"version": 2})

    await loop.post("/v1/models/delay/versions/3:promote", force=True, reason="fewer columns")

    assert [len(event.challengers) for event in await loop.heard(TrafficSet, 2)] == [1, 0]


async def test_traffic_shows_what_each_scorer_said_last_of_it(loop: Any) -> None:
    await versions(loop, 2)
    await put(loop, {"version": 2, "share": 0.1})
    refused = TrafficFollowed(
        event_id=uuid4(),
        model="delay",
        setting=1,
        replica="0",
        followed_at=datetime.now(UTC),
        left_out=[LeftOut(version=2, reason="golden rows differ")],
    )
    later = {"event_id": uuid4(), "followed_at": refused.followed_at + timedelta(seconds=1)}
    taken = refused.model_copy(update={**later, "left_out": []})

    async def followers(n_left_out: int) -> list[dict[str, Any]]:
        while True:
            found: list[dict[str, Any]] = (await loop.http.get("/v1/models/delay/traffic")).json()["followers"]
            if found and len(found[0]["left_out"]) == n_left_out:
                return found
            await asyncio.sleep(0.02)

    await loop.publish(refused)
    (follower,) = await followers(1)
    assert (follower["replica"], follower["setting"]) == ("0", 1)
    assert follower["left_out"] == [{"version": 2, "reason": "golden rows differ"}]

    await loop.publish(taken)
    await followers(0)
    await loop.publish(refused, taken.model_copy(update={"replica": "1"}))  # a repeat comes late, and changes nothing
    while len(found := await followers(0)) < 2:
        await asyncio.sleep(0.02)
    assert [follower["left_out"] for follower in found] == [[], []]


async def test_the_last_word_of_each_worker_on_a_shadow_counts_once(loop: Any) -> None:
    first = ShadowCompared(
        event_id=uuid4(),
        model="delay",
        version=1,
        shadow_version=2,
        counter=uuid4(),
        counted_at=datetime.now(UTC),
        n_rows=10,
        n_dropped=1,
        edges=[0.5],
        counts=[7, 3, 0],
        shadow_counts=[4, 6, 0],
        sum_of_differences=2.0,
        n_agreed=7,
    )
    more = first.model_copy(update={"event_id": uuid4(), "n_rows": 20, "counts": [14, 6, 0], "shadow_counts": [9, 11, 0], "n_agreed": 15})
    other = first.model_copy(update={"event_id": uuid4(), "counter": uuid4(), "sum_of_differences": 4.0})

    await loop.publish(first, more, first, other)

    while not (found := (await loop.http.get("/v1/models/delay/shadows")).json()["shadows"]) or found[0]["n_rows"] < 30:
        pass
    (shadow,) = found
    assert (shadow["n_rows"], shadow["n_dropped"], shadow["counts"], shadow["shadow_counts"]) == (30, 2, [21, 9, 0], [13, 17, 0])
    assert shadow["psi"] == pytest.approx(psi([21, 9, 0], [13, 17, 0]))
    assert (shadow["mean_absolute_difference"], shadow["agreement"]) == (pytest.approx(6 / 30), pytest.approx(22 / 30))


def test_entities_move_only_between_the_champion_and_the_version_whose_share_changed() -> None:
    steps = [{2: 100, 3: 100, 4: 100}, {2: 300, 3: 100, 4: 100}, {2: 300, 3: 50, 4: 200}, {3: 50, 4: 400}, {2: 100, 3: 50, 4: 400}]
    before: dict[int, list[int]] = {}
    for wanted in steps:
        after = allot(before, wanted)
        assert {version: len(buckets) for version, buckets in after.items()} == wanted
        assert len({bucket for buckets in after.values() for bucket in buckets}) == sum(wanted.values())
        for version in wanted.keys() | before.keys():
            old, new = set(before.get(version, [])), set(after.get(version, []))
            assert old <= new or new <= old
            others = {bucket for other, buckets in before.items() if other != version for bucket in buckets}
            assert not (new - old) & others
        before = after


def test_shares_of_hashed_entities_are_the_shares_that_were_set() -> None:
    buckets = allot({}, {2: 50, 3: 300})
    version_of = {bucket: version for version, of_version in buckets.items() for bucket in of_version}
    n = 10_000
    scored = Counter(version_of.get(bucket_of("delay", f"entity {number}"), 1) for number in range(n))
    for version, share in {1: 0.65, 2: 0.05, 3: 0.3}.items():
        assert abs(scored[version] - n * share) < 3 * (n * share * (1 - share)) ** 0.5
    assert 0 <= bucket_of("delay", "x") < BUCKETS
