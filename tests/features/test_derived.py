"""Derived features: the same value online and in a training set, whatever came late, twice or in another order."""

import random
from collections.abc import Sequence
from datetime import datetime, timedelta
from statistics import fmean
from typing import Any

import pytest

from mojomesh_chassis.definitions import Definitions
from mojomesh_chassis.objects import Objects
from mojomesh_contracts.definitions import parse_definitions
from mojomesh_contracts.events import FeatureValue
from mojomesh_features.reading import FeatureReader
from mojomesh_features.snapshots import Snapshots
from mojomesh_store.tables import FeatureRow
from mojomesh_store.vectors import plan_of
from tests.features.definition import TrainingRow, as_learned
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
    stored: list[FeatureRow] = []
    for start in range(0, len(events), 100):
        stored += await append_all(events[start : start + 100])
    return stored


def expected(rows: Sequence[FeatureRow], carrier: Any, origin: Any, at: datetime, hours: int) -> list[FeatureRow]:
    """The arrivals that a window has, in the order in which they happened."""
    last: dict[Any, FeatureRow] = {}
    for row in sorted((row for row in rows if row.feature_set == "arrivals"), key=lambda row: (row.created_at, row.seq)):
        last[row.entity_id, row.event_time] = row
    of_key = [row for row in last.values() if (row.values.get("carrier"), row.values.get("origin")) == (carrier, origin)]
    within = [row for row in of_key if at - hours * HOUR <= row.event_time < at]
    return sorted(within, key=lambda row: (row.event_time, row.entity_id))


async def test_values_online_and_in_a_training_set_are_equal(
    snapshots: Snapshots, objects: Objects, reader: FeatureReader, append_all: AppendAll, definitions: Definitions
) -> None:
    stored = await a_history(append_all)
    model = definitions.model("delay")
    rows = rows_of(objects, await take(snapshots, model, definitions, max(row.created_at for row in stored)))

    pairs = [(str(row["entity_id"]), int(str(row["event_time"])) * 1000) for row in rows]
    vectors = await reader.vectors(plan_of(model, definitions), pairs)

    online = [{name: as_learned(value) for name, value in vector.values.items()} for vector in vectors if vector is not None]
    assert len(online) == len(rows) > 100
    assert online == [{name: row[name] for name in vector} for row, vector in zip(rows, online, strict=True)]
    assert all(sum(row[name] is not None for row in rows) > 10 for name in online[0])


async def test_aggregates_are_what_their_names_say(
    snapshots: Snapshots, objects: Objects, append_all: AppendAll, definitions: Definitions
) -> None:
    stored = await a_history(append_all)
    rows = rows_of(objects, await take(snapshots, definitions.model("delay"), definitions, max(row.created_at for row in stored)))

    for row in rows:
        arrivals = expected(stored, row["carrier"], row["origin"], _asked(row), 4)
        delays = [value for arrival in arrivals if isinstance(value := arrival.values.get("delay"), float)]
        if row["carrier"] is None or row["origin"] is None:
            wanted: list[FeatureValue] = [None] * 7
        else:
            some = [fmean(delays), min(delays), max(delays), delays[-1]] if delays else [None] * 4
            wanted = [len(delays), sum(delays), *some, len(set(delays))]
        found = [row[f"delay_{name}"] for name in FUNCTIONS]
        for value, one in zip(found, wanted, strict=True):
            assert value == (one if one is None else pytest.approx(one, rel=1e-12))


def _asked(row: TrainingRow) -> datetime:
    return NOON + timedelta(milliseconds=int(str(row["event_time"])) - int(NOON.timestamp() * 1000))
