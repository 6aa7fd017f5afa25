"""SCC against loops over one image and one view at a time."""

import inspect
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from by_hand import normal_by_hand, project
from robustclip import models
from robustclip.attacks.aware import aims_against
from robustclip.defenses import consistency
from robustclip.defenses.baselines import within
from robustclip.defenses.consistency import SelfConsistency
from robustclip.defenses.counterattack import Counterattack, encoder, soft_sign
from robustclip.models import ZeroShotClassifier

HALF_OPEN = Counterattack(threshold=0.0245)  # between the scores of the images below


# --- the method by hand, one image (3, h, w) at a time ----------------------------------------------------------------


def views_by_hand(defense, moved, image, draw, use):
    views = []
    for turn in range(defense.count):
        view = moved if turn % 2 == 0 else moved.flip(2)
        if turn >= 2:
            noise = normal_by_hand(defense.noise(image[None], draw, f"{use} {turn}")[0])
            view = (view + defense.deviation * noise).clamp(0, 1)
        views.append(view)
    return views


def guess_by_hand(defense, classifier, warm, image, draw):
    """q, the mean of the views' probabilities."""
    views = views_by_hand(defense, warm, image, draw, "guess")
    return sum(classifier(view[None])[0].softmax(0) for view in views) / defense.count


def margin_by_hand(defense, classifier, view, found):
    """What J averages over the views."""
    texts, feature = classifier.text_features, classifier.clip.encode_images(view[None])[0]
    sharp = found ** (1 / defense.temperature)
    target = sum(weight * text for weight, text in zip(sharp / sharp.sum(), texts, strict=True))
    weight = found.max() if defense.confident else 1
    others = [feature @ text for name, text in enumerate(texts) if name != found.argmax()]
    return weight * feature @ (target / target.norm()) - max(others)


def corrected_by_hand(defense, classifier, image, draw):
    """delta of one image; the warm-up has tests of its own."""
    warm = defense.warmup.correction(classifier, image[None], draw)[0]
    if defense.gated and defense.warmup.score(classifier, image[None], draw) >= defense.warmup.threshold:
        return warm
    found = guess_by_hand(defense, classifier, image + warm, image, draw)
    delta = warm if defense.start == "warm-up" else torch.zeros_like(image)
    for step in range(defense.steps):
        point = delta.clone().requires_grad_()
        views = views_by_hand(defense, image + point, image, draw, f"step {step}")
        margin = sum(margin_by_hand(defense, classifier, view, found) for view in views) / defense.count
        delta = project(image, delta + defense.step_size * torch.autograd.grad(margin, point)[0].sign(), defense.radius)
    return delta


def answer_by_hand(defense, classifier, image, delta, draw):
    views = views_by_hand(defense, image + delta, image, draw, "answer")
    return sum(classifier(view[None])[0] for view in views) / defense.count


@pytest.mark.parametrize(
    "defense",
    [
        SelfConsistency(),
        SelfConsistency(steps=2, count=5, start="zero", confident=True, temperature=0.3, deviation=0.1),
        SelfConsistency(gated=True, warmup=HALF_OPEN, steps=2),
        SelfConsistency(count=1, step_size=2 / 255, radius=3 / 255, temperature=1),
        SelfConsistency(steps=0, count=4, seed=2),
    ],
    ids=repr,
)
def test_scc_is_the_loop(exact, images, defense):
    pixels = images[:2].double()
    deltas = [corrected_by_hand(defense, exact, image, 7) for image in pixels]
    answers = [answer_by_hand(defense, exact, image, delta, 7) for image, delta in zip(pixels, deltas, strict=True)]
    torch.testing.assert_close(defense.correction(exact, pixels, 7), torch.stack(deltas), rtol=0, atol=1e-9)
    torch.testing.assert_close(defense(exact).at(7)(pixels), torch.stack(answers), rtol=0, atol=1e-9)


# --- its parts --------------------------------------------------------------------------------------------------------


def test_without_both_parts_it_is_the_warm_up(classifier, images):
    found = SelfConsistency(steps=0, count=1)(classifier)
    for draw in (0, 5):
        assert torch.equal(found.at(draw)(images), Counterattack()(classifier).at(draw)(images))


