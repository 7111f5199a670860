from math import log, nan

import pytest

from mojomesh_contracts.drift import bin_of_level, bin_of_number, kl, psi, score_of


def test_psi_and_kl_are_the_hand_calculated_ones() -> None:
    # smoothed by 0.5: 9.5 and 9.5 of 19 were expected, 14.5 and 4.5 came
    expected, actual = [9, 9], [14, 4]
    a, b = 14.5 / 19, 4.5 / 19

    assert psi(expected, actual) == pytest.approx((a - 0.5) * log(a / 0.5) + (b - 0.5) * log(b / 0.5))
    assert kl(expected, actual) == pytest.approx(a * log(a / 0.5) + b * log(b / 0.5))
    assert psi(expected, actual) == pytest.approx(0.30791, abs=1e-5)
    assert kl(expected, actual) == pytest.approx(0.14573, abs=1e-5)


def test_psi_is_symmetric_and_both_are_nothing_for_equal_shares() -> None:
    assert psi([3, 5, 0], [8, 1, 2]) == pytest.approx(psi([8, 1, 2], [3, 5, 0]))
    assert psi([4, 2, 0], [4, 2, 0]) == 0 == kl([4, 2, 0], [4, 2, 0])


def test_an_empty_bin_gives_a_finite_distance() -> None:
    assert 0 < kl([100, 0], [0, 100]) < psi([100, 0], [0, 100]) < 20


def test_counts_of_other_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="2 expected counts against 3"):
        psi([1, 2], [1, 2, 3])


def test_a_number_on_an_edge_belongs_to_the_bin_below() -> None:
    edges = [1.0, 2.0]

    assert [bin_of_number(edges, value) for value in (-5.0, 1.0, 1.5, 2.0, 2.1, None, nan)] == [0, 0, 1, 1, 2, 3, 3]


def test_a_level_is_its_own_bin_then_others_then_missing() -> None:
    levels = ["AA", "UA"]

    assert [bin_of_level(levels, index) for index in (0.0, 1.0, 2.0, None, nan)] == [0, 1, 2, 3, 3]


def test_the_score_is_one_number_whatever_the_label() -> None:
    assert [score_of([7.5]), score_of([0.4, 0.6]), score_of([0.2, 0.5, 0.3])] == [7.5, 0.6, 0.5]
