"""How good predictions are. Used under Mage too: numpy and contracts only."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mojomesh_contracts.events import Metrics

Floats = NDArray[np.float64]
LabelType = Literal["binary", "number", "multiclass"]

CALIBRATION_BINS = 10
LEAST_PROBABILITY = 1e-15  # H2O's own clip of the logloss


def measure(label_type: LabelType, labels: Floats, scores: Floats, naive: Floats) -> Metrics:
    """Compare scores with what came true, and with the naive model.

    Args:
        label_type: What the label is.
        labels: Shape (n,): 0 or 1, the index of the class, or the number.
        scores: Shape (n, n_classes), probabilities; (n, 1) for a number.
        naive: The same shape, from a model that always answers with what was usual in training.
    """
    if label_type == "number":
        error, naive_error = scores[:, 0] - labels, naive[:, 0] - labels
        rmse = float(np.sqrt(np.mean(error**2)))
        saved = float(np.sqrt(np.mean(naive_error**2))) - rmse
        return Metrics(n_rows=len(labels), rmse=rmse, mae=float(np.mean(np.abs(error))), lift=saved)
    if label_type == "multiclass":
        return Metrics(n_rows=len(labels), logloss=logloss(labels, scores))
    found, usual = auc(labels, scores[:, 1]), auc(labels, naive[:, 1])
    return Metrics(
        n_rows=len(labels),
        auc=found,
        logloss=logloss(labels, scores),
        calibration_error=calibration_error(labels, scores[:, 1]),
        lift=None if found is None or usual is None else found - usual,
    )


def auc(labels: Floats, scores: Floats) -> float | None:
    """Probability that a positive row scores higher than a negative one, ties half; None when one of the two is absent.

    Source:
        Hanley and McNeil (1982): the Mann-Whitney statistic.
    """
    n_positive = int(np.sum(labels == 1))
    n_negative = len(labels) - n_positive
    if not n_positive or not n_negative:
        return None
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(sizes) - (sizes - 1) / 2
    ranks = mean_ranks[group]
    return float((ranks[labels == 1].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def logloss(labels: Floats, scores: Floats) -> float:
    """Mean of -ln(probability given to the class that came true)."""
    given = scores[np.arange(len(labels)), labels.astype(np.int64)]
    return float(-np.mean(np.log(np.clip(given, LEAST_PROBABILITY, 1.0))))


def calibration_error(labels: Floats, scores: Floats) -> float:
    """Expected calibration error: |mean score - share of positives| of ten bins of equal count, weighted by their rows.

    Source:
        Naeini, Cooper and Hauskrecht (2015), Obtaining Well Calibrated Probabilities Using Bayesian Binning, section on ECE.
    """
    order = np.argsort(scores, kind="stable")
    bins = [part for part in np.array_split(order, CALIBRATION_BINS) if len(part)]
    return float(sum(abs(scores[part].mean() - labels[part].mean()) * len(part) for part in bins) / len(labels))


def naive_scores(label_type: LabelType, train_labels: Floats, n_classes: int, n_rows: int) -> Floats:
    """The naive model's answers: the shares of the classes in training, or the mean; the same for every row."""
    if label_type == "number":
        usual = np.array([train_labels.mean()])
    else:
        usual = np.bincount(train_labels.astype(np.int64), minlength=n_classes) / len(train_labels)
    return np.tile(usual.astype(np.float64), (n_rows, 1))
