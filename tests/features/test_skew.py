"""The skew monitor finds vectors that training would have otherwise, and only those."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
from prometheus_client import REGISTRY

from mojomesh_chassis.bundles import Bundle
from mojomesh_chassis.definitions import Definitions
from mojomesh_contracts.bundles import BundleSchema, Column, Golden
from mojomesh_contracts.definitions import Model, parse_definitions
from mojomesh_contracts.events import ModelPromoted, Prediction
from mojomesh_features import tables
from mojomesh_features.champions import Champions
from mojomesh_features.reading import FeatureReader
from mojomesh_features.skew import SkewMonitor
from mojomesh_features.snapshots import Snapshots
from mojomesh_scorer.encoding import Encoder
from mojomesh_store.online import microseconds
from mojomesh_store.shards import FeatureStore
from mojomesh_store.vectors import Vector, plan_of
from tests.features.making import BASELINE, NOON, AppendAll, make_block, make_event, make_promotion
from tests.features.test_derived import DEFINITIONS, HOUR, a_history

GRACE = timedelta(milliseconds=300)
FLIGHTS = [(f"F{n}", NOON + 2 * HOUR) for n in range(40)]


@pytest.fixture
def definitions() -> Definitions:
    return Definitions(*parse_definitions(DEFINITIONS))


class OneBundle:
    """The champion's bundle, without an object store."""

    def __init__(self, schema: BundleSchema, manifest: Any) -> None:
        self._bundle = Bundle(
            folder=Path(),
            digest="digest-1",
            schema=schema,
            baseline=BASELINE,
            golden=Golden(tolerance=0, rows=[]),
            manifest=manifest,
        )

    async def of(self, _: ModelPromoted) -> Bundle:
        return self._bundle


class _Manifest(NamedTuple):
    definition: Model


class Watch:
    """A model that scores by entity, its log of predictions, and the monitor."""

    def __init__(self, reader: FeatureReader, feature_store: FeatureStore, snapshots: Snapshots, definitions: Definitions) -> None:
        self._reader = reader
        self._database = feature_store.shards[0]
        model = definitions.model("delay")
        self._plan = plan_of(model, definitions)
        self.schema = BundleSchema(columns=[_with_levels(column) for column in self._plan.columns], label="late", classes=["0", "1"])
        champions = Champions()
        champions.put(make_promotion())
        bundle: Any = OneBundle(self.schema, _Manifest(model))
        self.monitor = SkewMonitor(snapshots, self._database, champions, bundle, definitions, GRACE)

    async def score(self, flights: Sequence[tuple[str, datetime]], **instead: float) -> int:
        """Log what the model is given for flights; `instead` says what the first is given by mistake. How many have a vector."""
        vectors = await self._reader.vectors(self._plan, [(flight, microseconds(at)) for flight, at in flights])
        made_at = datetime.now(UTC)
        encoder, made = Encoder(self.schema), []
        for (flight, at), vector in zip(flights, vectors, strict=True):
            if isinstance(vector, Vector):
                inputs: list[float | None] = [None if cell != cell else cell for cell in encoder.encode_row(vector.values, {})]
                rows = [row.key(entity) for entity, row in vector.used.items()]
                made.append(
                    Prediction(
                        prediction_id=uuid4(), entity_id=flight, event_time=at, made_at=made_at, inputs=inputs, scores=[0.5], rows=rows
                    )
                )
        for name, value in instead.items():
            made[0].inputs[encoder.places[name]] = value
        async with self._database.begin() as db:
            await tables.save_predictions(db, [make_block(made)])
        return len(made)

    async def compare(self) -> dict[str, int]:
        await asyncio.sleep(1.1 * GRACE.total_seconds())
        return dict((await self.monitor.check()).get("delay", {}))


def _with_levels(column: Column) -> Column:
    return column.model_copy(update={"levels": ["AA", "UA", "EWR", "JFK", "A", "B"]}) if column.type == "category" else column


@pytest.fixture
async def watch(
    reader: FeatureReader, feature_store: FeatureStore, snapshots: Snapshots, definitions: Definitions, append_all: AppendAll
) -> Watch:
    await a_history(append_all)
    await asyncio.sleep(1.1 * GRACE.total_seconds())
    return Watch(reader, feature_store, snapshots, definitions)


def measured(outcome: str) -> float:
    return REGISTRY.get_sample_value("mojomesh_features_skew_vectors_total", {"model": "delay", "outcome": outcome}) or 0.0


async def test_what_a_model_was_given_is_what_training_has_of_that_time(watch: Watch, append_all: AppendAll) -> None:
    n = await watch.score(FLIGHTS)
    before = measured("equal")
    await asyncio.sleep(1.1 * GRACE.total_seconds())
    late = [make_event("arrivals", f"F{n}", NOON + HOUR, {"carrier": "UA", "origin": "EWR", "delay": 300 + n}) for n in range(40)]
    await append_all(late)

    assert await watch.compare() == {"equal": n, "mismatched": 0, "unsettled": 0}
    assert n > 30
    assert measured("equal") - before == n
    assert REGISTRY.get_sample_value("mojomesh_features_skew_mismatch_rate", {"model": "delay"}) == 0
    assert await watch.compare() == {}  # nothing new

    assert (await watch.score(FLIGHTS), await watch.compare()) == (n, {"equal": n, "mismatched": 0, "unsettled": 0})


@pytest.mark.parametrize("column", ["delay_mean", "hour", "distance", "weather.warmest", "carrier"])
async def test_a_model_that_was_given_something_else_is_found(watch: Watch, column: str) -> None:
    n = await watch.score(FLIGHTS, **{column: 5.0 if column == "carrier" else 0.125})

    assert await watch.compare() == {"equal": n - 1, "mismatched": 1, "unsettled": 0}
    assert REGISTRY.get_sample_value("mojomesh_features_skew_mismatch_rate", {"model": "delay"}) == pytest.approx(1 / n)


async def test_what_becomes_known_at_the_time_of_the_prediction_settles_nothing(watch: Watch, append_all: AppendAll) -> None:
    flight = make_event("flights", "F99", NOON, {"carrier": "UA", "origin": "EWR", "distance": 7})
    await append_all([flight])
    await asyncio.sleep(1.1 * GRACE.total_seconds())

    await watch.score([("F99", NOON)], distance=8.0)
    await append_all([flight.model_copy(update={"event_id": uuid4(), "values": {"carrier": "UA", "origin": "EWR", "distance": 9}})])

    assert await watch.compare() == {"equal": 0, "mismatched": 0, "unsettled": 1}
