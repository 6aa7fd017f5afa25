"""TTC and its relatives against loops over one image at a time."""

import pytest
import torch

from robustclip import models
from robustclip.data.roles import role, tinyworld_samples
from robustclip.defenses.baselines import RandomNoise
from robustclip.defenses.counterattack import Counterattack


@pytest.fixture(scope="module")
def classifier():
    return models.zero_shot(models.load(device="cpu"), role("cifar10"))


@pytest.fixture(scope="module")
def images():
    return tinyworld_samples("cifar10", "test", 4)[0].float() / 255


@pytest.mark.parametrize(
    "defense",
    [Counterattack(steps=0, threshold=None), Counterattack(steps=0, threshold=None, beta=None),
     Counterattack(threshold=1e-9), Counterattack(steps=0, threshold=None, closed="nothing")],
    ids=["no steps", "no steps, last delta", "all gates closed", "no steps, open gates"],
)  # fmt: skip
def test_what_is_not_counterattacked_is_random_noise(classifier, images, defense):
    for draw in (0, 5):
        expected = RandomNoise().correction(classifier, images, draw)
        assert torch.equal(defense.correction(classifier, images, draw), expected)


def test_without_a_threshold_everything_is_counterattacked_fully(classifier, images):
    soft = Counterattack(threshold=None, sharpness=5)
    expected = Counterattack(threshold=None).correction(classifier, images, 0)
    torch.testing.assert_close(soft.correction(classifier, images, 0), expected, rtol=0, atol=1e-6)


def test_the_soft_gate_has_a_slope(classifier, images):
    """The answer follows the share w(x) with its own gradient; only the steps are held constant."""
    defense, pixels = Counterattack(sharpness=5, threshold=0.03, steps=4), images.clone().requires_grad_()
    (found,) = torch.autograd.grad(defense.logits(classifier, pixels, 0)[:, 0].sum(), pixels)
    start, moved = defense.start(images, 0), Counterattack(threshold=None, steps=4).correction(classifier, images, 0)
    share = torch.sigmoid(5 * defense.gate(classifier, pixels, 0))[:, None, None, None]
    answer = classifier(pixels + share * moved + (1 - share) * start)
    (expected,) = torch.autograd.grad(answer[:, 0].sum(), pixels)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
