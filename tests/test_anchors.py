"""Anchors of noisy copies against loops over one image at a time."""

import math

import pytest
import torch
from torch.nn import functional as F

from by_hand import normal_by_hand
from robustclip.attacks.aware import aims_against
from robustclip.defenses.anchors import NoiseAnchor
from robustclip.defenses.views import Mirrored

PATHS = ["straight", "sphere"]


def unit(vector):
    return vector / vector.norm()


def anchor_by_hand(defense, clip, image, draw):
    """z and a of one image, copy by copy."""
    uniform, anchor = defense.noise(image[None], draw, "copies", (defense.copies, *image.shape))[0], 0
    for noise in normal_by_hand(uniform):
        copy = image + defense.deviation * noise
        anchor = anchor + unit(clip.raw_images((copy.clamp(0, 1) if defense.clamp else copy)[None])[0])
    return unit(clip.raw_images(image[None])[0]), unit(anchor)


def moved_by_hand(defense, place, anchor):
    """z' on the chord, or on the great circle as its two ends mixed by sines."""
    if defense.path == "straight":
        return unit((1 - defense.step) * place + defense.step * anchor)
    angle = (place @ anchor).arccos()
    return (torch.sin((1 - defense.step) * angle) * place + torch.sin(defense.step * angle) * anchor) / angle.sin()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "settings", [{}, {"step": 0.4, "copies": 3, "clamp": False, "deviation": 0.1, "seed": 1}], ids=str
)
def test_answers_are_those_of_loops(exact, images, path, settings):
    defense, pixels = NoiseAnchor(path=path, **settings), images[:2].double()
    moved = [moved_by_hand(defense, *anchor_by_hand(defense, exact.clip, image, 5)) for image in pixels]
    expected = exact.clip.logit_scale.float() * torch.stack(moved) @ exact.text_features.T
    torch.testing.assert_close(defense(exact).at(5)(pixels), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_a_step_of_one_averages_over_noise(exact, images, path):
    defense, pixels = NoiseAnchor(path=path, step=1, copies=3), images.double()
    anchors = torch.stack([anchor_by_hand(defense, exact.clip, image, 0)[1] for image in pixels])
    expected = exact.clip.logit_scale.float() * anchors @ exact.text_features.T
    torch.testing.assert_close(defense(exact)(pixels), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("settings", [{"step": 0}, {"deviation": 0}], ids=str)
def test_without_a_step_or_noise_it_is_plain_clip(classifier, images, path, settings):
    found = NoiseAnchor(path=path, copies=3, **settings)(classifier)(images)
    torch.testing.assert_close(found, classifier(images), rtol=0, atol=1e-3)


@pytest.mark.parametrize("step", [0, 0.5, 1, 2])
@pytest.mark.parametrize("angle", [0.1, 0.6, 1.4])
def test_the_sphere_turns_by_the_step_and_the_straight_path_along_the_chord(step, angle):
    """In the plane of z and a, z at angle zero."""
    place, anchor = torch.tensor([[[1, 0, 0]], [[math.cos(angle), math.sin(angle), 0]]], dtype=torch.float64)
    turned = {path: NoiseAnchor(path=path, step=step).moved(place, anchor)[0] for path in PATHS}
    reached = {path: math.atan2(end[1], end[0]) for path, end in turned.items()}
    chord = math.atan2(step * math.sin(angle), 1 - step + step * math.cos(angle))
    assert reached == pytest.approx({"straight": chord, "sphere": step * angle})
    assert all(end.norm().item() == pytest.approx(1) for end in turned.values())


def test_the_two_paths_meet_where_the_anchor_is_near(exact, images):
    """They part with the square of the angle."""
    defenses = [NoiseAnchor(path=path, deviation=1 / 255, copies=3) for path in PATHS]
    moved = [defense.moved(*defense.place_and_anchor(exact, images.double(), 0)) for defense in defenses]
    place = exact.clip.encode_images(images.double())
    assert ((moved[0] - moved[1]).norm(dim=1) < 1e-2 * (moved[0] - place).norm(dim=1)).all()


@pytest.mark.parametrize("path", PATHS)
def test_an_image_that_noise_does_not_move_has_a_slope(classifier, images, path):
    pixels = images.clone().requires_grad_()
    answers = NoiseAnchor(path=path, copies=2, deviation=0)(classifier)(pixels)
    gradient = torch.autograd.grad(answers[:, 0].sum(), pixels)[0]
    assert gradient.isfinite().all()
    assert gradient.flatten(1).norm(dim=1).min() > 0.1


def test_copies_go_through_the_defense_inside(classifier, images):
    """The feature of each is the mean over itself and its mirror image."""
    defense = NoiseAnchor(copies=1, step=1)
    noise = normal_by_hand(defense.noise(images, 0, "copies", (1, *images.shape[1:]))[:, 0].double())
    copies = (images + defense.deviation * noise.float()).clamp(0, 1)
    features = classifier.clip.encode_images(copies) + classifier.clip.encode_images(copies.flip(3))
    expected = classifier.clip.logit_scale * F.normalize(features, dim=1) @ classifier.text_features.T
    torch.testing.assert_close(defense(Mirrored()(classifier))(images), expected, rtol=0, atol=1e-3)


def test_attackers_are_told_nothing_but_the_answer(classifier):
    """All of it is differentiable."""
    assert list(aims_against(NoiseAnchor()(classifier))) == ["plain", "answer", "margin"]


@pytest.mark.parametrize(("field", "value"), [("deviation", -1), ("deviation", 8), ("copies", 0), ("step", -1)])
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        NoiseAnchor(**{field: value})


def test_a_path_of_no_known_kind_is_an_error():
    with pytest.raises(ValueError, match="path 'round'"):
        NoiseAnchor(path="round")
