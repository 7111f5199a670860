"""How history is cut into walk-forward windows. Used under Mage too: contracts only."""

from datetime import UTC, datetime, timedelta

from mojomesh_contracts.bundles import FoldPlan
from mojomesh_contracts.definitions import WalkForward

MILLISECOND = timedelta(milliseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class TooLittleHistory(ValueError):
    """The snapshot does not reach back as far as the definition's windows do; its text says how far it does."""


def plan_folds(first_label: datetime, last_label: datetime, label_delay: timedelta, walk_forward: WalkForward) -> list[FoldPlan]:
    """Cut the time in which labels became known into `n_windows` test windows, the last of which ends with the last label.

    A fold trains on labels known before its test window starts, less the embargo and, when purged, less the label delay: a row tested
    in the window was scored that much before its label came, by a model that can only have known the labels of that moment.

    Args:
        first_label: When the first label became known.
        last_label: When the last one did.
        label_delay: How long labels take to become known, counted from the event time.
        walk_forward: The definition's plan.

    Raises:
        TooLittleHistory: A window would have nothing to train on.
    """
    purge = label_delay if walk_forward.purge == "label_delay" else timedelta(0)
    plans = []
    for fold in range(walk_forward.n_windows):
        test_to = last_label + MILLISECOND - (walk_forward.n_windows - 1 - fold) * walk_forward.step
        test_from = test_to - walk_forward.test
        train_to = test_from - walk_forward.embargo - purge
        train_from = training_start(first_label, train_to, walk_forward)
        if train_from >= train_to:
            needed = walk_forward.n_windows - 1
            raise TooLittleHistory(
                f"fold {fold} has nothing to train on: labels became known from {first_label:%Y-%m-%d %H:%M} "
                f"to {last_label:%Y-%m-%d %H:%M}, "
                f"and {needed} steps of {walk_forward.step}, a test of {walk_forward.test}, an embargo of {walk_forward.embargo} and a "
                f"purge of {purge} reach back further; wait for more labels or ask for fewer or shorter windows"
            )
        plans.append(FoldPlan(fold=fold, train_from=train_from, train_to=train_to, test_from=test_from, test_to=test_to))
    return plans


def training_start(first_label: datetime, train_to: datetime, walk_forward: WalkForward) -> datetime:
    """Where training that ends at `train_to` begins: with history, or the length of the sliding window before."""
    return first_label if walk_forward.train == "expanding" else max(first_label, train_to - walk_forward.train)


def scored_from(plan: FoldPlan, walk_forward: WalkForward) -> datetime | None:
    """Event time from which rows are tested, None for all: a row scored before the training ended was not scored by its model."""
    return plan.train_to if walk_forward.purge == "label_delay" else None


def to_ms(time: datetime) -> int:
    """Epoch milliseconds, as in the snapshot."""
    return (time - EPOCH) // MILLISECOND


def from_ms(milliseconds: int) -> datetime:
    """The time at those epoch milliseconds, UTC."""
    return EPOCH + int(milliseconds) * MILLISECOND
