"""Anchors of noisy copies against loops over one image at a time."""

import pytest
import torch

from robustclip import models
from robustclip.data.roles import role, tinyworld_samples
from robustclip.defenses.anchors import NoiseAnchor


@pytest.fixture(scope="module")
def classifier():
    return models.zero_shot(models.load(device="cpu"), role("cifar10"))


@pytest.fixture(scope="module")
def images():
    return tinyworld_samples("cifar10", "test", 4)[0].float() / 255


@pytest.mark.parametrize("path", ["straight", "sphere"])
@pytest.mark.parametrize("settings", [{"step": 0}, {"deviation": 0}], ids=str)
def test_without_a_step_or_noise_it_is_plain_clip(classifier, images, path, settings):
    found = NoiseAnchor(path=path, copies=3, **settings)(classifier)(images)
    torch.testing.assert_close(found, classifier(images), rtol=0, atol=1e-3)
