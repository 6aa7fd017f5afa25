"""Agreement of orders, on cases whose answer is known."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from robustclip.study.agreement import Side, agreement, correlations, redrawn, tau_b, told


def right(share: float, images: int = 200) -> np.ndarray:
    """Outcomes of images of which the first share is right."""
    return (np.arange(images) < share * images).astype(int)


def side(name: str, shares: dict[str, float], images: int = 200) -> Side:
    return Side(name, {method: {"set": right(share, images)} for method, share in shares.items()})


FAR = {"A": 0.1, "B": 0.3, "C": 0.5, "D": 0.7, "E": 0.9}


@pytest.mark.parametrize("seed", range(20))
def test_tau_b_is_that_of_scipy_with_ties(seed):
    one, two = np.random.default_rng(seed).integers(0, 6, size=(2, 9)).astype(float)
    assert tau_b(one, two) == pytest.approx(kendalltau(one, two).statistic)


def test_tau_b_of_many_draws_is_that_of_each():
    one, two = np.random.default_rng(0).normal(size=(2, 5, 7))
    assert tau_b(one, two) == pytest.approx([float(tau_b(a, b)) for a, b in zip(one, two, strict=True)])
    assert tau_b(np.ones((2, 4)), np.arange(8).reshape(2, 4)).tolist() == [0, 0]


def test_the_same_order_far_apart_is_one_and_the_opposite_minus_one():
    opposite = {name: 1 - share for name, share in FAR.items()}
    assert agreement(side("photo", FAR), side("full", FAR)) == (100, 100, 100)
    assert agreement(side("photo", FAR), side("full", opposite)) == (-100, -100, -100)


def test_print_has_no_interval_of_its_own_and_only_shared_methods_count():
    paper = Side("paper", {"B": 1.0, "A": 2.0, "D": 3.0, "C": 4.0, "printed only": 9.0})
    assert agreement(paper, side("photo", FAR | {"ours": 0.2})) == pytest.approx((100 / 3,) * 3)


def test_few_methods_make_no_order():
    few = {name: FAR[name] for name in "ABC"}
    assert agreement(side("photo", few), side("full", FAR)) is None
    assert correlations(side("photo", few), side("full", FAR)) is None


def test_methods_that_lie_together_widen_the_interval_down_to_no_agreement():
    random = np.random.default_rng(1)
    close = [Side(name, {m: {"set": random.random(150) < 0.4} for m in "ABCDEF"}) for name in ("photo", "full")]
    found = agreement(*close)
    assert found.low < 0 < found.high - found.low > 60
    assert -100 <= found.low <= found.value <= found.high <= 100


def test_the_interval_covers_a_known_order_as_often_as_it_says():
    shares, random = {name: 0.3 + 0.06 * place for place, name in enumerate("ABCDEF")}, np.random.default_rng(0)
    covered, narrow = 0, 0
    for run in range(40):
        drawn = [Side(name, {m: {"set": random.random(300) < share} for m, share in shares.items()})
                 for name in ("photo", f"full {run}")]  # fmt: skip
        found = agreement(*drawn, draws=200, seed=run)
        covered += found.high == 100
        narrow += found.high - found.low < 60
    assert covered >= 36
    assert narrow >= 30


def test_all_methods_keep_the_same_images_and_the_first_that_all_have():
    random = np.random.default_rng(0)
    same = random.random(100) < 0.5
    both = Side("photo", {"A": {"set": same}, "B": {"set": np.concatenate([same, ~same])}})
    drawn = redrawn(both, "AB", draws=100)
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert drawn[0, 0] == pytest.approx(same.mean())
    assert drawn[1:].std() > 0


def test_sides_of_one_name_are_drawn_together_and_others_alone():
    outcomes = np.random.default_rng(0).random(100) < 0.5
    a, b, c = (
        redrawn(Side(name, {"A": {"set": outcomes}} | more), "A", draws=100)
        for name, more in (("photo", {}), ("photo", {"B": {"set": outcomes}}), ("full", {}))
    )
    assert (a == b).all()
    assert (a[1:] != c[1:]).any()


def test_trainings_count_and_sets_weigh_the_same():
    good, bad = np.ones(50, int), np.zeros(50, int)
    three = Side("photo", {"A": {"set": np.stack([good, bad, bad])}})
    drawn = redrawn(three, "A", draws=400)
    assert drawn[0, 0] == pytest.approx(1 / 3)
    assert sorted(set(drawn[1:, 0])) == [0, 0.5, 1]  # two of three trainings
    sets = Side("photo", {"A": {"few": np.ones(10, int), "many": np.zeros(90, int)}})
    assert redrawn(sets, "A", draws=100)[0, 0] == 0.5


def test_a_difference_of_correlations_may_reach_two():
    values = np.array([1.5, *np.linspace(1.2, 1.8, 101)])
    assert told(values, most=2).value == 150
    assert told(values).value == 100


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="draws"):
        agreement(side("photo", FAR), side("full", FAR), draws=3)
