"""Baselines against counts done by hand, and by the rules that features counts live data with."""

import numpy as np
import pytest

from mojomesh_contracts.bundles import Bins, BundleSchema, Column
from mojomesh_contracts.drift import bin_of_level, bin_of_number, kl, psi
from mojomesh_trainer.baselines import make_baseline
from mojomesh_trainer.bundling import make_golden

NUMBER = Column(name="n", feature_set="f", feature="n", type="number")
CATEGORY = Column(name="c", feature_set="f", feature="c", type="category", levels=["a", "b"])


def bins_of(column: Column, values: list[float], window: int = 1000) -> Bins:
    schema = BundleSchema(columns=[column], label="l", classes=None)
    return make_baseline(schema, np.array(values)[:, None], np.array([0.0]), window).bins[0]


def test_a_number_has_a_bin_for_each_tenth_and_one_for_missing() -> None:
    bins = bins_of(NUMBER, [*range(1, 101), np.nan, np.nan])

    assert bins.edges == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert bins.counts == [10] * 10 + [2]


def test_a_value_that_fills_several_tenths_gives_one_edge() -> None:
    bins = bins_of(NUMBER, [0.0] * 75 + [1.0] * 25)

    assert (bins.edges, bins.counts) == ([0, 1], [75, 25, 0, 0])


def test_a_column_that_is_always_missing_has_one_full_bin() -> None:
    assert bins_of(NUMBER, [np.nan] * 3).counts == [0, 3]


def test_a_category_has_a_bin_for_each_level_then_others_then_missing() -> None:
    bins = bins_of(CATEGORY, [0, 0, 1, np.nan])

    assert (bins.levels, bins.counts) == (["a", "b"], [2, 1, 0, 1])


@pytest.mark.parametrize("column", [NUMBER, CATEGORY])
def test_counts_are_those_of_the_shared_rules(column: Column) -> None:
    rng = np.random.default_rng(3)
    values = np.where(rng.random(500) < 0.1, np.nan, rng.integers(0, 2, 500) if column.levels else rng.normal(size=500))
    bins = bins_of(column, values.tolist())

    counts = [0] * len(bins.counts)
    for value in values:
        counts[bin_of_level(bins.levels, value) if bins.levels else bin_of_number(bins.edges or [], value)] += 1
    assert counts == bins.counts


def test_the_threshold_is_the_99th_percentile_of_the_datas_own_windows() -> None:
    season = [0.0] * 100 + [1.0] * 100 + [0.0] * 100  # the second hundred is the odd one out
    bins = bins_of(CATEGORY, season, window=100)

    live = [[100, 0, 0, 0], [0, 100, 0, 0], [100, 0, 0, 0]]
    assert bins.psi_p99 == pytest.approx(np.quantile([psi(bins.counts, counts) for counts in live], 0.99))
    assert bins.kl_p99 == pytest.approx(np.quantile([kl(bins.counts, counts) for counts in live], 0.99))


def test_too_few_rows_for_a_window_leave_the_policys_floor_alone() -> None:
    assert bins_of(CATEGORY, [0.0] * 10, window=100).psi_p99 == 0


def test_the_score_is_watched_too() -> None:
    schema = BundleSchema(columns=[], label="l", classes=["0", "1"])

    (score,) = make_baseline(schema, np.empty((0, 0)), np.linspace(0, 1, 100), 50).bins

    assert (score.column, sum(score.counts)) == ("score", 100)


def test_golden_rows_cover_missing_values_and_the_rarest_level() -> None:
    schema = BundleSchema(columns=[CATEGORY, NUMBER], label="l", classes=["0", "1"])
    encoded = np.stack([np.zeros(200), np.arange(200.0)], axis=1)
    encoded[117, 0], encoded[60, 1] = 1, np.nan
    scores = np.stack([1 - np.arange(200) / 200, np.arange(200) / 200], axis=1)

    golden = make_golden(schema, encoded, scores)

    rows = {tuple(row.inputs): row.scores[1] for row in golden.rows}
    assert rows[(1.0, 117.0)] == pytest.approx(117 / 200)
    assert rows[(0.0, None)] == pytest.approx(60 / 200)
    assert {(0.0, 0.0), (0.0, 199.0)} <= set(rows)