def test_the_spatial_part_alone_averages_views_of_the_warm_ups_image(classifier, images):
    warm = images + Counterattack().correction(classifier, images, 0)
    expected = (classifier(warm) + classifier(warm.flip(3))) / 2
    found = SelfConsistency(steps=0, count=2)(classifier)(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_from_zero_the_warm_up_only_guesses(classifier, images):
    delta = SelfConsistency(steps=1, start="zero").correction(classifier, images, 0)
    assert delta.abs().max() < 1 / 255 + 1e-7


def test_gated_it_leaves_closed_images_to_the_warm_up(exact, images):
    pixels, gated = images.double(), SelfConsistency(gated=True, warmup=HALF_OPEN, steps=1)
    opened = HALF_OPEN.gate(exact, pixels, 0) > 0
    found, warm = gated.correction(exact, pixels, 0), HALF_OPEN.correction(exact, pixels, 0)
    assert 0 < opened.sum() < len(pixels)
    assert torch.equal(found[~opened], warm[~opened])
    assert torch.equal(found[opened], replace(gated, gated=False).correction(exact, pixels, 0)[opened])


def test_classes_may_come_in_any_order(exact, images):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    prompts = [exact.prompts[place] for place in order.tolist()]
    other = ZeroShotClassifier(exact.clip, prompts, exact.text_features[order])
    pixels, defense = images[:2].double(), SelfConsistency(steps=2)
    torch.testing.assert_close(defense(other)(pixels), defense(exact)(pixels)[:, order], rtol=0, atol=1e-9)


# --- a planted example ------------------------------------------------------------------------------------------------


class Colours(nn.Module):
    """A CLIP that sees the mean colour."""

    logit_scale = torch.tensor(20.0)

    def raw_images(self, images):
        return images.mean((2, 3))

    def encode_images(self, images):
        return F.normalize(self.raw_images(images), dim=1)


COLOURED = ZeroShotClassifier(Colours(), ["red", "green", "blue"], torch.eye(3))
PLANTED = SelfConsistency(warmup=Counterattack(radius=0), count=2, temperature=0.1)


def flat(*colour):
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("colour", "signs"),
    [((0.6, 0.5, 0.2), (1, -1, -1)), ((0.5, 0.6, 0.2), (-1, 1, -1)), ((0.2, 0.5, 0.6), (-1, -1, 1))],
)
def test_the_correction_feeds_its_guess_and_starves_the_others(colour, signs):
    delta = PLANTED.correction(COLOURED, flat(*colour), 0)
    expected = torch.tensor(signs).view(1, 3, 1, 1) * 3 / 255
    torch.testing.assert_close(delta, expected.expand_as(delta), rtol=0, atol=1e-6)


def test_the_correction_raises_the_margin_of_its_guess():
    before, after = COLOURED(flat(0.6, 0.5, 0.2))[0], PLANTED(COLOURED)(flat(0.6, 0.5, 0.2))[0]
    assert after[0] - after[1] > before[0] - before[1] + 0.4


def test_a_wrong_guess_is_locked_in():
    """Green that an attack has turned reddish stays red."""
    assert PLANTED(COLOURED)(flat(0.51, 0.5, 0.2)).argmax() == 0


@pytest.mark.parametrize("count", [1, 3])
def test_the_correction_raises_margins_of_clips_guesses(classifier, images, count):
    defense = SelfConsistency(count=count)
    warm = defense.warmup.correction(classifier, images, 0)
    found, target = defense.prototype(classifier, images + warm, images, 0)
    moved = images + defense.correction(classifier, images, 0)
    before, after = (
        defense.margins(classifier, defense.seen(place, images, 0, "a look"), found, target)
        for place in (images + warm, moved)
    )
    assert (after > before + 0.01).all()


# --- what an attacker is told -----------------------------------------------------------------------------------------


