"""Measuring a window of predictions against a model's baseline, and telling drift from chance.

What a bin, PSI and KL are is `mojomesh_contracts.drift`; here the same rules count whole columns at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from mojomesh_contracts.bundles import Baseline, Bins
from mojomesh_contracts.definitions import DriftPolicy
from mojomesh_contracts.drift import kl, psi, score_of
from mojomesh_contracts.events import Frozen

SCORE = "score"


class Measured(Frozen):
    """How far one column of one window is from the baseline, and from where on that is too far."""

    psi: float
    kl: float
    psi_threshold: float
    kl_threshold: float

    @property
    def excess(self) -> float:
        """How many times the threshold was reached, by the worse of the two measures; above 1 is over."""
        return max(self.psi / self.psi_threshold, self.kl / self.kl_threshold)

    @property
    def worse(self) -> tuple[str, float, float]:
        """The worse measure's name, its value and its threshold."""
        if self.psi / self.psi_threshold >= self.kl / self.kl_threshold:
            return "psi", self.psi, self.psi_threshold
        return "kl", self.kl, self.kl_threshold


@dataclass(frozen=True)
class Streak:
    """A column over its threshold in the last `windows` windows."""

    column: str
    windows: int
    measured: Measured


def measured_window(
    baseline: Baseline,
    policy: DriftPolicy,
    names: Sequence[str],
    inputs: Sequence[Sequence[float | None]],
    scores: Sequence[Sequence[float]],
) -> dict[str, Measured]:
    """Each column that the baseline has bins of, and `score`.

    Args:
        names: The columns' names in the order of the encoded rows in `inputs`.
        inputs: Encoded rows (None is missing); those of another length are left out, as nobody knows what they mean.
        scores: Of the same rows.
    """
    whole = [(row, score) for row, score in zip(inputs, scores, strict=True) if len(row) == len(names) and score]
    encoded = np.array([row for row, _ in whole], dtype=np.float64).reshape(len(whole), len(names))  # None becomes NaN
    columns = {name: encoded[:, index] for index, name in enumerate(names)}
    columns[SCORE] = np.array([score_of(score) for _, score in whole], dtype=np.float64)
    found = {}
    for bins in baseline.bins:
        if (column := columns.get(bins.column)) is not None:
            counts = counts_of(bins, column)
            found[bins.column] = Measured(
                psi=psi(bins.counts, counts),
                kl=kl(bins.counts, counts),
                psi_threshold=max(policy.psi, bins.psi_p99),
                kl_threshold=max(policy.kl, bins.kl_p99),
            )
    return found


def counts_of(bins: Bins, column: NDArray[np.float64]) -> list[int]:
    """How many values of an encoded column fall into each bin; NaN is missing, which is the last."""
    missing = np.isnan(column)
    present = column[~missing]
    if bins.levels is not None:
        known = len(bins.levels)
        places = np.where((present >= 0) & (present < known), present, known).astype(np.int64)
        n_bins = known + 2
    else:
        edges = np.array(bins.edges or [], dtype=np.float64)
        places = np.searchsorted(edges, present, side="left")
        n_bins = len(edges) + 2
    counts = np.bincount(places, minlength=n_bins)
    counts[-1] += np.count_nonzero(missing)
    return [int(count) for count in counts]


def confirmed_streak(windows: Sequence[Mapping[str, Measured]], confirm: int) -> Streak | None:
    """The worst column among those over their threshold in each of the last `confirm` windows; None if there is none.

    Args:
        windows: All windows of one promotion, oldest first.
    """
    streaks = []
    for name, measured in windows[-1].items() if windows else ():
        run = list(takewhile(lambda window: name in window and window[name].excess > 1, reversed(windows)))  # noqa: B023  used at once
        if len(run) >= confirm:
            streaks.append(Streak(name, len(run), measured))
    return max(streaks, key=lambda streak: streak.measured.excess, default=None)


def is_cool(at: datetime, last_alert_at: datetime | None, cooldown: timedelta) -> bool:
    """Whether an alert at event time `at` is far enough from the last one of the model."""
    return last_alert_at is None or at >= last_alert_at + cooldown
