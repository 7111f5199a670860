"""How far live data has moved from a baseline: which bin a value falls into, and PSI and KL on the counts of the bins.

Trainer counts a bundle's baseline by these rules, features counts live data by the same. The bins are `bundles.Bins`:

- A number falls into bin i when edges[i-1] < value <= edges[i]: the bin's index is the number of edges below the value, so values
  up to the first edge are in bin 0, values over the last in bin len(edges). Missing (None, NaN) is the bin after that.
- A category falls into the bin of its level; then comes one bin for any other level, then one for missing. The levels of a baseline
  are those of the bundle's schema in the same order, so a level's index in an encoded row is its bin. An encoded row cannot tell an
  unseen level from a missing one, so both are counted as missing there.
- A boolean is a number, 0 or 1. The score (`score_of`) is a number.
"""

from bisect import bisect_left
from collections.abc import Sequence
from math import log

SMOOTHING = 0.5
"""Added to every count, expected and actual, so that an empty bin gives a finite distance."""


def bin_of_number(edges: Sequence[float], value: float | None) -> int:
    """Index of the value's bin among `len(edges) + 2`, the last of which is for missing."""
    return len(edges) + 1 if value is None or value != value else bisect_left(edges, value)


def bin_of_level(levels: Sequence[str], index: float | None) -> int:
    """Bin of an encoded category (its level's index) among `len(levels) + 2`: levels, others, missing."""
    if index is None or index != index:
        return len(levels) + 1
    return int(index) if 0 <= index < len(levels) else len(levels)


def score_of(scores: Sequence[float]) -> float:
    """The one number of a prediction that is watched as `score`.

    The number itself (regression), the probability of the second class (binary), or the greatest probability (multiclass).
    """
    return scores[-1] if len(scores) <= 2 else max(scores)


def psi(expected_counts: Sequence[float], actual_counts: Sequence[float]) -> float:
    """Population stability index: the sum over bins of (actual - expected) * ln(actual / expected), of smoothed shares.

    Source:
        Siddiqi (2006), Credit Risk Scorecards, chapter 10, there called system stability index; Jeffreys' divergence.
    """
    shares = _shares(expected_counts, actual_counts)
    return sum((actual - expected) * log(actual / expected) for expected, actual in shares)


def kl(expected_counts: Sequence[float], actual_counts: Sequence[float]) -> float:
    """Relative entropy of live data to the baseline, in nats: the sum over bins of actual * ln(actual / expected), of smoothed shares.

    Source:
        Kullback and Leibler (1951), On Information and Sufficiency, section 2.
    """
    return sum(actual * log(actual / expected) for expected, actual in _shares(expected_counts, actual_counts))


def _shares(expected_counts: Sequence[float], actual_counts: Sequence[float]) -> list[tuple[float, float]]:
    n_bins = len(expected_counts)
    if n_bins != len(actual_counts) or not n_bins:
        raise ValueError(f"{n_bins} expected counts against {len(actual_counts)} actual ones")
    n_expected = sum(expected_counts) + SMOOTHING * n_bins
    n_actual = sum(actual_counts) + SMOOTHING * n_bins
    return [
        ((expected + SMOOTHING) / n_expected, (actual + SMOOTHING) / n_actual)
        for expected, actual in zip(expected_counts, actual_counts, strict=True)
    ]