def slopes(function, pixels):
    """The derivative along one direction: by autograd, and by differences too small for float32, which keys noise."""
    direction = torch.randint(2, pixels.shape, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    ahead, behind, point = pixels + 5e-9 * direction, pixels - 5e-9 * direction, pixels.clone().requires_grad_()
    assert torch.equal(ahead.float(), behind.float())
    with sdpa_kernel(SDPBackend.MATH):
        (exact,) = torch.autograd.grad(function(point), point)
        return (exact * direction).sum(), (function(ahead) - function(behind)).detach() / 1e-8


@pytest.mark.parametrize(
    "defense", [SelfConsistency(count=2, steps=1), SelfConsistency(count=1, steps=2, start="zero")], ids=repr
)
def test_smooth_steps_have_the_derivative_of_differences(exact, images, defense):
    grey = (images[:2] / 2 + 0.25).double()  # so that no pixel is cut at black or white
    found, expected = slopes(lambda pixels: defense.smooth(exact, pixels, 0)[:, 0].sum(), grey)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_smooth_steps_hold_the_prototype_where_the_warm_up_put_it(classifier, images):
    """The unrolled step climbs J(delta) at a fixed t_soft, as the steps themselves do."""
    defense, pixels = SelfConsistency(steps=1, temperature=1), images.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        warm = defense.warmup.moves(encoder(classifier), pixels, 0, smooth=True).detach()
        found, target = (part.detach() for part in defense.prototype(classifier, images + warm, images, 0))
        delta = warm.requires_grad_()
        margins = defense.margins(classifier, defense.seen(images + delta, images, 0, "step 0"), found, target)
        (gradient,) = torch.autograd.grad(margins.sum(), delta)
        delta = within(images, delta.detach() + defense.step_size * soft_sign(gradient), defense.radius)
        expected = sum(map(classifier, defense.seen(images + delta, images, 0, "answer"))) / defense.count
        torch.testing.assert_close(defense.smooth(classifier, pixels, 0), expected, rtol=1e-4, atol=1e-3)


def test_the_guess_is_the_logarithm_of_q(exact, images):
    pixels, defense = images.double(), SelfConsistency()
    warm = pixels + defense.warmup.correction(exact, pixels, 3)
    expected = [guess_by_hand(defense, exact, *pair, 3) for pair in zip(warm, pixels, strict=True)]
    torch.testing.assert_close(defense.guess(exact, pixels, 3), torch.stack(expected).log(), rtol=0, atol=1e-9)


def test_the_views_are_those_that_answer(exact, images):
    pixels, defense = images[:2].double(), SelfConsistency(count=4)
    moved = pixels + defense.correction(exact, pixels, 3)
    seen = [views_by_hand(defense, *pair, 3, "answer") for pair in zip(moved, pixels, strict=True)]
    expected = torch.stack([exact(torch.stack(views)) for views in seen], 1)
    torch.testing.assert_close(defense.views(exact, pixels, 3), expected, rtol=0, atol=1e-9)


def test_the_gate_is_the_warm_ups(classifier, images):
    defense = SelfConsistency(warmup=HALF_OPEN, gated=True)
    assert torch.equal(defense.gate(classifier, images, 3), HALF_OPEN.gate(classifier, images, 3))


@pytest.mark.parametrize(
    ("settings", "missing"),
    [({}, set()), ({"count": 1}, {"views"}), ({"steps": 0}, {"guess"}),
     ({"warmup": Counterattack(threshold=None)}, {"gate"}), ({"steps": 0, "count": 1}, {"guess", "views"})],
)  # fmt: skip
def test_attackers_are_told_what_there_is(classifier, settings, missing):
    found = {*aims_against(SelfConsistency(**settings)(classifier))}
    assert found == {"plain", "guess", "smooth", "answer", "margin", "views", "gate"} - missing


# --- costs and settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", ["relative", "mirror"])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_gated_passes_are_as_declared(classifier, images, drift, draws, threshold):
    warmup = Counterattack(threshold=threshold, drift=drift, drift_draws=draws, reverse=drift == "mirror")
    defense = SelfConsistency(warmup=warmup, gated=True, steps=1)
    with models.count_passes() as passes:
        defense(classifier)(images)
    assert (passes.forward / len(images), passes.backward / len(images)) == defense.passes(10)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"steps": 0, "gated": True}, {"count": 1}, {"warmup": Counterattack(mirrored=True)}],
    ids=str,
)
def test_passes_of_the_parts_are_as_declared(classifier, images, settings):
    defense = SelfConsistency(**settings)
    with models.count_passes() as passes:
        defense(classifier)(images)
    assert (passes.forward / len(images), passes.backward / len(images)) == defense.passes(10)


def test_the_calls_of_the_docstring_work(classifier, images):
    calls = re.findall(r"^ +(SelfConsistency\(.*?\)) ", inspect.getdoc(consistency), re.MULTILINE)
    assert len(calls) == 4
    for call in calls:
        assert eval(call, vars(consistency))(classifier)(images).shape == (4, 10)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", -1), ("step_size", 2), ("radius", -1), ("count", 0), ("temperature", 0), ("deviation", 2)],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        SelfConsistency(**{field: value})


def test_a_start_of_no_known_kind_is_an_error():
    with pytest.raises(ValueError, match="start 'noise'"):
        SelfConsistency(start="noise")
