"""Each measure against numbers worked out by hand."""

from math import log

import numpy as np
import pytest

from mojomesh_trainer.metrics import auc, calibration_error, logloss, measure, naive_scores

LABELS = np.array([0.0, 0, 1, 1])


def test_auc_counts_pairs_in_order_and_ties_half() -> None:
    assert auc(LABELS, np.array([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert auc(LABELS, np.array([0.5, 0.5, 0.5, 0.5])) == 0.5
    assert auc(LABELS, np.array([0.1, 0.5, 0.5, 0.9])) == 0.875


def test_auc_of_one_class_is_none() -> None:
    assert auc(np.ones(3), np.array([0.1, 0.2, 0.3])) is None


def test_logloss_is_the_mean_surprise_and_finite_when_certain_and_wrong() -> None:
    scores = np.array([[0.8, 0.2], [0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])

    assert logloss(LABELS, scores) == pytest.approx(-(2 * log(0.8) + log(0.5) + log(0.9)) / 4)
    assert logloss(np.array([1.0]), np.array([[1.0, 0.0]])) == pytest.approx(-log(1e-15))


def test_calibration_error_is_nothing_when_shares_come_true_and_the_gap_when_not() -> None:
    labels = np.tile([1.0, 0, 0, 0], 100)

    assert calibration_error(labels, np.full(400, 0.25)) == pytest.approx(0)
    assert calibration_error(labels, np.full(400, 0.65)) == pytest.approx(0.4)


def test_lift_of_a_binary_label_is_auc_over_the_naive_model() -> None:
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    naive = naive_scores("binary", LABELS, 2, 4)

    metrics = measure("binary", LABELS, np.stack([1 - scores, scores], axis=1), naive)

    assert naive.tolist() == [[0.5, 0.5]] * 4
    assert (metrics.n_rows, metrics.auc, metrics.lift, metrics.rmse) == (4, 0.75, 0.25, None)


def test_lift_of_a_number_is_rmse_saved() -> None:
    labels = np.array([1.0, 3.0])

    metrics = measure("number", labels, np.array([[2.0], [3.0]]), naive_scores("number", np.array([0.0, 10.0]), 1, 2))

    assert metrics.rmse == pytest.approx(0.5**0.5)
    assert metrics.mae == 0.5
    assert metrics.lift == pytest.approx(10**0.5 - 0.5**0.5)


def test_many_classes_have_a_logloss_and_no_auc() -> None:
    labels = np.array([0.0, 2])
    scores = np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])

    metrics = measure("multiclass", labels, scores, naive_scores("multiclass", labels, 3, 2))

    assert metrics.logloss == pytest.approx(log(2))
    assert metrics.auc is None
