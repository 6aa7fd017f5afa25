"""Intervals and tests, against brute force and published examples."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustclip.study import Estimate, hierarchical, macro, mcnemar, mean_interval, paired_difference, wilson

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


def newcombe(both, first, second, neither):
    """Method 10 of Newcombe 1998, written out with closed forms; none of it is shared with the package."""
    n = both + first + second + neither
    (p1, l1, u1), (p2, l2, u2) = (closed_wilson(right, n) for right in (both + first, both + second))
    product = both * neither - first * second
    numerator = product - n / 2 if product > n / 2 else min(product, 0)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    phi = numerator / math.sqrt(margins) if margins else 0
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    return p1 - p2, low, p1 - p2 + math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)


def closed_wilson(right, n):
    half = Z * math.sqrt(Z**2 + 4 * right * (1 - right / n))
    return right / n, (2 * right + Z**2 - half) / (2 * (n + Z**2)), (2 * right + Z**2 + half) / (2 * (n + Z**2))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [  # Newcombe 1998, Statistics in Medicine 17:2635-2650, method 10
        ((36, 12, 2, 0), (20, 5.69, 34.04)),  # phi < 0: no continuity correction
        ((20, 12, 2, 16), (20, 5.62, 32.92)),  # phi > 0: without the correction (6.18, 32.42)
        ((16, 12, 2, 20), (20, 5.62, 32.92)),
        ((54, 0, 0, 0), (0, -6.64, 6.64)),  # empty margins: phi is 0
        ((53, 1, 0, 0), (1.85, -4.96, 9.77)),
        ((30, 0, 0, 24), (0, -3.58, 3.58)),  # perfect agreement: without the correction (-0.74, 0.74)
        ((6, 6, 5, 6), (4.35, -22.82, 30.64)),  # 0 < product <= n / 2: the correction makes phi 0, not negative
    ],
)
def test_paired_difference_gives_the_worked_examples(counts, expected):
    found = paired_difference(*table(*counts))
    assert found == pytest.approx(expected, abs=0.005)
    assert found == pytest.approx([100 * part for part in newcombe(*counts)])


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


# --- z --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimate", "bounds", "expected"),
    [
        ((10, 0, 30), {"above": 0}, Z),  # the interval touches the bound
        ((10, 5, 30), {"above": 0}, 2 * Z),
        ((10, 5, 30), {"above": 20}, -Z / 2),  # outside, the other half of the interval counts
        ((10, 5, 30), {"below": 20}, Z / 2),
        ((10, 5, 30), {"below": 5}, -Z),
        ((0, -1, 1), {"above": -2, "below": 3}, 2 * Z),  # the nearer of two bounds
        ((4, 3, 5), {"above": -2, "below": 3}, -Z),
        ((3, 3, 3), {"above": 2}, math.inf),  # counted, not sampled
        ((3, 3, 3), {"above": 3}, -math.inf),
        ((3, 3, 3), {"below": 3}, -math.inf),
        ((3, math.nan, math.nan), {"above": 0}, 0),
    ],
)
def test_z_counts_standard_errors_inside_the_bounds(estimate, bounds, expected):
    assert Estimate(*estimate).z(**bounds) == pytest.approx(expected)


# --- the hierarchical bootstrap ---------------------------------------------------------------------------------------


def world(random, seeds, images, seed_deviation, shift=0.2):
    """Outcomes of images of various difficulty under seeds of various quality, and the expected accuracy."""
    parts = random.normal(size=images) + seed_deviation * random.normal(size=(seeds, 1))
    scale = math.sqrt(1.5 + seed_deviation**2)
    truth = 50 * (1 + math.erf(shift / scale / math.sqrt(2)))
    return parts + math.sqrt(0.5) * random.normal(size=(seeds, images)) + shift > 0, truth


def test_hierarchical_is_deterministic_and_exact_in_its_value():
    random = np.random.default_rng(0)
    a, b = random.random((3, 50)) < 0.7, random.random((3, 50)) < 0.4
    found = hierarchical(a, b)
    assert found == hierarchical(a, b)
    assert found != hierarchical(a, b, seed=1)
    assert found.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert found.low < found.value < found.high
    assert hierarchical(b, a).value == -found.value
    assert hierarchical(a, b[0]).value == pytest.approx(100 * (a.mean() - b[0].mean()))  # one seed beside three


@pytest.mark.parametrize("correct", [0, 3, 150, 290, 300])
def test_one_seed_is_near_wilson(correct):
    assert hierarchical(np.arange(300) < correct) == pytest.approx(wilson(correct, 300), abs=0.75)


def test_one_seed_is_near_newcombe():
    a, b = table(120, 60, 30, 90)
    assert hierarchical(a, b) == pytest.approx(paired_difference(a, b), abs=0.4)


def test_no_disagreement_is_not_certainty():
    low, high = hierarchical([1] * 20, [1] * 20)[1:]
    assert low < -3
    assert high > 3


@pytest.mark.parametrize(("seeds", "deviation"), [(1, 0.0), (3, 0.0), (3, 0.15), (5, 0.15)])
def test_hierarchical_covers_the_truth(seeds, deviation):
    random, hits = np.random.default_rng(1), []
    for number in range(400):
        outcomes, truth = world(random, seeds, 200, deviation)
        found = hierarchical(outcomes, draws=300, seed=number)
        hits.append(found.low <= truth <= found.high)
    assert 0.915 <= np.mean(hits) <= 0.995


def test_the_variance_over_seeds_is_not_too_small():
    """Of six seeds, half at 40 and half at 60, five are drawn: all low in 1 of 32 draws. Of six: in 1 of 64."""
    outcomes = np.stack([np.arange(20_000) < right for right in (8_000, 12_000) * 3])
    low, high = hierarchical(outcomes, draws=20_000)[1:]
    assert low < 41.5
    assert high > 58.5


def test_macro_gives_each_role_the_same_weight():
    """Pooling gives 1000 images of one role the say over 10 of another; the mean of roles does not."""
    large, small = [1] * 1000, [0] * 10
    found = macro([large, small])
    assert found.value == 50
    assert found.high - found.low > 5  # the ten images are what is uncertain
    swapped = macro([small, large], [[1] * 10, [0] * 1000])
    assert swapped.value == pytest.approx(0)
    assert macro([large]) == hierarchical(large)


def test_macro_draws_the_same_seeds_in_all_roles():
    """A seed that is better by ten points is better everywhere: averaging over roles does not make that go away."""
    role = np.stack([np.arange(2000) < right for right in (900, 1000, 1100)])
    one, many = hierarchical(role), macro([role] * 15)
    assert many.high - many.low > 0.85 * (one.high - one.low)


def test_macro_covers_the_mean_of_accuracies():
    random, hits, truth = np.random.default_rng(2), [], (0.02, 0.5, 0.9)
    for number in range(300):
        roles = [random.random(n) < p for n, p in zip((300, 40, 100), truth, strict=True)]
        found = macro(roles, draws=300, seed=number)
        hits.append(found.low <= 100 * np.mean(truth) <= found.high)
    assert 0.91 <= np.mean(hits) <= 0.98


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hierarchical([]), "seeds, images"),
        (lambda: hierarchical([[1, 0]], [[1, 0, 1]]), r"\(1, 2\) and \(1, 3\)"),
        (lambda: hierarchical(np.ones((2, 4)), np.ones((3, 4))), "same images and seeds"),
        (lambda: hierarchical(np.ones((1, 2, 2))), "seeds, images"),
        (lambda: hierarchical([0.5, 1]), "0 or 1"),
        (lambda: hierarchical([1, 0], [2, 0]), "0 or 1"),
        (lambda: hierarchical([1, 0], draws=3), "draws=3"),
        (lambda: macro([]), "at least one role"),
        (lambda: macro([[1]], [[1], [0]]), "not 1 and 2"),
        (lambda: macro([[1], [[1], [0]]]), r"seeds must be the same for all roles, got \[1, 2\]"),
    ],
)
def test_outcomes_of_roles_must_match(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_hierarchical_is_quick():
    random = np.random.default_rng(0)
    a, b = random.random((2, 3, 1000)) < 0.5
    start = time.process_time()
    hierarchical(a, b)
    assert time.process_time() - start < 0.2
