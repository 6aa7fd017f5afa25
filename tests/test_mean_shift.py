"""MTA against loops over one image and one view at a time."""

import math

import pytest
import torch
from torch.nn import functional as F

from robustclip.attacks.aware import aims_against, told
from robustclip.component import identity
from robustclip.defenses.base import features_of
from robustclip.defenses.mean_shift import MTA
from robustclip.defenses.views import Views
from robustclip.models import ZeroShotClassifier, count_passes


def random_units(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def mode_by_hand(defense, features, affinity):
    """The mode of unit features (views, d), view by view, in plain numbers."""
    rows, views = features.double().tolist(), len(features)
    apart = lambda one, other: sum((a - b) ** 2 for a, b in zip(one, other, strict=True))  # noqa: E731
    widths = []
    for place, row in enumerate(rows):
        squares = sorted(apart(row, other) for number, other in enumerate(rows) if number != place)
        nearest = squares[: max(1, int(defense.nearest * (views - 1)))]
        widths.append(sum(nearest) / len(nearest) / 2)
    mode, weights = rows[0], [1 / views] * views
    for _ in range(defense.rounds):
        near = [math.exp(-apart(row, mode) / (2 * width)) for row, width in zip(rows, widths, strict=True)]
        for _ in range(defense.rounds):
            agreed = [sum(affinity[p][q] * weights[q] for q in range(views)) for p in range(views)]
            rising = [math.exp((near[p] + defense.agreement * agreed[p]) / defense.spread) for p in range(views)]
            weights = [value / sum(rising) for value in rising]
        for _ in range(defense.rounds):
            pull = [weights[p] * math.exp(-apart(rows[p], mode) / (2 * widths[p])) for p in range(views)]
            mode = [sum(pull[p] * rows[p][axis] for p in range(views)) / sum(pull) for axis in range(len(mode))]
            length = math.sqrt(sum(value**2 for value in mode))
            mode = [value / length for value in mode]
    return torch.tensor(mode)


def answer_by_hand(defense, classifier, image, draw=0):
    views = torch.cat(Views(count=defense.count, area=defense.area, seed=defense.seed).seen(image[None], draw))
    features, texts = classifier.clip.encode_images(views), classifier.text_features
    probabilities = classifier(views).softmax(1)
    mode = mode_by_hand(defense, features, (probabilities @ probabilities.T).tolist())
    return classifier.clip.logit_scale * mode @ texts.T


@pytest.mark.parametrize(
    "defense",
    [MTA(count=14), MTA(count=10, area=(0.3, 1), seed=2, rounds=2, agreement=1, spread=0.5, nearest=0.6),
     MTA(count=6, agreement=0, nearest=0)],
)  # fmt: skip
def test_answers_are_those_of_loops(classifier, images, defense):
    expected = torch.stack([answer_by_hand(defense, classifier, image, draw=5) for image in images])
    found = defense(classifier).at(5)(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - classifier(images)).abs().max() > 0.1


def test_defaults_are_those_of_the_paper(classifier, images):
    assert (MTA().count, MTA().agreement, MTA().spread) == (64, 4, 0.2)
    expected = answer_by_hand(MTA(), classifier, images[0])
    torch.testing.assert_close(MTA()(classifier)(images[:1])[0], expected, rtol=1e-3, atol=1e-3)


def test_without_rounds_it_is_plain_clip(classifier, images):
    torch.testing.assert_close(MTA(count=5, rounds=0)(classifier)(images), classifier(images))


def test_the_mode_goes_to_views_that_agree():
    """On a circle: nine views within 0.2 of one place agree, three others pull the mean, the image lies between."""
    angles = torch.cat([torch.tensor([0.35]), torch.linspace(-0.2, 0.2, 9), torch.tensor([1.4, 1.5, 1.6])]).double()
    features = torch.stack([angles.cos(), angles.sin()], 1)[None]
    answers = torch.tensor([[0.5, 0.5]] + 9 * [[1, 0]] + 3 * [[0, 1]], dtype=torch.float64)

    def found(**settings):
        mode = MTA(count=13, **settings).mode(features, (answers @ answers.T)[None])[0]
        return torch.atan2(mode[1], mode[0])

    assert torch.atan2(*features[0].mean(0).flip(0)) > 0.3
    assert found() < 0.2
    assert found(agreement=0) > 0.3  # a narrow kernel of its own holds the image where it is
    assert abs(found(nearest=1)) < 0.1  # a wide one finds the middle


def test_views_that_agree_with_others_weigh_more():
    near, affinity = torch.zeros(1, 4), torch.eye(4)[None].clone()
    affinity[0, :2, :2] = 1
    weights = MTA(count=4).weighed(near, affinity, torch.full((1, 4), 0.25))[0]
    torch.testing.assert_close(weights[0] / weights[2], torch.tensor(4 * 0.25 / 0.2).exp())
    assert weights[0] == weights[1]
    even = MTA(count=4, agreement=0).weighed(near, affinity, torch.full((1, 4), 0.25))
    torch.testing.assert_close(even, torch.full((1, 4), 0.25))


def test_answers_do_not_depend_on_the_batch_nor_on_the_order(classifier, images):
    defended = MTA(count=12)(classifier)
    whole, order = defended(images), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(torch.cat([defended(one) for one in images.split(1)]), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(defended(images[order]), whole[order], rtol=1e-4, atol=1e-4)
    assert (defended.at(1)(images) - whole).abs().max() > 1e-2


def test_classes_may_come_in_any_order(clip, classifier, images):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    other = ZeroShotClassifier(clip, [classifier.prompts[place] for place in order.tolist()])
    found, expected = MTA(count=12)(other)(images), MTA(count=12)(classifier)(images)[:, order]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_exact():
    """Against differences of values, through widths, weights and mode."""
    features = random_units(2, 6, 5).requires_grad_()
    affinity = (random_units(2, 6, 4, seed=3) ** 2).requires_grad_()
    defense = MTA(count=6, rounds=3)
    assert torch.autograd.gradcheck(
        lambda rows, p: defense.mode(F.normalize(rows, dim=2), p @ p.mT), (features, affinity)
    )


def test_gradients_reach_the_pixels(classifier, images):
    pixels = images.clone().requires_grad_()
    logits = MTA(count=8)(classifier).for_attack()(pixels)
    gradient = torch.autograd.grad(logits[1].max(), pixels)[0].flatten(1).norm(dim=1)
    assert gradient.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_even_image_has_an_answer_and_a_slope(classifier, value):
    """All its views are alike, and their distances are zero."""
    pixels = torch.full((1, 3, 32, 32), value, requires_grad=True)
    logits = MTA(count=6)(classifier)(pixels)
    torch.testing.assert_close(logits, classifier(pixels), rtol=1e-3, atol=1e-3)
    assert torch.autograd.grad(logits.sum(), pixels)[0].isfinite().all()


def test_attackers_are_told_the_views(classifier, images):
    defense = MTA(count=5)
    assert list(aims_against(defense(classifier))) == ["plain", "answer", "margin", "views"]
    views = told(defense(classifier), "views", images)
    expected = torch.stack([classifier(view) for view in Views(count=5).seen(images, 0)])
    torch.testing.assert_close(views, expected)


def test_passes_are_those_declared(clip, classifier, images):
    defense, before = MTA(count=5), clip._fingerprint()
    with count_passes() as passes, torch.no_grad():
        defense(classifier)(images)
    assert (passes.forward, passes.backward) == tuple(4 * number for number in defense.passes(10)) == (20, 0)
    assert clip._fingerprint() == before


def test_features_that_are_left_are_the_mode(classifier, images):
    """Before the axes of feature space, views agree by their features alone."""
    found = features_of(MTA(count=8, agreement=0)(classifier))(images)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    for row, image in enumerate(images):
        features = classifier.clip.encode_images(torch.cat(Views(count=8).seen(image[None], 0)))
        mode = mode_by_hand(MTA(count=8, agreement=0), features, torch.zeros(8, 8).tolist())
        torch.testing.assert_close(found[row], mode, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 1),
        ("agreement", -1),
        ("spread", 0),
        ("nearest", 1.5),
        ("rounds", -1),
        ("rounds", 1.5),
        ("area", (-1, 1)),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        MTA(**{field: value})


def test_bytes_are_refused(classifier, images):
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        MTA(count=3)(classifier)(images * 255)


def test_identities_tell_settings_apart():
    found = [MTA(), MTA(nearest=0.5), MTA(rounds=3), MTA(area=[0.5, 1]), MTA(seed=1)]
    assert len({str(identity(one)) for one in found}) == len(found)
    assert repr(MTA(area=[0.5, 1])) == "MTA(area=(0.5, 1))"
