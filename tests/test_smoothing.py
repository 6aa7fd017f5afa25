"""Smoothing against loops, certificates against exact sums and against a classifier whose every vote is known."""

import math

import numpy as np
import pytest
import torch

from by_hand import normal_by_hand
from robustclip import models
from robustclip.attacks import PGD
from robustclip.attacks.aware import aims_against
from robustclip.defenses.base import SCORING_DRAW
from robustclip.defenses.smoothing import ABSTAINS, Smoothing, certify, decide, lower_bound, votes

SIGMA = 0.1


def tail(trials, least, p):
    """P(Binomial(trials, p) >= least), term by term."""
    return math.fsum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(least, trials + 1))


def normal_share(z):
    return 0.5 * math.erfc(-z / 2**0.5)


class Planted(torch.nn.Module):
    """Three classes that depend on one direction w, |w| = 1: 0 above a plane, 1 below it, 2 never."""

    def __init__(self, shape, dtype=torch.float32):
        super().__init__()
        direction = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self.direction = (direction / direction.norm()).to(dtype)

    def distance(self, images):
        return ((images - 0.5) * self.direction).sum((1, 2, 3))

    def forward(self, images):
        distance = self.distance(images)
        return torch.stack([distance, -distance, torch.full_like(distance, -1e3)], 1)

    def placed(self, distances):
        """One image at each distance from the plane, each with another part along it."""
        noise = torch.randn(len(distances), *self.direction.shape, generator=torch.Generator().manual_seed(1)) / 20
        along = noise - (noise * self.direction).sum((1, 2, 3))[:, None, None, None] * self.direction
        return 0.5 + along + torch.as_tensor(distances)[:, None, None, None] * self.direction


@pytest.fixture(scope="module")
def planted():
    return Planted((3, 6, 6))


# --- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
@pytest.mark.parametrize(("successes", "trials"), [(1, 1), (1, 9), (5, 9), (9, 9), (60, 100), (100, 100)])
def test_the_bound_is_where_the_exact_tail_is_alpha(successes, trials, alpha):
    p = float(lower_bound(np.array([successes]), np.array([trials]), alpha)[0])
    assert 0 < p <= successes / trials
    assert tail(trials, successes, p) == pytest.approx(alpha, rel=1e-9)


def test_the_bound_without_a_success_is_zero():
    assert lower_bound(np.array([0, 1]), 10)[0] == 0


@pytest.mark.parametrize("p", [0.3, 0.6, 0.97])
def test_the_bound_lies_above_the_truth_as_rarely_as_it_says(p):
    """Exactly: the probability of all counts whose bound is too high."""
    trials, alpha = 30, 0.05
    bounds = lower_bound(np.arange(trials + 1), trials, alpha)
    wrong = [k for k in range(trials + 1) if bounds[k] > p]
    assert math.fsum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in wrong) <= alpha


# --- certificates -----------------------------------------------------------------------------------------------------


def test_a_plane_is_never_certified_away_and_nearly_reached(planted):
    """The vote is Phi(distance / sigma), so that the radius may not exceed the distance and tends to it."""
    distances = np.array([0.02, 0.05, 0.1, 0.15, 0.2, -0.05, -0.15], dtype=np.float32)
    images = planted.placed(distances)
    selected = votes(planted, images, SIGMA, 100, part="select")
    for copies in (300, 20_000):
        classes, radii = certify(selected, votes(planted, images, SIGMA, copies), SIGMA)
        sure = classes != ABSTAINS
        assert (classes[sure] == (distances < 0)[sure]).all()
        assert (radii <= np.abs(distances)).all()
    assert sure.all()
    assert (np.abs(distances) - radii < 0.1 * SIGMA).all()


def test_certificates_are_wrong_as_rarely_as_they_say(planted):
    """Of one image under 400 seeds, at a level where errors happen."""
    image, alpha, wrong = planted.placed([0.1]), 0.1, 0
    for seed in range(400):
        radius = certify(
            *(votes(planted, image, SIGMA, 60, seed, part) for part in ("select", "estimate")), SIGMA, alpha
        )
        wrong += radius[1][0] > 0.1
    assert 0 < wrong <= 400 * alpha


