from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from mojomesh_contracts.bundles import BundleSchema, Cause, ChampionComparison, Column, Manifest
from mojomesh_contracts.definitions import Aggregate, Feature, FeatureSet, Gate, Model
from mojomesh_contracts.events import Metrics
from mojomesh_registry.gate import Champion, refusals, schema_problems

NOW = datetime(2013, 5, 1, tzinfo=UTC)
GATE = Gate(metric="auc", min=0.6, min_gain_over_champion=-0.005, max_calibration_error=0.1)
CHAMPION = Champion(version=3, bundle_digest="c3")


def metrics(**values: Any) -> Metrics:
    return Metrics(n_rows=1000, **values)


def compared(champion: Metrics, challenger: Metrics, digest: str = "c3") -> ChampionComparison:
    return ChampionComparison(champion_version=3, champion_digest=digest, champion=champion, challenger=challenger)


def manifest(own: Metrics, comparison: ChampionComparison | None = None) -> Manifest:
    definition = Model.model_validate(
        {
            "name": "delay",
            "spine": "flights",
            "label": {"feature_set": "arrivals", "column": "late", "type": "binary"},
            "features": [{"feature_set": "flights"}],
            "algorithm": {"name": "gbm"},
            "walk_forward": {"n_windows": 2, "train": "expanding", "test": "15d", "step": "15d"},
        }
    )
    return Manifest(
        model="delay",
        run_id=uuid4(),
        cause=Cause(kind="requested", event_id=uuid4(), reason="test"),
        definition=definition,
        snapshot_time=NOW,
        snapshot_digest="d",
        snapshot_path="snapshots/d",
        n_rows=1000,
        train_from=NOW,
        train_to=NOW,
        folds=[],
        metrics=own,
        naive=metrics(auc=0.5),
        parity=0.0,
        comparison=comparison,
        fold_runner="local",
        algorithm="gbm",
        params={},
        seed=1,
        pins={},
        created_at=NOW,
    )


GOOD = metrics(auc=0.70, calibration_error=0.05)

