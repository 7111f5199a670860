import asyncio
import json
from datetime import UTC, datetime

import httpx

from mojomesh_chassis.errors import PermanentError, TransientError
from mojomesh_scorer.lookups import FEW_ROWS, EntityAt, FeatureLookup, Found

AT = datetime(2013, 5, 1, tzinfo=UTC)


class Features:
    """Stands in for the features service: answers when it is let, and counts the rows of each call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.let = asyncio.Event()
        self.status = 200
        self.refused = ""

    async def answer(self, request: httpx.Request) -> httpx.Response:
        rows = [row["entity_id"] for row in json.loads(request.content)["rows"]]
        self.calls.append(rows)
        await self.let.wait()
        if self.status != 200 or self.refused in rows:
            return httpx.Response(self.status if self.status != 200 else 422)
        return httpx.Response(200, json={"rows": [{"values": {"carrier": entity_id}} for entity_id in rows]})

    def lookup(self) -> FeatureLookup:
        return FeatureLookup(httpx.AsyncClient(transport=httpx.MockTransport(self.answer)), "http://features")


async def ask(lookup: FeatureLookup, *entity_ids: str) -> list[str]:
    found: list[Found] = await lookup.vectors("flight-delay", [EntityAt(entity_id, AT) for entity_id in entity_ids])
    return [str(row.values["carrier"]) for row in found]


async def until(features: Features, n_calls: int) -> None:
    while len(features.calls) < n_calls:
        await asyncio.sleep(0)


async def test_what_is_asked_while_a_call_is_under_way_goes_together_in_the_next() -> None:
    features = Features()
    lookup = features.lookup()
    first = asyncio.create_task(ask(lookup, "a"))
    await until(features, 1)

    later = [asyncio.create_task(ask(lookup, *names)) for names in ("b", "cd", "e")]
    await asyncio.sleep(0.01)
    features.let.set()

    assert [await task for task in (first, *later)] == [["a"], ["b"], ["c", "d"], ["e"]]
    assert features.calls == [["a"], ["b", "c", "d", "e"]]


async def test_one_that_goes_away_does_not_take_the_answer_of_the_others_with_it() -> None:
    features = Features()
    lookup = features.lookup()
    gone, stays = asyncio.create_task(ask(lookup, "a")), asyncio.create_task(ask(lookup, "b"))
    await until(features, 1)

    gone.cancel()
    features.let.set()

    assert await stays == ["b"]


async def test_a_silent_service_is_told_to_everybody_who_asked() -> None:
    features = Features()
    features.status = 503
    features.let.set()
    lookup = features.lookup()

    answers = await asyncio.gather(ask(lookup, "a"), ask(lookup, "b"), return_exceptions=True)

    assert [type(answer) for answer in answers] == [TransientError, TransientError]


async def test_a_row_that_is_refused_is_refused_to_its_own_caller_only() -> None:
    features = Features()
    features.refused = "bad"
    features.let.set()
    lookup = features.lookup()

    answers = await asyncio.gather(ask(lookup, "a"), ask(lookup, "bad"), ask(lookup, "c"), return_exceptions=True)

    assert answers[0] == ["a"]
    assert isinstance(answers[1], PermanentError)
    assert answers[2] == ["c"]


async def test_a_large_block_does_not_wait_for_others() -> None:
    features = Features()
    lookup = features.lookup()
    first = asyncio.create_task(ask(lookup, "a"))
    await until(features, 1)

    block = asyncio.create_task(ask(lookup, *(f"b{n}" for n in range(FEW_ROWS + 1))))
    await until(features, 2)
    features.let.set()

    assert len(await block) == FEW_ROWS + 1
    assert await first == ["a"]
