"""The bins that live data is measured against, and how far the training data's own windows stray from them."""

from collections.abc import Sequence

import numpy as np

from mojomesh_contracts.bundles import Baseline, Bins, BundleSchema, Column
from mojomesh_contracts.drift import kl, psi
from mojomesh_trainer.metrics import Floats

DECILES = np.arange(1, 10) / 10
STRAY = 0.99


def make_baseline(schema: BundleSchema, rows: Floats, watched_scores: Floats, window: int) -> Baseline:
    """Freeze the bins of every column, and of `score`.

    Args:
        schema: The bundle's.
        rows: Encoded training rows in event-time order, shape (n_rows, n_columns).
        watched_scores: `drift.score_of` of the folds' test rows, which no model had trained on, in event-time order.
        window: Rows a window, as the definition's drift policy has it.
    """
    bins = [_bins(column, rows[:, place], window) for place, column in enumerate(schema.columns)]
    return Baseline(window=window, bins=[*bins, _number_bins("score", watched_scores, window)])


def _bins(column: Column, values: Floats, window: int) -> Bins:
    if column.levels is None:
        return _number_bins(column.name, values, window)
    n_levels = len(column.levels)
    numbers = np.where(np.isnan(values), n_levels + 1, np.nan_to_num(values)).astype(np.int64)
    counts, psi_p99, kl_p99 = _counted(numbers, n_levels + 2, window)
    return Bins(column=column.name, levels=column.levels, counts=counts, psi_p99=psi_p99, kl_p99=kl_p99)


def _number_bins(name: str, values: Floats, window: int) -> Bins:
    known = values[~np.isnan(values)]
    # A value that fills several deciles gives one edge, not several.
    edges = np.unique(np.quantile(known, DECILES, method="inverted_cdf")) if len(known) else np.empty(0)
    numbers = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values, side="left"))
    counts, psi_p99, kl_p99 = _counted(numbers, len(edges) + 2, window)
    return Bins(column=name, edges=edges.tolist(), counts=counts, psi_p99=psi_p99, kl_p99=kl_p99)


def _counted(numbers: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", n_bins: int, window: int) -> tuple[list[int], float, float]:
    """Counts of the bins, and the 99th percentiles of PSI and KL of the data's own windows; 0 when it does not fill one."""
    counts: list[int] = np.bincount(numbers, minlength=n_bins).tolist()
    windows = [np.bincount(numbers[start : start + window], minlength=n_bins) for start in range(0, len(numbers) - window + 1, window)]
    strays: list[Sequence[float]] = [(psi(counts, live.tolist()), kl(counts, live.tolist())) for live in windows]
    psi_p99, kl_p99 = np.quantile(np.array(strays), STRAY, axis=0) if strays else (0.0, 0.0)
    return counts, float(psi_p99), float(kl_p99)