CASES: dict[str, tuple[Gate, Manifest, Champion | None, str | None]] = {
    "a first version above the minimum passes": (GATE, manifest(metrics(auc=0.61)), None, None),
    "a first version at the minimum passes": (GATE, manifest(metrics(auc=0.6)), None, None),
    "a first version below the minimum is refused": (
        GATE,
        manifest(metrics(auc=0.5999)),
        None,
        "auc 0.5999 is below the gate's minimum 0.6",
    ),
    "a first version meets the minimum alone, whatever its calibration": (
        GATE,
        manifest(metrics(auc=0.7, calibration_error=0.9)),
        None,
        None,
    ),
    "a gate without a minimum lets any first version pass": (Gate(), manifest(metrics(auc=0.1)), None, None),
    "a metric that is not reported is refused": (GATE, manifest(metrics(logloss=0.1)), None, "reports no auc"),
    "a metric that is no number is refused": (GATE, manifest(metrics(auc=float("nan"))), None, "reports no auc"),
    "a greatest logloss is a limit from above": (
        Gate(metric="logloss", min=0.4),
        manifest(metrics(logloss=0.41)),
        None,
        "logloss 0.4100 is above the gate's limit 0.4",
    ),
    "a logloss below the limit passes": (Gate(metric="logloss", min=0.4), manifest(metrics(logloss=0.39)), None, None),
    "a better version than the champion passes": (
        GATE,
        manifest(GOOD, compared(metrics(auc=0.66), metrics(auc=0.70))),
        CHAMPION,
        None,
    ),
    "a loss within what the gate tolerates passes": (
        GATE,
        manifest(GOOD, compared(metrics(auc=0.705), metrics(auc=0.700))),
        CHAMPION,
        None,
    ),
    "a loss beyond it is refused": (
        GATE,
        manifest(GOOD, compared(metrics(auc=0.706), metrics(auc=0.700))),
        CHAMPION,
        "auc 0.7000 against the champion's 0.7060 on 1000 rows is a gain of -0.0060, the gate asks for -0.005",
    ),
    "a gain in logloss is a fall": (
        Gate(metric="logloss", min_gain_over_champion=0.01),
        manifest(metrics(logloss=0.38), compared(metrics(logloss=0.40), metrics(logloss=0.38))),
        CHAMPION,
        None,
    ),
    "a rise in logloss is refused": (
        Gate(metric="logloss", min_gain_over_champion=0.0),
        manifest(metrics(logloss=0.41), compared(metrics(logloss=0.40), metrics(logloss=0.41))),
        CHAMPION,
        "is a gain of -0.0100",
    ),
    "a later version also meets the minimum": (
        GATE,
        manifest(metrics(auc=0.55, calibration_error=0.01), compared(metrics(auc=0.5), metrics(auc=0.55))),
        CHAMPION,
        "below the gate's minimum",
    ),
    "a later version is calibrated": (
        GATE,
        manifest(metrics(auc=0.7, calibration_error=0.11), compared(metrics(auc=0.6), metrics(auc=0.7))),
        CHAMPION,
        "calibration error 0.1100 is above the gate's limit 0.1",
    ),
    "a calibration that is not reported is refused when the gate limits it": (
        GATE,
        manifest(metrics(auc=0.7), compared(metrics(auc=0.6), metrics(auc=0.7))),
        CHAMPION,
        "reports no calibration error",
    ),
    "a later version that was not compared is refused": (GATE, manifest(GOOD), CHAMPION, "not compared with the champion, version 3"),
    "a comparison with a version that is not champion any more is refused": (
        GATE,
        manifest(GOOD, compared(metrics(auc=0.6), metrics(auc=0.7), digest="c2")),
        CHAMPION,
        "version 3 has become the champion meanwhile: train again",
    ),
    "a comparison without the gate's metric is refused": (
        GATE,
        manifest(GOOD, compared(metrics(logloss=0.6), metrics(logloss=0.5))),
        CHAMPION,
        "the comparison with the champion has no auc",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gate(case: str) -> None:
    gate, offered, champion, expected = CASES[case]
    found = refusals(gate, offered, champion)
    if expected is None:
        assert found == []
    else:
        assert any(expected in reason for reason in found), found


def test_every_reason_is_named_at_once() -> None:
    bad = manifest(metrics(auc=0.5, calibration_error=0.5), compared(metrics(auc=0.7), metrics(auc=0.5)))
    assert len(refusals(GATE, bad, CHAMPION)) == 3


FLIGHTS = FeatureSet(
    name="flights",
    entity="flight_id",
    features={"carrier": Feature(type="category"), "distance": Feature(type="number")},
    aggregates={"before": Aggregate(function="last", of="flights.carrier", by={"carrier": "carrier"}, window=timedelta(hours=2))},
    computed={"far": "distance > 1000"},
)


def schema(*columns: tuple[str, str, Any]) -> BundleSchema:
    named = [Column(name=feature, feature_set=name, feature=feature, type=kind) for name, feature, kind in columns]
    return BundleSchema(columns=named, label="late", classes=["0", "1"])


def test_a_schema_that_the_feature_sets_still_give_has_no_problems() -> None:
    stored = ("flights", "carrier", "category"), ("flights", "distance", "number")
    derived = ("flights", "before", "category"), ("flights", "far", "boolean")

    assert schema_problems(schema(*stored, *derived), {"flights": FLIGHTS}) == []


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (("weather", "temp", "number"), "needs the feature set 'weather', which is not defined"),
        (("flights", "origin", "category"), "'origin', which is not a feature of 'flights'"),
        (("flights", "far", "number"), "was trained as a number, 'flights' now has a boolean"),
        (("flights", "distance", "category"), "was trained as a category, 'flights' now has a number"),
    ],
)
def test_a_column_that_the_feature_sets_cannot_give_is_named(column: tuple[str, str, Any], expected: str) -> None:
    (problem,) = schema_problems(schema(column), {"flights": FLIGHTS})
    assert expected in problem
