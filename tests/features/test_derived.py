"""Derived features: the same value online and in a training set, whatever came late, twice or in another order."""

import random
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.objects import Objects
from mojomesh_contracts.definitions import Model, parse_definitions
from mojomesh_contracts.events import FeatureValue
from mojomesh_features.aggregating import Facts, aggregated
from mojomesh_features.reading import FeatureReader
from mojomesh_features.retiring import Gone, Retired
from mojomesh_features.snapshots import Snapshots
from mojomesh_features.windows import WindowReader
from mojomesh_store import retirement
from mojomesh_store.errors import UnusableDefinition
from mojomesh_store.facts import Fact, Span
from mojomesh_store.online import microseconds, moment
from mojomesh_store.shards import FeatureStore, Shard
from mojomesh_store.tables import FeatureRow
from mojomesh_store.vectors import Vector, Windowed, plan_of
from tests.features.definition import TrainingRow, as_learned, expected_aggregate
from tests.features.making import NOON, AppendAll, make_event
from tests.features.test_snapshots import rows_of, take

HOUR = timedelta(hours=1)
FUNCTIONS = ("count", "sum", "mean", "min", "max", "last", "distinct")

DEFINITIONS = f"""
kind: FeatureSet
name: flights
entity: flight_id
features:
  carrier: {{type: category}}
  origin: {{type: category}}
  distance: {{type: number}}
aggregates:
  arrivals: {{function: count, of: arrivals, by: [carrier], window: 1d}}
  late: {{function: mean, of: arrivals.late, by: [carrier, origin], window: 5h}}
  was_late: {{function: last, of: arrivals.late, by: [carrier], window: 5h}}
  gate: {{function: last, of: arrivals.gate, by: [carrier, origin], window: 5h}}
  gates: {{function: distinct, of: arrivals.gate, by: {{carrier: carrier}}, window: 7h}}
  earlier: {{function: sum, of: flights.distance, by: [flight_id], window: 9h}}
{"".join(f"  delay_{name}: {{function: {name}, of: arrivals.delay, by: [carrier, origin], window: 4h}}{chr(10)}" for name in FUNCTIONS)}
computed:
  slack: distance / (1 + delay_mean)
  hour: hour(event_time, 'America/New_York')
  far: distance > 700
---
kind: FeatureSet
name: weather
entity: airport
features:
  temp: {{type: number}}
aggregates:
  warmest: {{function: max, of: weather.temp, by: {{airport: airport}}, window: 6h}}
computed:
  change: temp - warmest
---
kind: FeatureSet
name: arrivals
entity: flight_id
features:
  carrier: {{type: category}}
  origin: {{type: category}}
  delay: {{type: number}}
  late: {{type: boolean}}
  gate: {{type: category}}
---
kind: Model
name: delay
spine: flights
label: {{feature_set: arrivals, column: late, type: binary}}
features:
  - {{feature_set: flights}}
  - {{feature_set: weather, join: origin, max_age: 3h}}
algorithm: {{name: gbm}}
walk_forward: {{n_windows: 2, train: expanding, test: 15d, step: 15d}}
"""


@pytest.fixture
def definitions() -> Definitions:
    return Definitions(*parse_definitions(DEFINITIONS))


async def a_history(append_all: AppendAll, seed: int = 1, n: int = 300) -> list[FeatureRow]:
    """Events in any order, in several transactions: corrections that change the key, ties of the event time, missing values."""
    random.seed(seed)

    def maybe(value: FeatureValue) -> FeatureValue:
        return value if random.random() < 0.9 else None

    events = []
    for _ in range(n):
        flight, at = f"F{random.randrange(40)}", NOON + random.randrange(-40, 40) * HOUR / 2
        keys = {"carrier": maybe(random.choice(["UA", "AA"])), "origin": maybe(random.choice(["EWR", "JFK"]))}
        events.append(make_event("flights", flight, at, {**keys, "distance": maybe(random.uniform(100, 2000))}))
        arrived = at + random.choice([0, 1, 2, 9]) * HOUR / 2
        delay = {"delay": maybe(random.gauss(10, 30)), "late": maybe(random.random() < 0.4), "gate": maybe(random.choice("ABC"))}
        events.append(make_event("arrivals", flight, arrived, {**keys, **delay}))
        events.append(make_event("weather", random.choice(["EWR", "JFK"]), at, {"temp": maybe(random.gauss(50, 20))}))
    random.shuffle(events)
    events = [event.model_copy(update={"reported_at": event.event_time + random.choice([-1, 0, 0, 2]) * HOUR}) for event in events]
    stored: list[FeatureRow] = []
    for start in range(0, len(events), 100):
        stored += await append_all(events[start : start + 100])
    return stored


