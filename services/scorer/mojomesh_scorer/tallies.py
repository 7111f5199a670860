"""What the scorer counts, gathered off the hot path: a counter of prometheus_client costs as much as a tree or two."""

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isnan

import numpy as np
from prometheus_client import Counter, Histogram

from mojomesh_scorer.encoding import Matrix
from mojomesh_scorer.latencies import BOUNDS_S
from mojomesh_scorer.models import LoadedModel

FOLD_S = 0.05
_PREDICTIONS = Counter("mojomesh_scorer_predictions_total", "Predictions made", ["model", "version"])
_MISSING = Counter("mojomesh_scorer_missing_values_total", "Inputs that came without a value", ["model", "column"])
_UNKNOWN = Counter("mojomesh_scorer_unknown_levels_total", "Inputs with a level that training never saw", ["model", "column"])
_SECONDS = Histogram("mojomesh_scorer_request_seconds", "From the whole request to its answer, in the worker", buckets=BOUNDS_S)


class _OfModel:
    def __init__(self, model: LoadedModel) -> None:
        self.n_rows = 0
        self.n_nan = np.zeros(len(model.schema.columns), dtype=np.int64)
        self.single: list[Sequence[float]] = []
        self.unknown: dict[str, int] = defaultdict(int)


class Tallies:
    """One worker's counts; folded into the metrics twenty times a second, while there are any."""

    def __init__(self) -> None:
        self.latencies = [0] * (len(BOUNDS_S) + 1)
        """Requests since the start, by latency: `latencies[i]` took at most `BOUNDS_S[i]`, the last one longer."""
        self._folded = self.latencies.copy()
        self._seconds = 0.0
        self._models: dict[LoadedModel, _OfModel] = {}
        self._folding = False

    def note_block(self, model: LoadedModel, rows: Matrix, unknown: Mapping[str, int]) -> None:
        """Count a block of encoded rows that were scored, and the unknown levels in it."""
        tally = self._of(model)
        tally.n_rows += len(rows)
        tally.n_nan += np.isnan(rows).sum(axis=0)
        for column, n in unknown.items():
            tally.unknown[column] += n

    def note_row(self, model: LoadedModel, row: Sequence[float], unknown: Mapping[str, int]) -> None:
        """The same for a single row."""
        tally = self._of(model)
        if isnan(sum(row)):
            tally.single.append(row)
        else:
            tally.n_rows += 1
        for column, n in unknown.items():
            tally.unknown[column] += n

    def note_request(self, seconds: float) -> None:
        """Count a request that was answered with predictions."""
        self.latencies[bisect_left(BOUNDS_S, seconds)] += 1
        self._seconds += seconds

    def _of(self, model: LoadedModel) -> _OfModel:
        if not self._folding:
            self._folding = True
            asyncio.get_running_loop().call_later(FOLD_S, self._fold)
        if (tally := self._models.get(model)) is None:
            tally = self._models[model] = _OfModel(model)
        return tally

    def _fold(self) -> None:
        self._folding = False
        models, self._models = self._models, {}
        for model, tally in models.items():
            n_nan = tally.n_nan + (np.isnan(np.array(tally.single)).sum(axis=0) if tally.single else 0)
            _PREDICTIONS.labels(model.name, model.version).inc(tally.n_rows + len(tally.single))
            for column, n in zip(model.schema.columns, n_nan.tolist(), strict=True):
                n_unknown = tally.unknown.get(column.name, 0)
                if n_unknown:
                    _UNKNOWN.labels(model.name, column.name).inc(n_unknown)
                if n > n_unknown:
                    _MISSING.labels(model.name, column.name).inc(n - n_unknown)
        self._fold_latencies()

    def _fold_latencies(self) -> None:
        # prometheus_client observes one value at a time only, at 2 us each; what observe() does to a bucket can be done once for many.
        for bucket, n, before in zip(_SECONDS._buckets, self.latencies, self._folded, strict=True):
            if n > before:
                bucket.inc(n - before)
        _SECONDS._sum.inc(self._seconds)
        self._folded, self._seconds = self.latencies.copy(), 0.0
