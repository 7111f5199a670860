"""May a new version become the champion? Pure: what it is judged by comes in, reasons in words come out."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mojomesh_contracts.bundles import BundleSchema, Manifest
from mojomesh_contracts.definitions import FeatureSet, Gate, kind_of
from mojomesh_contracts.events import Metrics

HIGHER_IS_BETTER = frozenset({"auc"})
DIGITS = 9  # 0.700 - 0.705 is a little less than -0.005 in binary; no metric is known to nine digits


@dataclass(frozen=True)
class Champion:
    """What the gate must know of the version in force."""

    version: int
    bundle_digest: str


def refusals(gate: Gate, manifest: Manifest, champion: Champion | None) -> list[str]:
    """Why the version described by `manifest` may not be promoted; empty when it may.

    The first version meets `min` alone. Later ones are also compared with the champion, on rows whose labels became known after the
    champion's snapshot; a comparison with a version that is no longer the champion says nothing.
    """
    found = list(_floor(gate, manifest.metrics))
    if champion is not None:
        found += _gain(gate, manifest, champion)
        found += _calibration(gate, manifest.metrics)
    return found


def schema_problems(schema: BundleSchema, feature_sets: Mapping[str, FeatureSet]) -> list[str]:
    """What the model was trained on that the live feature sets cannot give it; empty when they can give all."""
    found = []
    for column in schema.columns:
        feature_set = feature_sets.get(column.feature_set)
        kind = kind_of(feature_set, column.feature, feature_sets) if feature_set else None
        if feature_set is None:
            found.append(f"column '{column.name}' needs the feature set '{column.feature_set}', which is not defined")
        elif kind is None:
            found.append(f"column '{column.name}' needs '{column.feature}', which is not a feature of '{column.feature_set}'")
        elif kind != column.type:
            found.append(f"column '{column.name}' was trained as a {column.type}, '{column.feature_set}' now has a {kind}")
    return found


def _floor(gate: Gate, metrics: Metrics) -> Iterator[str]:
    if gate.min is None:
        return
    value = _metric(metrics, gate.metric)
    if value is None:
        yield f"the bundle reports no {gate.metric}, which the gate asks for"
    elif gate.metric in HIGHER_IS_BETTER and value < gate.min:
        yield f"{gate.metric} {value:.4f} is below the gate's minimum {gate.min:g}"
    elif gate.metric not in HIGHER_IS_BETTER and value > gate.min:
        yield f"{gate.metric} {value:.4f} is above the gate's limit {gate.min:g}"


def _gain(gate: Gate, manifest: Manifest, champion: Champion) -> Iterator[str]:
    comparison = manifest.comparison
    if comparison is None:
        yield (
            f"it was not compared with the champion, version {champion.version}: no test row's label became known after that one's "
            "snapshot, or it was not the champion when training began"
        )
        return
    if comparison.champion_digest != champion.bundle_digest:
        yield (
            f"it was compared with version {comparison.champion_version}, and version {champion.version} has become the champion "
            "meanwhile: train again"
        )
        return
    before, now = _metric(comparison.champion, gate.metric), _metric(comparison.challenger, gate.metric)
    if before is None or now is None:
        yield f"the comparison with the champion has no {gate.metric}, which the gate asks for"
        return
    gain = round(now - before if gate.metric in HIGHER_IS_BETTER else before - now, DIGITS)
    if gain < gate.min_gain_over_champion:
        yield (
            f"{gate.metric} {now:.4f} against the champion's {before:.4f} on {comparison.challenger.n_rows} rows is a gain of {gain:+.4f}, "
            f"the gate asks for {gate.min_gain_over_champion:+g}"
        )


def _calibration(gate: Gate, metrics: Metrics) -> Iterator[str]:
    if gate.max_calibration_error is None:
        return
    if metrics.calibration_error is None:
        yield "the bundle reports no calibration error, which the gate limits"
    elif metrics.calibration_error > gate.max_calibration_error:
        yield f"calibration error {metrics.calibration_error:.4f} is above the gate's limit {gate.max_calibration_error:g}"


def _metric(metrics: Metrics, name: str) -> float | None:
    value = {"auc": metrics.auc, "logloss": metrics.logloss, "rmse": metrics.rmse}[name]
    # NaN passes every comparison that is meant to refuse, so it counts as not reported.
    return value if value is not None and value == value else None