async def both(
    model: Model,
    definitions: Definitions,
    snapshots: Snapshots,
    objects: Objects,
    reader: FeatureReader,
    stored: Sequence[FeatureRow],
) -> tuple[list[TrainingRow], list[TrainingRow]]:
    """The vectors of all training rows, online and as training has them."""
    rows = rows_of(objects, await take(snapshots, model, definitions, max(row.created_at for row in stored)))
    pairs = [(str(row["entity_id"]), int(str(row["event_time"])) * 1000) for row in rows]
    vectors = await reader.vectors(plan_of(model, definitions), pairs)
    online = [{name: as_learned(value) for name, value in vector.values.items()} for vector in vectors if isinstance(vector, Vector)]
    return online, [{name: row[name] for name in online[0]} for row in rows]


async def test_values_online_and_in_a_training_set_are_equal(
    snapshots: Snapshots, objects: Objects, reader: FeatureReader, append_all: AppendAll, definitions: Definitions
) -> None:
    stored = await a_history(append_all)

    online, offline = await both(definitions.model("delay"), definitions, snapshots, objects, reader, stored)

    assert online == offline
    assert all(sum(row[name] is not None for row in offline) > 100 for name in online[0])


@pytest.mark.parametrize("known_at", ["snapshot", "row"])
async def test_aggregates_are_what_their_names_say(
    snapshots: Snapshots, objects: Objects, append_all: AppendAll, definitions: Definitions, known_at: str
) -> None:
    stored = await a_history(append_all)
    model, flights = definitions.model("delay").model_copy(update={"known_at": known_at}), definitions.feature_set("flights")
    rows = rows_of(objects, await take(snapshots, model, definitions, max(row.created_at for row in stored)))

    for row in rows:
        at = moment(int(str(row["event_time"])) * 1000)
        known = [fact for fact in stored if known_at == "snapshot" or fact.reported_at <= at]
        flight = stored[0]._replace(entity_id=str(row["entity_id"]), values=row)
        for name, aggregate in flights.aggregates.items():
            wanted = as_learned(expected_aggregate(aggregate, flight, at, known))
            assert row[name] == (pytest.approx(wanted, rel=1e-9, abs=1e-9) if isinstance(wanted, float) else wanted), name


class CountsWhatWasCorrected(WindowReader):
    """As a counter would that only ever adds."""

    stored: Sequence[FeatureRow] = ()

    async def found(
        self, shard: Shard, n_placed: int, feature_set: str, by: Sequence[str | None], features: Sequence[str], spans: Sequence[Span]
    ) -> list[Fact]:
        return [
            Fact(n, row.event_time, row.entity_id, [row.values.get(name) for name in features])
            for n, span in enumerate(spans)
            for row in self.stored
            if row.feature_set == feature_set and span.since <= row.event_time < span.until
            if tuple(row.entity_id if name is None else row.values.get(name) for name in by) == span.key
        ]


async def test_the_comparison_finds_a_reader_that_goes_on_counting_what_was_corrected(
    snapshots: Snapshots,
    objects: Objects,
    reader: FeatureReader,
    feature_store: FeatureStore,
    append_all: AppendAll,
    definitions: Definitions,
) -> None:
    reader.aggregates = counting = CountsWhatWasCorrected(feature_store, Retired())
    counting.stored = await a_history(append_all)

    online, offline = await both(definitions.model("delay"), definitions, snapshots, objects, reader, counting.stored)

    assert [row["hour"] for row in online] == [row["hour"] for row in offline]
    assert [row["arrivals"] for row in online] != [row["arrivals"] for row in offline]


async def test_an_aggregate_changes_when_a_late_event_becomes_known_and_not_before(
    snapshots: Snapshots, reader: FeatureReader, append_all: AppendAll, definitions: Definitions
) -> None:
    keys = {"carrier": "UA", "origin": "EWR"}
    plan, asked = plan_of(definitions.model("delay"), definitions), ("F9", microseconds(NOON))
    early = [make_event("arrivals", f"F{n}", NOON - n * HOUR, {**keys, "delay": n}) for n in range(4)]
    before = (await append_all([*early, make_event("flights", "F9", NOON, keys)]))[-1].created_at

    async def read() -> list[FeatureValue]:
        (vector,) = await reader.vectors(plan, [asked])
        assert isinstance(vector, Vector)
        return [vector.values[name] for name in ("arrivals", "delay_sum", "delay_last")]

    at_first = await read()
    late = [make_event("arrivals", "F7", NOON - HOUR / 2, {**keys, "delay": 40}), make_event("arrivals", "F1", NOON - HOUR, {"delay": 7})]
    after = (await append_all(late))[-1].created_at

    assert at_first == [3, 6, 1]  # at NOON itself nothing counts; F1, F2 and F3 do
    assert await read() == [3, 45, 40]  # F1 has lost its carrier
    told = [vector for (vector,) in await snapshots.vectors(plan, [asked], [before, after])]
    assert [[vector[name] for name in ("arrivals", "delay_sum", "delay_last")] for vector in told] == [[3, 6, 1], [3, 45, 40]]