def test_votes_have_the_share_that_they_should(planted):
    images = planted.placed([0.0, 0.07, -0.2])
    counts, copies = votes(planted, images, SIGMA, 4000), 4000
    expected = [copies * normal_share(distance / SIGMA) for distance in (0.0, 0.07, -0.2)]
    assert counts.sum(1).tolist() == [copies] * 3
    assert np.abs(counts[:, 0] - expected).max() < 4 * (copies / 4) ** 0.5
    assert not counts[:, 2].any()


def test_the_radius_is_that_of_the_bound():
    classes, radii = certify([[5, 5, 90]], [[40, 0, 960]], 0.25, 0.01)
    share = lower_bound(960, 1000, 0.01)
    assert classes.tolist() == [2]
    assert normal_share(radii[0] / 0.25) == pytest.approx(float(share))


def test_what_is_not_sure_abstains(planted):
    classes, radii = certify([[60, 40], [60, 40], [40, 60]], [[500, 500], [400, 600], [0, 1000]], SIGMA)
    assert classes.tolist() == [ABSTAINS, ABSTAINS, 1]
    assert radii[:2].tolist() == [0, 0]
    assert radii[2] > 0
    images = planted.placed([0.0])
    on_it = certify(*(votes(planted, images, SIGMA, 500, part=part) for part in ("select", "estimate")), SIGMA)
    assert (on_it[0].tolist(), on_it[1].tolist()) == ([ABSTAINS], [0])


def test_a_class_that_the_first_votes_missed_is_no_class():
    assert certify([[9, 1]], [[10, 990]], SIGMA)[0].tolist() == [ABSTAINS]


def test_without_noise_nothing_is_certified_around_an_image(planted):
    images = planted.placed([0.1, -0.1])
    counts = votes(planted, images, 0, 50)
    classes, radii = certify(counts, counts, 0)
    assert counts.tolist() == [[50, 0, 0], [0, 50, 0]]
    assert classes.tolist() == [0, 1]
    assert radii.tolist() == [0, 0]


@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_a_decision_is_a_test_of_two_sides(alpha):
    for first in range(21):
        counts = [[first, 20 - first, 0]]
        both = 2 * tail(20, max(first, 20 - first), 0.5) if first != 10 else 1
        expected = ABSTAINS if both > alpha else int(first < 10)
        assert decide(counts, alpha).tolist() == [expected], first


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_votes_belong_to_image_seed_and_part(classifier, images):
    whole = votes(classifier, images, 0.2, 40)
    assert whole.shape == (4, 10)
    assert np.array_equal(votes(classifier, images.flip(0), 0.2, 40)[::-1], whole)
    assert np.array_equal(np.concatenate([votes(classifier, one, 0.2, 40) for one in images.split(1)]), whole)
    for other in ({"seed": 1}, {"part": "select"}):
        assert not np.array_equal(votes(classifier, images, 0.2, 40, **other), whole)


def test_more_votes_go_on_where_fewer_ended(planted):
    images = planted.placed([0.02, 0.05])
    few, many = (votes(planted, images, SIGMA, copies) for copies in (128, 200))
    assert ((many - few) >= 0).all()


@pytest.mark.parametrize("split", [1, 3])
def test_answers_belong_to_image_and_draw(classifier, images, split):
    defended = Smoothing(deviation=0.2, copies=5)(classifier)
    whole = defended(images)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(torch.cat([defended(part) for part in images.split(split)]), whole, **close)
    torch.testing.assert_close(defended(images.flip(0)), whole.flip(0), **close)
    torch.testing.assert_close(defended.at(SCORING_DRAW).at(0)(images), whole)
    for other in (defended.at(1), Smoothing(deviation=0.2, copies=5, seed=1)(classifier)):
        assert (other(images) - whole).abs().max() > 0.01


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"copies": 3, "deviation": 0.2, "seed": 1}], ids=str)
def test_answers_and_slopes_are_those_of_loops(exact, images, settings):
    defense, pixels = Smoothing(**{"copies": 6} | settings), images[:2].double()
    for row, image in enumerate(pixels):
        uniform = defense.noise(image[None], 5, "copies", (defense.copies, *image.shape))[0]
        told = [exact((image + defense.deviation * noise)[None])[0].softmax(0) for noise in normal_by_hand(uniform)]
        cast, mean = [sum(int(one.argmax()) == c for one in told) for c in range(10)], sum(told) / len(told)
        expected = ((torch.tensor(cast) + mean) / (defense.copies + 1)).log()
        # normal_by_hand takes quantiles by another road, good to 1e-7 or so
        torch.testing.assert_close(defense(exact).at(5)(pixels)[row], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(defense(exact).at(5).surrogate(pixels)[row], mean.log(), rtol=0, atol=1e-5)


def test_the_vote_decides_and_the_mean_probability_settles_ties():
    """Of three copies two say 0 without conviction; of two copies each says another class, one of them louder."""
    answers = torch.log(torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.01, 0.99]]))
    for count, expected in ((3, 0), (2, 1)):
        told = iter([answers[-count:]])
        found = Smoothing(copies=count, deviation=0)(lambda images, told=told: next(told))(torch.zeros(1, 3, 2, 2))
        assert found.argmax().item() == expected
        assert found.exp().sum().item() == pytest.approx(1)


