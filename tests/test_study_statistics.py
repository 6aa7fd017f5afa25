"""Intervals and tests, against brute force and published examples."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustclip.study import mcnemar, mean_interval, paired_difference, wilson

Z = 1.959963984540054
OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60).map(
    lambda rows: zip(*rows, strict=True)
)


def table(both, first, second, neither):
    """Outcome lists with these counts."""
    a = [1] * both + [1] * first + [0] * second + [0] * neither
    b = [1] * both + [0] * first + [1] * second + [0] * neither
    return a, b


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (1, 10), (5, 10), (81, 263), (15, 148), (10, 10), (999, 1000)])
def test_wilson_solves_its_equation(correct, n):
    value, low, high = wilson(correct, n)
    assert value == pytest.approx(100 * correct / n)
    assert 0 <= low <= value <= high <= 100
    for bound, edge in ((low, correct == 0), (high, correct == n)):
        p = bound / 100
        if not edge:
            assert abs(correct / n - p) == pytest.approx(Z * math.sqrt(p * (1 - p) / n), rel=1e-6)
    assert (low == 0) == (correct == 0)
    assert (high == 100) == (correct == n)


def test_wilson_gives_the_published_example():
    assert wilson(81, 263)[1:] == pytest.approx((25.53, 36.62), abs=0.005)  # Newcombe 1998, Statistics in Medicine 17


@settings(deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_symmetric_and_narrows_with_the_level(case):
    correct, n = case
    low, high = wilson(correct, n)[1:]
    assert wilson(n - correct, n)[1:] == pytest.approx((100 - high, 100 - low))
    narrow = wilson(correct, n, level=0.5)
    assert low <= narrow.low <= narrow.high <= high


@pytest.mark.parametrize(("correct", "n", "message"), [(1, 0, "n=0"), (-1, 5, "correct=-1"), (6, 5, "correct=6")])
def test_wilson_refuses_impossible_counts(correct, n, message):
    with pytest.raises(ValueError, match=message):
        wilson(correct, n)


@pytest.mark.parametrize("level", [-0.1, 1.5, "high"])
def test_a_level_must_be_a_probability(level):
    for call in (lambda: wilson(1, 2, level), lambda: mean_interval([1, 2], level)):
        with pytest.raises(ValueError, match="level="):
            call()


@pytest.mark.parametrize(("first", "second"), list(itertools.product(range(5), range(5))))
def test_mcnemar_counts_all_sign_patterns(first, second):
    differ = first + second
    extreme = abs(first - second)
    patterns = itertools.product((-1, 1), repeat=differ)
    expected = np.mean([abs(sum(signs)) >= extreme for signs in patterns])
    assert mcnemar(*table(3, first, second, 2)) == pytest.approx(expected)


@settings(deadline=None)
@given(OUTCOMES)
def test_mcnemar_does_not_care_who_is_first(pair):
    a, b = pair
    assert 0 < mcnemar(a, b) <= 1
    assert mcnemar(a, b) == pytest.approx(mcnemar(b, a))
    assert mcnemar(a, a) == 1


def test_paired_difference_gives_the_published_examples():
    """Newcombe 1998, Statistics in Medicine 17:2635-2650, table II, method 10."""
    value, low, high = paired_difference(*table(36, 12, 2, 0))
    assert (value, low, high) == pytest.approx((20, 5.69, 34.04), abs=0.005)


@settings(deadline=None)
@given(OUTCOMES)
def test_paired_difference_is_antisymmetric_and_stays_in_range(pair):
    a, b = pair
    value, low, high = paired_difference(a, b)
    assert value == pytest.approx(100 * (np.mean(a) - np.mean(b)))
    assert -100 - 1e-9 <= low <= value + 1e-9
    assert value - 1e-9 <= high <= 100 + 1e-9
    assert paired_difference(b, a) == pytest.approx((-value, -high, -low))


def test_paired_difference_covers_the_truth():
    random = np.random.default_rng(0)
    shares = [0.5, 0.2, 0.1, 0.2]
    truth = 100 * (shares[1] - shares[2])
    hits = []
    for counts in random.multinomial(100, shares, size=800):
        _, low, high = paired_difference(*table(*counts))
        hits.append(low <= truth <= high)
    assert 0.93 <= np.mean(hits) <= 0.975


def test_paired_is_narrower_than_unpaired_when_outcomes_agree():
    agree, disagree = paired_difference(*table(60, 10, 0, 30)), paired_difference(*table(30, 40, 30, 0))
    assert agree.value == disagree.value
    assert agree.high - agree.low < disagree.high - disagree.low


def test_mean_interval_over_seeds():
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert high - mean == pytest.approx(3.182446305 * math.sqrt(5 / 3) / 2)  # Student's t at 97.5 %, 3 degrees
    assert mean - low == pytest.approx(high - mean)
    assert mean_interval([5, 5, 5]) == (5, 5, 5)
    alone = mean_interval([7])
    assert alone.value == 7
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


@pytest.mark.parametrize("values", [[], [1, math.nan], [[1, 2]], [math.inf]])
def test_mean_interval_needs_finite_numbers(values):
    with pytest.raises(ValueError, match="at least one finite number"):
        mean_interval(values)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [([1, 0], [1], "equally long"), ([], [], "equally long"), ([1, 2], [0, 1], "0 or 1"), ([0.5], [1], "0 or 1")],
)
def test_outcomes_must_match(first, second, message):
    for function in (mcnemar, paired_difference):
        with pytest.raises(ValueError, match=message):
            function(first, second)