async def test_events_that_have_left_postgresql_are_not_left_out_in_silence(
    reader: FeatureReader, feature_store: FeatureStore, append_all: AppendAll, definitions: Definitions
) -> None:
    await append_all([make_event("flights", "F9", NOON, {"carrier": "UA", "origin": "EWR"})])
    async with feature_store.shards[0].begin() as db:
        await retirement.announce(db, "arrivals", NOON - 9 * HOUR)
    retired = Retired()
    await retired.look(feature_store)
    reader.aggregates = WindowReader(feature_store, retired)

    with pytest.raises(Gone, match="'arrivals' before 2013-03-01T03:00:00"):
        await reader.vectors(plan_of(definitions.model("delay"), definitions), [("F9", microseconds(NOON))])


def test_a_plan_is_refused_whose_aggregate_names_what_is_not_there(definitions: Definitions) -> None:
    arrivals = definitions.feature_set("arrivals")
    without = {name: feature for name, feature in arrivals.features.items() if name != "gate"}
    definitions.put(arrivals.model_copy(update={"features": without}), 2)

    with pytest.raises(UnusableDefinition, match="aggregate 'gate' of 'flights' names 'gate', which is not a stored feature of 'arrivals'"):
        plan_of(definitions.model("delay"), definitions)


def test_a_value_does_not_depend_on_what_else_is_asked() -> None:
    times = np.arange(100, dtype=np.int64)
    known = (times, np.full(100, 10**6, dtype=np.int64))
    facts = Facts(np.zeros(100, dtype=np.int64), times, {"x": times.astype(np.float64)}, known)
    window = Windowed("w", "sum", "s", "x", "number", (None,), (None,), 50)
    asked = np.repeat(times, 3)
    whole = aggregated(window, facts, np.zeros(300, dtype=np.int64), asked)

    in_pieces = [value for at in asked for value in aggregated(window, facts, np.zeros(1, dtype=np.int64), np.array([at]))]

    assert whole == in_pieces == [float(sum(range(max(at - 50, 0), at))) for at in asked.tolist()]


class FromMemory(WindowReader):
    """Two shards that both have all events of two keys, as may be while entities move."""

    events = tuple((f"k{n % 2}", NOON + n * n * timedelta(seconds=7), f"e{n}", n / 7) for n in range(200))
    n_read = 0

    async def found(
        self, shard: Shard, n_placed: int, feature_set: str, by: Sequence[str | None], features: Sequence[str], spans: Sequence[Span]
    ) -> list[Fact]:
        found = [
            Fact(n, at, entity_id, [value])
            for n, span in enumerate(spans)
            for key, at, entity_id, value in self.events
            if (key,) == span.key and span.since <= at < span.until
        ]
        self.n_read += len(found)
        return found


async def test_windows_that_overlap_are_read_once_and_an_event_on_two_shards_counts_once() -> None:
    store: Any = SimpleNamespace(shards=("one", "two"), n_placed=2, shard_of=lambda entity_id: "two")
    aggregates = [Windowed("w", "sum", "s", "x", "number", ("key",), ("key",), hours * 3_600_000_000) for hours in (1, 9)]
    asked = [(aggregates[n % 2], (f"k{n % 3}",), microseconds(NOON + n * HOUR)) for n in range(60)]
    together = FromMemory(store, Retired())

    answers = await together.at(asked, [])

    counted = set()
    for window in asked:
        aggregate, (key,), at_us = window
        alone = await FromMemory(store, Retired()).at([window], [])
        assert answers[window] == alone[window]
        since, until = moment(at_us - aggregate.window_us), moment(at_us)
        events = [event for event in together.events if event[0] == key and since <= event[1] < until]
        assert answers[window] == pytest.approx(sum(value for _, _, _, value in events))
        counted |= set(events)
    assert together.n_read == 2 * len(counted)
