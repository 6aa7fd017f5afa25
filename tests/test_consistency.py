"""SCC against loops over one image and one view at a time."""

import inspect
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustclip import models
from robustclip.data.roles import role, tinyworld_samples
from robustclip.defenses import consistency
from robustclip.defenses.baselines import within
from robustclip.defenses.consistency import SelfConsistency
from robustclip.defenses.counterattack import Counterattack, encoder, soft_sign


@pytest.fixture(scope="module")
def classifier():
    return models.zero_shot(models.load(device="cpu"), role("cifar10"))


@pytest.fixture(scope="module")
def images():
    return tinyworld_samples("cifar10", "test", 8)[0].float() / 255


@pytest.mark.parametrize("drift", ["relative", "mirror"])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_gated_passes_are_as_declared(classifier, images, drift, draws, threshold):
    warmup = Counterattack(threshold=threshold, drift=drift, drift_draws=draws, reverse=drift == "mirror")
    defense = SelfConsistency(warmup=warmup, gated=True, steps=1)
    with models.count_passes() as passes:
        defense(classifier)(images)
    assert (passes.forward / len(images), passes.backward / len(images)) == defense.passes(10)


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


def test_the_calls_of_the_docstring_work():
    calls = re.findall(r"^ +(SelfConsistency\(.*?\)) ", inspect.getdoc(consistency), re.MULTILINE)
    assert len(calls) == 4
    for call in calls:
        eval(call, vars(consistency))
