"""Views and the defenses that average them, against one image and one view at a time."""

import math

import pytest
import torch
from torch.nn import functional as F

from robustclip.attacks.aware import aims_against, told
from robustclip.component import identity
from robustclip.defenses.base import features_of
from robustclip.defenses.baselines import RandomNoise
from robustclip.defenses.views import TTE, Mirrored, Views, cubic_weights, entropy, resampled, resized_crops, shifted


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def crop_by_hand(image, numbers, area, flip=True):
    """One crop of one image: its part in plain numbers, its pixels by torch's own sampling."""
    share, shape, across, down, mirror = [(number + 1) / 2 for number in numbers.tolist()]
    part, ratio = area[0] + (area[1] - area[0]) * share, 3 / 4 * (16 / 9) ** shape
    width, height = min(1, math.sqrt(part * ratio)), min(1, math.sqrt(part / ratio))
    rows, columns = ((torch.arange(side) + 0.5) / side for side in image.shape[-2:])
    places = torch.meshgrid((1 - height) * down + height * rows, (1 - width) * across + width * columns, indexing="ij")
    grid = torch.stack([places[1], places[0]], 2)[None] * 2 - 1
    crop = F.grid_sample(image[None], grid.to(image), mode="bicubic", padding_mode="border", align_corners=False)
    return (crop.flip(3) if flip and mirror < 0.5 else crop)[0].clamp(0, 1)


def shift_by_hand(image, numbers, pad):
    """One crop of one image in a frame of zeros."""
    down, across = (min(int((number + 1) / 2 * (2 * pad + 1)), 2 * pad) for number in numbers.tolist())
    framed = F.pad(image, (pad, pad, pad, pad))
    return framed[:, down : down + image.shape[1], across : across + image.shape[2]]


# --- crops and shifts -------------------------------------------------------------------------------------------------


