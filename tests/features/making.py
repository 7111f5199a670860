"""What tests of features are made of."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from mojomesh_contracts.bundles import Baseline, Bins, Column
from mojomesh_contracts.events import EventReceived, FeatureValue, ModelPromoted, Prediction, PredictionsMade
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


COLUMNS = [
    Column(name="distance", feature_set="flights", feature="distance", type="number"),
    Column(name="carrier", feature_set="flights", feature="carrier", type="category", levels=["AA", "UA"]),
]
DECILES = [n / 10 for n in range(1, 10)]
BASELINE = Baseline(
    window=100,
    bins=[
        Bins(column="distance", edges=[1000 * edge for edge in DECILES], counts=[100] * 10 + [0], psi_p99=0.3, kl_p99=0.1),
        Bins(column="carrier", levels=["AA", "UA"], counts=[500, 500, 0, 0], psi_p99=0.05, kl_p99=0.05),
        Bins(column="score", edges=DECILES, counts=[100] * 10 + [0], psi_p99=0.3, kl_p99=0.1),
    ],
)
"""Of rows spread evenly: distances over 0 ... 1000, two carriers, scores over 0 ... 1."""

SPREAD = [((37 * n) % 100) / 100 for n in range(100)]
"""100 values spread evenly over 0 ... 1, in no order."""


def make_promotion(version: int = 1, promotion: int = 1, digest: str = "") -> ModelPromoted:
    return ModelPromoted(
        event_id=uuid4(),
        model="delay",
        version=version,
        bundle_digest=digest or f"digest-{version}",
        promotion=promotion,
        promoted_at=NOON,
        cause="gate",
        caused_by=uuid4(),
    )


def make_predictions(n: int = 100, first: int = 0, drift: float = 0.0, at: datetime = NOON) -> list[Prediction]:
    """One flight an hour from `at` on; even ones as the baseline, but for `drift`, the share of distances that are 1000."""
    return [
        Prediction(
            prediction_id=uuid4(),
            entity_id=f"F{first + index}",
            event_time=at + timedelta(hours=first + index),
            made_at=NOON,
            inputs=[1000.0 if (index % 100) / 100 < drift else 1000 * SPREAD[index % 100], float(index % 2)],
            scores=[1 - SPREAD[index % 100], SPREAD[index % 100]],
        )
        for index in range(n)
    ]


def make_block(predictions: list[Prediction], version: int = 1, digest: str = "") -> PredictionsMade:
    return PredictionsMade(
        event_id=uuid4(),
        model="delay",
        version=version,
        bundle_digest=digest or f"digest-{version}",
        replica="0",
        predictions=predictions,
    )
