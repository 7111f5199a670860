"""No fold may learn from what was not known when its test began."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mojomesh_contracts.bundles import FoldPlan
from mojomesh_contracts.definitions import WalkForward
from mojomesh_trainer.folds import TooLittleHistory, from_ms, plan_folds, scored_from, to_ms

START = datetime(2013, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)

hours = st.integers(0, 24 * 20).map(lambda hour: timedelta(hours=hour))
walk_forwards = st.builds(
    WalkForward,
    n_windows=st.integers(1, 6),
    train=st.one_of(st.just("expanding"), hours.filter(bool)),
    test=hours.filter(bool),
    step=hours.filter(bool),
    purge=st.sampled_from(["label_delay", "none"]),
    embargo=hours,
)


def planned(walk_forward: WalkForward, days: float, delay: timedelta) -> list[FoldPlan]:
    try:
        return plan_folds(START, START + days * DAY, delay, walk_forward)
    except TooLittleHistory:
        return []


@given(walk_forwards, st.floats(1, 400), hours)
def test_a_fold_trains_on_labels_known_before_its_test_less_embargo_and_purge(wf: WalkForward, days: float, delay: timedelta) -> None:
    purge = delay if wf.purge == "label_delay" else timedelta(0)
    for plan in planned(wf, days, delay):
        assert START <= plan.train_from < plan.train_to <= plan.test_from - wf.embargo - purge
        assert plan.test_to - plan.test_from == wf.test


@given(walk_forwards, st.floats(1, 400), hours)
def test_windows_step_on_and_end_with_the_last_label(wf: WalkForward, days: float, delay: timedelta) -> None:
    plans = planned(wf, days, delay)

    assert [plan.fold for plan in plans] == list(range(len(plans)))
    assert all(later.test_from - plan.test_from == wf.step for plan, later in pairwise(plans))
    if plans:
        assert len(plans) == wf.n_windows
        assert plans[-1].test_to > START + days * DAY >= plans[-1].test_to - timedelta(milliseconds=1)


@given(walk_forwards, st.floats(1, 400), hours)
def test_a_sliding_window_is_no_longer_than_asked_and_an_expanding_one_has_all_history(
    wf: WalkForward, days: float, delay: timedelta
) -> None:
    for plan in planned(wf, days, delay):
        if wf.train == "expanding":
            assert plan.train_from == START
        else:
            assert plan.train_to - plan.train_from <= wf.train


@given(walk_forwards, st.floats(1, 400), hours, st.lists(st.tuples(hours, hours), max_size=30))
def test_a_purged_row_is_never_tested_by_a_model_that_learnt_from_later(
    wf: WalkForward, days: float, delay: timedelta, rows: list[tuple[timedelta, timedelta]]
) -> None:
    """Every tested row was scored when each label that its model learnt from was known already."""
    if wf.purge == "none":
        return
    for plan in planned(wf, days, delay):
        known = [(plan.test_to - age - took, plan.test_to - age) for age, took in rows]
        learnt = [label for _, label in known if plan.train_from <= label < plan.train_to]
        tested = [event for event, label in known if plan.test_from <= label < plan.test_to and event >= (scored_from(plan, wf) or event)]
        assert not learnt or not tested or max(learnt) < min(tested)


def test_too_little_history_says_how_much_there_is() -> None:
    walk_forward = WalkForward(n_windows=4, train="expanding", test=15 * DAY, step=15 * DAY, embargo=DAY)

    with pytest.raises(TooLittleHistory, match="from 2013-01-01 00:00 to 2013-01-31 00:00"):
        plan_folds(START, START + 30 * DAY, timedelta(hours=5), walk_forward)


def test_times_survive_the_snapshots_milliseconds() -> None:
    assert from_ms(to_ms(START + timedelta(milliseconds=1))) == START + timedelta(milliseconds=1)
