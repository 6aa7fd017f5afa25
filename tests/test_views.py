"""Views and the defenses that average them, against one image and one view at a time."""

import pytest
import torch
from torch.nn import functional as F

from robustclip import models
from robustclip.data.roles import role, tinyworld_samples
from robustclip.defenses.base import features_of
from robustclip.defenses.baselines import RandomNoise
from robustclip.defenses.views import TTE, Mirrored, Views, cubic_weights, resampled, shifted


@pytest.fixture(scope="module")
def classifier():
    return models.zero_shot(models.load(device="cpu"), role("cifar10"))


@pytest.fixture(scope="module")
def images():
    return tinyworld_samples("cifar10", "test", 4)[0].float() / 255


def test_a_crop_is_the_same_part_of_the_whole_image_enlarged(images):
    part = cubic_weights(torch.full((4,), 8 / 32), torch.full((4,), 16 / 32), 32)
    large = F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)
    torch.testing.assert_close(resampled(images, part, part), large[:, :, 16:48, 16:48], rtol=0, atol=1e-6)


def test_a_shift_is_a_crop_of_a_padded_image(images):
    moves = torch.tensor([[0.25, -0.75], [-1, 1], [0, 0], [0.5, 0.5]])
    framed = F.pad(images, (4, 4, 4, 4))
    for row, image, (down, across) in zip(shifted(images, moves, 4), framed, (4 * moves).int().tolist(), strict=True):
        assert torch.equal(row, image[:, 4 + down :, 4 + across :][:, :32, :32])


def test_all_moves_are_as_likely():
    """Uniform numbers give each of the 2 pad + 1 offsets of a random crop the same chance, the outermost ones, too."""
    numbers = torch.rand(9000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = shifted(torch.eye(9)[4].expand(9000, 3, 1, 9), torch.stack([0 * numbers[:, 0], numbers[:, 1]], 1), 4)
    shares = seen[:, 0, 0].mean(0)
    torch.testing.assert_close(shares, torch.full((9,), 1 / 9), rtol=0, atol=0.02)


@pytest.mark.parametrize("defense", [Views(count=3, average="features"), Mirrored(average="features")])
def test_features_are_averaged_behind_another_defense(classifier, images, defense):
    inner = RandomNoise(radius=0.05)(classifier)
    parts = [features_of(inner)(view) for view in defense.seen(images, 0)]
    expected = classifier.clip.logit_scale * F.normalize(sum(parts), dim=1) @ classifier.text_features.T
    torch.testing.assert_close(defense(inner)(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{"area": (0.5, 0.1)}, {"area": (0.5,)}])
def test_an_area_is_a_lower_and_an_upper_end(settings):
    with pytest.raises(ValueError, match="area"):
        Views(**settings)


def test_what_cannot_be_set_is_refused():
    with pytest.raises(ValueError, match="count"):
        Mirrored(count=3)
    with pytest.raises(ValueError, match="pad"):
        TTE(pad=-1)
