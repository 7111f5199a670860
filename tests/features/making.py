"""What tests of features are made of."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from uuid import uuid4

from mojomesh_contracts.events import EventReceived, FeatureValue
from mojomesh_store.tables import FeatureRow

DEFINITIONS = """
kind: FeatureSet
name: flights
entity: flight_id
features:
  carrier: {type: category}
  distance: {type: number, min: 0}
  international: {type: boolean}
  origin: {type: category}
---
kind: FeatureSet
name: weather
entity: airport
features:
  temp: {type: number}
  fog: {type: boolean}
---
kind: FeatureSet
name: crews
entity: flight_id
features:
  size: {type: number}
---
kind: FeatureSet
name: arrivals
entity: flight_id
features:
  late: {type: boolean}
  delay: {type: number}
  cause: {type: category}
---
kind: Model
name: delay
spine: flights
label: {feature_set: arrivals, column: late, type: binary}
features:
  - {feature_set: flights, columns: [carrier, distance, international]}
  - {feature_set: weather, join: origin, max_age: 3h}
  - {feature_set: crews}
algorithm: {name: gbm}
walk_forward: {n_windows: 2, train: expanding, test: 15d, step: 15d}
drift: {psi: 0.25, kl: 0.5, window: 100, confirm: 2, cooldown: 14d}
"""

NOON = datetime(2013, 3, 1, 12, tzinfo=UTC)

Append = Callable[..., Awaitable[FeatureRow]]
AppendAll = Callable[[Iterable[EventReceived]], Awaitable[list[FeatureRow]]]


def make_event(feature_set: str, entity_id: str, at: datetime, values: Mapping[str, FeatureValue]) -> EventReceived:
    return EventReceived(event_id=uuid4(), feature_set=feature_set, entity_id=entity_id, event_time=at, values=dict(values))