def test_a_crop_is_the_same_part_of_the_whole_image_enlarged(images):
    part = cubic_weights(torch.full((4,), 8 / 32), torch.full((4,), 16 / 32), 32)
    large = F.interpolate(images, scale_factor=2, mode="bicubic", align_corners=False)
    torch.testing.assert_close(resampled(images, part, part), large[:, :, 16:48, 16:48], rtol=0, atol=1e-6)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("area", [(0.08, 1.0), (0.3, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("size", [(32, 32), (20, 28)])
def test_crops_are_those_of_torchs_bicubic_sampling(images, flip, area, size):
    pixels, numbers = images[:, :, : size[0], : size[1]].repeat(5, 1, 1, 1), uniform(20, 5)
    expected = [crop_by_hand(*pair, area, flip) for pair in zip(pixels, numbers, strict=True)]
    torch.testing.assert_close(resized_crops(pixels, numbers, area, flip), torch.stack(expected), rtol=0, atol=1e-4)


def test_the_whole_image_as_a_crop_is_the_image(images):
    numbers = torch.tensor([[1.0, 0, 0, 0, 1]]).expand(4, 5)
    torch.testing.assert_close(resized_crops(images, numbers, (0.08, 1)), images, rtol=0, atol=1e-6)


def test_a_shift_is_a_crop_of_a_padded_image(images):
    pixels, numbers = images[:, :, :20].repeat(5, 1, 1, 1), uniform(20, 2)
    expected = torch.stack([shift_by_hand(*pair, 4) for pair in zip(pixels, numbers, strict=True)])
    assert torch.equal(shifted(pixels, numbers, 4), expected)


def test_all_moves_are_as_likely():
    """Uniform numbers give each of the 2 pad + 1 offsets of a random crop the same chance, the outermost ones, too."""
    numbers = torch.stack([torch.zeros(9000), uniform(9000)], 1)
    shares = shifted(torch.eye(9)[4].expand(9000, 3, 1, 9), numbers, 4)[:, 0, 0].mean(0)
    torch.testing.assert_close(shares, torch.full((9,), 1 / 9), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "view",
    [lambda images: resized_crops(images, uniform(1, 5), (0.1, 1)), lambda images: shifted(images, uniform(1, 2), 2)],
    ids=["crop", "shift"],
)
def test_gradients_of_views_are_those_of_differences(view):
    pixels = (0.5 + 0.1 * uniform(1, 3, 6, 7, seed=1)).double().requires_grad_()
    assert torch.autograd.gradcheck(view, pixels)


def test_entropy_is_that_of_the_distribution():
    logits = 3 * uniform(5, 4, 10)
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy(logits.log_softmax(2)), expected)


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_the_image_is_seen_first_then_crops_of_numbers_of_their_own(images):
    defense = Views(count=5, area=(0.2, 0.9), seed=3)
    first, *crops = defense.seen(images, 7)
    numbers = defense.noise(images, 7, "views", (4, 5))
    assert torch.equal(first, images)
    for turn, crop in enumerate(crops):
        expected = [crop_by_hand(image, own[turn], (0.2, 0.9)) for image, own in zip(images, numbers, strict=True)]
        torch.testing.assert_close(crop, torch.stack(expected), rtol=0, atol=1e-4)


def test_no_two_views_are_alike(images):
    first = torch.stack(Views(count=8).seen(images, 0)).flatten(2)
    assert torch.cdist(first[:, 0], first[:, 0]).fill_diagonal_(9).min() > 0.1


def test_tte_sees_ten_views_by_default(images):
    """The image, four crops of it in a frame of an eighth of the side, and their mirror images."""
    defense = TTE()
    numbers = defense.noise(images, 2, "crops", (4, 2))
    seen = torch.stack(defense.seen(images, 2), 1)
    for views, image, own in zip(seen, images, numbers, strict=True):
        crops = [shift_by_hand(image, one, 4) for one in own]
        expected = [image, image.flip(2), *crops, *(crop.flip(2) for crop in crops)]
        assert torch.equal(views, torch.stack(expected))


def test_all_crops_of_the_released_tte_are_the_last_one(images):
    correct, released = TTE().seen(images, 2), TTE(released=True).seen(images, 2)
    for place, view in enumerate(released):
        assert torch.equal(view, correct[place if place < 2 else 5 if place < 6 else 9])


def test_mirrored_sees_the_image_and_its_mirror_image(images):
    assert torch.equal(torch.stack(Mirrored().seen(images, 0)), torch.stack([images, images.flip(3)]))


# --- what is made of it -----------------------------------------------------------------------------------------------


DEFENSES = [Views(count=3), TTE(), TTE(released=True), Mirrored()]


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
def test_logits_are_averaged(classifier, images, defense):
    expected = sum(map(classifier, defense.seen(images, 4))) / defense.passes(10)[0]
    torch.testing.assert_close(defense(classifier).at(4)(images), expected, rtol=0, atol=1e-4)


def test_probabilities_are_averaged(classifier, images):
    defense = Views(count=3, average="probabilities")
    expected = sum(classifier(view).softmax(1) for view in defense.seen(images, 0)) / 3
    torch.testing.assert_close(defense(classifier)(images).exp(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("defense", [Views(count=3, average="features"), Mirrored(average="features")], ids=repr)
def test_features_are_averaged_behind_another_defense(classifier, images, defense):
    inner = RandomNoise(radius=0.05)(classifier)
    parts = [features_of(inner)(view) for view in defense.seen(images, 0)]
    expected = classifier.clip.logit_scale * F.normalize(sum(parts), dim=1) @ classifier.text_features.T
    torch.testing.assert_close(defense(inner)(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("average", ["logits", "probabilities", "features"])
def test_the_gradient_of_an_answer_goes_back_through_all_views(classifier, images, average):
    """From the slope at each view to the pixels by torch's own sampling."""
    defense, pixels = Views(count=4, average=average), images.clone().requires_grad_()
    (found,) = torch.autograd.grad(defense(classifier)(pixels)[:, 0].sum(), pixels)
    views = torch.stack(defense.seen(images, 0)).requires_grad_()
    features = classifier.clip.encode_images(views.flatten(0, 1)).unflatten(0, (4, 4))
    if average == "features":
        features = F.normalize(features.mean(0, keepdim=True), dim=2)
    logits = classifier.clip.logit_scale * features @ classifier.text_features.T
    answers = logits.softmax(2).mean(0).log() if average == "probabilities" else logits.mean(0)
    (slopes,) = torch.autograd.grad(answers[:, 0].sum(), views)
    numbers = defense.noise(images, 0, "views", (3, 5))
    for image, own, slope, row in zip(images, numbers, slopes.transpose(0, 1), found, strict=True):
        point = image.clone().requires_grad_()
        seen = torch.stack([point, *(crop_by_hand(point, one, defense.area) for one in own)])
        (expected,) = torch.autograd.grad(seen, point, slope)
        assert (row - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("defense", DEFENSES, ids=repr)
def test_attackers_are_told_each_view(classifier, images, defense):
    defended = defense(classifier)
    expected = torch.stack([classifier(view) for view in defense.seen(images, 0)])
    assert list(aims_against(defended)) == ["plain", "answer", "margin", "views"]
    torch.testing.assert_close(told(defended, "views", images), expected, rtol=0, atol=1e-4)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Views, "count", 0),
        (Views, "count", 2.5),
        (Views, "area", (0.5, 0.1)),
        (Views, "area", (0.5,)),
        (Views, "area", (0.5, 1.5)),
        (TTE, "count", 0),
        (TTE, "pad", -1),
        (Mirrored, "count", 3),
    ],
)
def test_what_cannot_be_set_is_refused(kind, field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        kind(**{field: value})


def test_an_average_of_no_known_kind_is_an_error():
    with pytest.raises(ValueError, match="average 'median'"):
        Views(average="median")


def test_an_area_from_a_list_is_the_same_setting():
    assert identity(Views(area=[0.3, 1.0])) == identity(Views(area=(0.3, 1.0)))


@pytest.mark.parametrize("average", ["logits", "features"])
def test_bytes_are_refused(classifier, images, average):
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        Views(count=3, average=average)(classifier)(images * 255)