def test_shares_stay_finite_where_probabilities_vanish(images):
    defended = Smoothing(copies=3)(lambda pixels: torch.tensor([[1e4, 0.0]]).expand(len(pixels), 2))
    assert defended(images).isfinite().all()
    assert defended.surrogate(images).isfinite().all()


def test_without_noise_it_is_the_classifier(classifier, images):
    defended = Smoothing(deviation=0, copies=4)(classifier)
    assert torch.equal(defended(images).argmax(1), classifier(images).argmax(1))
    torch.testing.assert_close(defended.surrogate(images), classifier(images).log_softmax(1), rtol=1e-3, atol=1e-3)


def test_passes_are_as_declared(classifier, images):
    defense = Smoothing(copies=7)
    with models.count_passes() as passes:
        defense(classifier)(images)
    assert (passes.forward / len(images), passes.backward) == defense.passes(10)
    with models.count_passes() as passes:
        votes(classifier, images, 0.1, 130)
    assert (passes.forward, passes.backward) == (130 * len(images), 0)


# --- attackers --------------------------------------------------------------------------------------------------------


def test_attackers_are_told_the_mean_and_the_copies(classifier, images):
    defended = Smoothing(copies=2)(classifier)
    assert list(aims_against(defended)) == ["plain", "answer", "margin", "views"]
    pixels = images.clone().requires_grad_()
    value = defended.for_attack()(pixels)
    assert torch.equal(value, defended(images))
    slopes = [torch.autograd.grad(told[:, 0].sum(), pixels)[0] for told in (value, defended.surrogate(pixels))]
    assert torch.equal(*slopes)
    assert slopes[0].abs().max() > 0


def test_an_attacker_reaches_the_plane_and_no_certificate_breaks(planted):
    """In L2 the nearest point beyond the plane lies just outside the distance."""
    images, labels = planted.placed([0.1, 0.1]), torch.tensor([0, 0])
    defense = Smoothing(deviation=SIGMA, copies=16)
    counts = [votes(planted, images, SIGMA, copies, part=part) for copies, part in ((50, "select"), (2000, "estimate"))]
    radius = float(certify(*counts, SIGMA)[1].min())
    assert radius > 0.08
    for eps, expected in ((radius, 0), (0.15, 1)):
        attack = PGD(eps=eps, norm="l2", steps=10, stop=False, keep="last")
        found = attack(defense(planted).surrogate, images, labels)
        assert (found - images).flatten(1).norm(dim=1).max() <= eps + 1e-5
        assert decide(votes(planted, found, SIGMA, 2000)).tolist() == [expected] * 2


# --- wrong settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("deviation", -1), ("deviation", 8), ("deviation", math.nan), ("copies", 0), ("copies", 1.5)]
)
def test_bad_settings_are_named(planted, field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        Smoothing(**{field: value})
    with pytest.raises(ValueError, match=f"{field}="):
        votes(planted, planted.placed([0.1]), **{"deviation": SIGMA, "copies": 2} | {field: value})


@pytest.mark.parametrize("alpha", [-0.1, 0.6, math.nan])
def test_bad_levels_are_named(alpha):
    for ask in (lambda: lower_bound(1, 2, alpha), lambda: certify([[1, 2]], [[1, 2]], 0.1, alpha),
                lambda: decide([[1, 2]], alpha)):  # fmt: skip
        with pytest.raises(ValueError, match="alpha="):
            ask()


@pytest.mark.parametrize(("first", "second"), [([1, 2], [1, 2]), ([[1, 2]], [[1, 2, 3]]), ([[1, 2]], [[1, 2]] * 2)])
def test_votes_of_other_shapes_are_an_error(first, second):
    with pytest.raises(ValueError, match="counts must be"):
        certify(first, second, SIGMA)
