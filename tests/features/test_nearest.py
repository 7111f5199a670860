"""Vectors by nearness: those true at a time, as known at another, and nearly all that an exact search finds."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest
from sqlalchemy import text

from mojomesh_chassis.database import open_database
from mojomesh_chassis.definitions import Definitions
from mojomesh_contracts.definitions import DefinitionError, FeatureSet, incompatible_changes, parse_definition
from mojomesh_contracts.events import EventReceived
from mojomesh_features.nearest import Neighbours
from mojomesh_features.retiring import Retired
from mojomesh_ingest import checking
from mojomesh_store import embeddings, erasure
from mojomesh_store.embeddings import Asked
from mojomesh_store.shards import FeatureStore, Shard, open_feature_store
from mojomesh_store.tables import FeatureRow
from tests.features.making import NOON

HOUR = timedelta(hours=1)
EVER = NOON + 1000 * HOUR, datetime(2100, 1, 1, tzinfo=NOON.tzinfo)
N_DIMENSIONS = 8


def articles(vector: dict[str, Any] | None = None, **features: Any) -> FeatureSet:
    declared = {"words": {"type": "number"}, "embedding": vector or {"type": f"vector({N_DIMENSIONS})"}} | features
    found = parse_definition({"kind": "FeatureSet", "name": "articles", "entity": "article", "features": declared})
    assert isinstance(found, FeatureSet)
    return found


ARTICLES = articles()


def article(entity_id: str, at: datetime, vector: Sequence[float] | None) -> EventReceived:
    vectors = {} if vector is None else {"embedding": [float(number) for number in vector]}
    fields = {"event_id": uuid4(), "feature_set": "articles", "entity_id": entity_id, "event_time": at, "values": {"words": 3}}
    return EventReceived.model_validate({**fields, "vectors": vectors})


async def store(feature_store: FeatureStore, *events: EventReceived) -> list[FeatureRow]:
    stored = []
    for shard, part in feature_store.split(events):
        stored += await checking.append(feature_store, feature_store.n_placed, shard, part, {}, {"articles": ARTICLES})
    return stored


def asked(vector: Sequence[float], k: int = 10, at: datetime = EVER[0], known: datetime = EVER[1]) -> Asked:
    return Asked("articles", "embedding", ARTICLES.vectors["embedding"], [float(number) for number in vector], k, at, known)


async def found(shard: Shard, which: Asked, exact: bool = False) -> list[tuple[str, datetime]]:
    async with shard.begin() as db:
        return [(near.entity_id, near.event_time) for near in await embeddings.nearest(db, which, exact)]


def direction(degrees: float) -> list[float]:
    return [float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees))), *[0.0] * (N_DIMENSIONS - 2)]


async def test_a_vector_counts_while_its_row_does(feature_store: FeatureStore) -> None:
    (shard,) = feature_store.shards
    first = await store(feature_store, article("a", NOON, direction(1)), article("b", NOON, direction(5)), article("c", NOON, direction(9)))
    await store(feature_store, article("a", NOON, direction(80)))  # a correction
    await store(feature_store, article("b", NOON + HOUR, None))  # a later row without

    east = direction(0)
    assert await found(shard, asked(east)) == [("c", NOON), ("a", NOON)]
    assert await found(shard, asked(east, at=NOON)) == [("b", NOON), ("c", NOON), ("a", NOON)]
    assert await found(shard, asked(east, known=first[0].created_at)) == [("a", NOON), ("b", NOON), ("c", NOON)]
    assert await found(shard, asked(east, at=NOON - HOUR)) == []
    assert await found(shard, asked(east, k=1, at=NOON)) == [("b", NOON)]


class Library:
    """Many articles, each with some versions, and a plain model of what is nearest."""

    def __init__(self) -> None:
        self.dice = np.random.default_rng(7)
        centres = self.dice.normal(size=(30, N_DIMENSIONS))
        self.vectors = centres[self.dice.integers(30, size=6_000)] + 0.3 * self.dice.normal(size=(6_000, N_DIMENSIONS))
        self.events = [article(f"A{n % 2_500}", NOON + int(self.dice.integers(100)) * HOUR, row) for n, row in enumerate(self.vectors)]
        self.rows: list[FeatureRow] = []

    async def store(self, feature_store: FeatureStore) -> None:
        for begin in range(0, 6_000, 1_000):
            self.rows += await store(feature_store, *self.events[begin : begin + 1_000])

    def nearest(self, which: Asked) -> list[tuple[str, datetime]]:
        last: dict[str, int] = {}
        for n, row in enumerate(self.rows):
            if row.event_time <= which.at and row.created_at <= which.snapshot_time:
                before = self.rows[last[row.entity_id]] if row.entity_id in last else None
                if before is None or (row.event_time, row.created_at, row.seq) > (before.event_time, before.created_at, before.seq):
                    last[row.entity_id] = n
        places = np.array(list(last.values()))
        query = np.array(which.vector)
        vectors = self.vectors[places]
        cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
        best = places[np.argsort(-cosines)[: which.k]]
        return [(self.rows[n].entity_id, self.rows[n].event_time) for n in best]


async def test_an_exact_search_is_what_the_definition_says_and_the_index_finds_nearly_all_of_it(
    feature_store: FeatureStore, postgres: Any
) -> None:
    library = Library()
    await library.store(feature_store)
    async with open_database(postgres.owner_url) as owner, owner.begin() as db:
        await db.execute(text("ANALYZE store.embeddings"))
        await db.execute(text("ANALYZE store.feature_rows"))
    (shard,) = feature_store.shards
    moments = [
        EVER,
        (NOON + 40 * HOUR, EVER[1]),
        (EVER[0], library.rows[2_999].created_at),
        (NOON + 2 * HOUR, library.rows[1_999].created_at),
    ]
    for at, known in moments:
        recalls = []
        for _ in range(10):
            which = asked(library.vectors[library.dice.integers(6_000)] + 0.1, at=at, known=known)
            expected = library.nearest(which)
            assert await found(shard, which, exact=True) == expected
            by_index = await found(shard, which)
            assert len(by_index) == 10
            recalls.append(len(set(expected) & set(by_index)) / 10)
        assert np.mean(recalls) >= 0.95, (at, known, recalls)

    rare = asked(library.vectors[0], at=NOON + 2 * HOUR, known=library.rows[1_999].created_at)
    async with shard.begin() as db:
        plan = await explain(db, rare)
        assert "_near on" in plan
        assert "Sort Key: ((embedding" not in plan

        # The control: without reading on, the filter leaves too few of the candidates.
        await db.execute(text("SET LOCAL hnsw.ef_search = 100"))
        await db.execute(text("SET LOCAL hnsw.iterative_scan = off"))
        assert len(await embeddings._nearest(db, rare)) < 10
        await db.execute(text("SET LOCAL hnsw.iterative_scan = relaxed_order"))
        assert len(await embeddings._nearest(db, rare)) == 10


async def explain(db: Any, which: Asked) -> str:
    """The plan that the search by index has."""
    plans: list[str] = []

    class Explaining:
        async def execute(self, statement: Any, parameters: dict[str, Any] | None = None) -> list[Any]:
            if parameters is None:
                await db.execute(statement)
                return []
            told = await db.execute(text(f"EXPLAIN {statement.element.text}"), parameters)
            plans.extend(line for (line,) in told)
            return []

    await embeddings._nearest(Explaining(), which)  # type: ignore[arg-type]  # a session that explains instead
    return "\n".join(plans)


async def test_shards_are_searched_together(new_postgres: Any) -> None:
    async with open_feature_store([new_postgres().url for _ in range(2)]) as feature_store:
        await store(feature_store, *(article(f"A{n}", NOON, direction(n)) for n in range(40)))

        near = await Neighbours(feature_store, Retired()).nearest(asked(direction(0), k=5), False, False)

    assert [row.entity_id for row in near] == ["A0", "A1", "A2", "A3", "A4"]


async def test_over_http(http: httpx.AsyncClient, feature_store: FeatureStore, definitions: Definitions) -> None:
    definitions.put(ARTICLES, 1)
    (row,) = await store(feature_store, article("a", NOON, direction(60)))

    answer = await http.post("/v1/features/articles:nearest", json={"feature": "embedding", "vector": direction(0), "k": 3})

    (near,) = answer.json()["rows"]
    assert near["distance"] == pytest.approx(0.5, abs=1e-6)
    assert (near["entity_id"], near["values"], near["seq"]) == ("a", {"words": 3}, row.seq)
    refused = [
        ({"feature": "words", "vector": [1]}, 404, "has no vector 'words'; it has embedding"),
        ({"feature": "embedding", "vector": [1]}, 422, "must have 8 dimensions, has 1"),
        ({"feature": "embedding", "vector": [0] * 8}, 422, "must not be zero"),
        ({"feature": "embedding", "vector": direction(0), "snapshot_time": "2100-01-01T00:00:00Z"}, 422, "not possible yet"),
    ]
    for body, status, words in refused:
        answer = await http.post("/v1/features/articles:nearest", json=body)
        assert (answer.status_code, words in answer.text) == (status, True), answer.text


async def test_a_vector_is_stored_once_and_forgotten_with_its_row(feature_store: FeatureStore, postgres: Any) -> None:
    (shard,) = feature_store.shards
    event = article("a", NOON, direction(1))
    await store(feature_store, event)
    await store(feature_store, event, article("b", NOON, direction(2)))
    assert await found(shard, asked(direction(0))) == [("a", NOON), ("b", NOON)]

    async with open_database(postgres.owner_url) as owner, owner.begin() as db:
        await erasure.forget_rows(db, "articles", "a")
        assert (await db.execute(text("SELECT entity_id FROM store.embeddings"))).scalars().all() == ["b"]
    await store(feature_store, event)

    assert await found(shard, asked(direction(0))) == [("b", NOON)]


@pytest.mark.parametrize("distance", ["l2", "inner"])
async def test_other_distances(distance: str, feature_store: FeatureStore) -> None:
    (shard,) = feature_store.shards
    declared = articles({"type": "vector(2)", "distance": distance})
    for name, vector in {"far": [9.0, 9.0], "close": [1.0, 1.0]}.items():
        event = article(name, NOON, None).model_copy(update={"vectors": {"embedding": vector}})
        await checking.append(feature_store, feature_store.n_placed, shard, [event], {}, {"articles": declared})

    async with shard.begin() as db:
        near = await embeddings.nearest(db, asked([1, 1])._replace(declared=declared.vectors["embedding"]))

    assert [(row.entity_id, row.distance) for row in near] == (
        [("close", 0.0), ("far", pytest.approx(128**0.5))] if distance == "l2" else [("far", -18.0), ("close", -2.0)]
    )


def test_what_is_declared_as_a_vector() -> None:
    assert ARTICLES.vectors["embedding"].n_dimensions == N_DIMENSIONS
    assert list(ARTICLES.features) == ["words"]
    assert parse_definition(ARTICLES.model_dump(mode="json")) == ARTICLES
    assert incompatible_changes(ARTICLES, articles({"type": "vector(9)"})) == [
        "vector 'embedding' is gone or changes; add a new one instead"
    ]
    for wrong in ({"type": "vector(0)"}, {"type": "vector(2001)"}, {"type": "vector(8)", "min": 1}):
        with pytest.raises(DefinitionError, match="embedding"):
            articles(wrong)


@pytest.mark.parametrize(
    ("vectors", "problem"),
    [
        ({"embedding": [1.0]}, "'embedding' must have 8 dimensions, has 1"),
        ({"embedding": [0.0] * 8}, "'embedding' must not be zero"),
        ({"embedding": [1e39] * 8}, "'embedding' must be of finite numbers"),
        ({"words": [1.0]}, "'words' is not a vector of 'articles'"),
    ],
)
def test_a_vector_that_cannot_be_one_is_told(vectors: dict[str, list[float]], problem: str) -> None:
    (told,) = ARTICLES.problems_of_vectors(vectors)
    assert problem in told
