"""The contract of defenses: draws, surrogates, gates, features, whatever the batch and the classes."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustclip import models
from robustclip.classes import Classes
from robustclip.component import component
from robustclip.data.roles import role, tinyworld_samples
from robustclip.defenses.base import SCORING_DRAW, Defense, OwnDefense, as_defense, features_of, redrawn
from robustclip.defenses.broken import Noisy
from robustclip.models import ZeroShotClassifier


@pytest.fixture(scope="module")
def images():
    return tinyworld_samples("cifar10", "test", 6)[0].float() / 255


@component
class Smoothed(Defense):
    """The mean over noisy copies, each image's and draw's own."""

    copies: int = 2
    deviation: float = 0.2
    seed: int = 0
    randomised: ClassVar[bool] = True

    def logits(self, classifier, images, draw):
        return sum(classifier(images + self.deviation * self.noise(images, draw, turn)) for turn in range(self.copies))

    def passes(self, classes):
        return self.copies, 0


@component
class Rounded(Defense):
    """No slope of its own; a gate on the brightness."""

    levels: int = 8

    def logits(self, classifier, images, draw):
        return classifier((images * self.levels).round() / self.levels)

    def surrogate(self, classifier, images, draw):
        return classifier(images)

    def gate(self, classifier, images, draw):
        return images.mean((1, 2, 3))


@component
class Described(Defense):
    """The mean over the descriptions of each class."""

    def logits(self, classifier, images, draw):
        features = classifier.clip.encode_images(images)
        scale = classifier.clip.logit_scale
        return scale * torch.stack([(features @ texts.T).mean(1) for texts in classifier.description_features], 1)


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 2, 4])
def test_answers_do_not_depend_on_the_batch(classifier, images, split):
    defended = Smoothed()(classifier).at(3)
    whole = defended(images)
    parts = torch.cat([defended(part) for part in images.split(split)])
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whole.flip(0), defended(images.flip(0)), rtol=1e-3, atol=1e-3)


def test_draws_differ_and_repeat(classifier, images):
    defended = Smoothed()(classifier)
    first = defended(images)
    assert defended.draw == 0
    for draw in (1, 2, SCORING_DRAW):
        again = redrawn(defended, draw)
        assert (again(images) - first).abs().max() > 0.05
        assert torch.equal(again(images), defended.at(draw)(images))
    assert torch.equal(defended.at(1).at(0)(images), first)
    other = Smoothed(seed=1)(classifier)
    assert (other(images) - first).abs().max() > 0.05


def test_noise_of_every_image_draw_and_part_differs(images):
    defense = Smoothed()
    twice = images[[0, 1, 0]]
    noise = defense.noise(twice, 0)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    others = [defense.noise(twice, 0, 1), defense.noise(twice, 1), Smoothed(seed=1).noise(twice, 0)]
    assert all((noise - other).abs().mean() > 0.5 for other in others)
    assert defense.noise(images, 0, "crop", (4,)).shape == (6, 4)


def test_draws_reach_the_defenses_inside(classifier, images):
    nested = Rounded(levels=255)(Smoothed()(classifier))
    assert torch.equal(nested.at(4)(images), Rounded(levels=255)(Smoothed()(classifier).at(4))(images))
    assert not torch.equal(nested.at(4)(images), nested(images))


def test_a_classifier_without_draws_stays(classifier):
    assert redrawn(classifier, 7) is classifier


# --- what an attacker sees --------------------------------------------------------------------------------------------


def test_for_attack_answers_truly_and_climbs_the_surrogate(classifier, images):
    defended, pixels = Rounded()(classifier), images.clone().requires_grad_()
    seen = defended.for_attack()
    truth = defended(images)
    assert torch.equal(seen(images), truth)
    value = seen(pixels)
    assert torch.equal(value, truth)
    (gradient,) = torch.autograd.grad(value[:, 0].sum(), pixels)
    (expected,) = torch.autograd.grad(classifier(pixels)[:, 0].sum(), pixels)
    assert torch.equal(gradient, expected)
    assert gradient.abs().max() > 0
    with models.count_passes() as passes, torch.no_grad():
        seen(pixels)
    assert passes.forward == len(images), "nobody asked for a gradient"


def test_a_defense_without_surrogate_is_asked_once(classifier, images):
    seen = Smoothed()(classifier).for_attack()
    with models.count_passes() as passes:
        pixels = images.clone().requires_grad_()
        torch.autograd.grad(seen(pixels).sum(), pixels)
    assert (passes.forward, passes.backward) == (2 * len(images), 2 * len(images))
    again = seen.at(5)
    assert torch.equal(again(images), Smoothed()(classifier).at(5)(images))


def test_gates_are_shown(classifier, images):
    assert torch.equal(Rounded()(classifier).gate(images), images.mean((1, 2, 3)))
    assert Smoothed()(classifier).gate(images) is None


def test_passes_are_as_declared(classifier, images):
    for defense in (Smoothed(copies=3), Rounded()):
        with models.count_passes() as passes:
            defense(classifier)(images)
        assert (passes.forward / len(images), passes.backward / len(images)) == defense.passes(10)


# --- features ---------------------------------------------------------------------------------------------------------


STRANGE = Classes(["0 in the snow", "1", "two"], ["a 0", "a photo of 1", "2"], [["x"], [], ["y", "z"]])


@pytest.mark.parametrize("classes", [role("cifar10").classes, STRANGE], ids=["usual", "strange"])
@pytest.mark.parametrize(
    "defense",
    [None, Smoothed(), Rounded(), Described(), as_defense(lambda inner: inner)],
    ids=["none", "smoothed", "rounded", "described", "own"],
)
def test_features_are_what_the_defense_leaves_of_them(clip, images, classes, defense):
    classifier = ZeroShotClassifier(clip, classes)
    features = features_of(defense(classifier) if defense else classifier)(images)
    assert features.shape == (6, 64)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    expected = {
        Smoothed: lambda: sum(clip.encode_images(images + 0.2 * Smoothed().noise(images, 0, k)) for k in (0, 1)),
        Rounded: lambda: clip.encode_images((images * 8).round() / 8),
    }.get(type(defense), lambda: clip.encode_images(images))()
    torch.testing.assert_close(features, F.normalize(expected, dim=1), rtol=1e-3, atol=1e-3)


def test_features_of_what_an_attacker_sees_have_the_surrogates_gradient(clip, classifier, images):
    pixels = images.clone().requires_grad_()
    seen = Rounded()(classifier).at(2).for_attack()
    features = features_of(seen)(pixels)
    assert torch.equal(features, features_of(Rounded()(classifier))(images))
    (gradient,) = torch.autograd.grad(features[:, 0].sum(), pixels)
    assert gradient.abs().max() > 0


def test_features_know_the_draw(classifier, images):
    defended = Smoothed()(classifier)
    assert not torch.equal(features_of(defended.at(1))(images), features_of(defended)(images))


def test_descriptions_have_features(clip):
    first, second, third = ZeroShotClassifier(clip, STRANGE).description_features
    torch.testing.assert_close(first, clip.text_features(["x"]))
    torch.testing.assert_close(second, clip.text_features(["a photo of 1"]))
    assert third.shape == (2, 64)


@pytest.mark.parametrize("own", [lambda images: images, nn.Flatten()], ids=["function", "module"])
def test_what_has_no_features_says_so(own):
    for defended in (own, Rounded()(own), OwnDefense(defense=lambda inner: inner)(own)):
        with pytest.raises(ValueError, match="has neither image features nor prompts to attack: it is no"):
            features_of(defended)


# --- other people's defenses ------------------------------------------------------------------------------------------


def test_any_callable_is_a_defense(classifier, images):
    built = []

    def darker(inner):
        built.append(inner)
        return lambda images: inner(images * 0.5)

    defended = as_defense(darker)(classifier)
    assert torch.equal(defended(images), classifier(images * 0.5))
    assert torch.equal(defended.for_attack().at(3)(images), classifier(images * 0.5))
    assert built[0] is classifier
    assert as_defense(Rounded()) == Rounded()


def test_broken_noise_is_nobodys(classifier, images):
    defended = Noisy()(classifier)
    assert not torch.equal(defended(images), defended(images))
    assert Noisy.randomised
