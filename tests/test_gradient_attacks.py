"""Losses, targets, averages over draws, nested budgets, replaced gradients, and the short representation."""

from dataclasses import FrozenInstanceError, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from robustclip.attacks import FGSM, PGD, FeaturePGD, UniformNoise
from robustclip.attacks.adaptive import bpda, replace_backward
from robustclip.attacks.losses import LOSSES, runner_up
from robustclip.component import component

SIDE = 4


def linear(classes: int = 5, seed: int = 0) -> nn.Sequential:
    """A random linear classifier of tiny images, with mid-gray on every boundary."""
    layer = nn.Linear(3 * SIDE * SIDE, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)))
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    return nn.Sequential(nn.Flatten(), layer).eval()


def some(n: int = 40, seed: int = 0) -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def predicted(classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier(images).argmax(1)


# --- losses -----------------------------------------------------------------------------------------------------------


def by_hand(name: str, row: list[float], label: int, target: int | None) -> float:
    """The losses from their definitions, one row at a time."""
    other = [value for place, value in enumerate(row) if place != label]
    gap = (max(other) if target is None else row[target]) - row[label]
    if name == "margin":
        return gap
    if name == "ce":
        weights = torch.tensor(row, dtype=torch.float64).softmax(0)
        return -weights[label].log().item() if target is None else weights[target].log().item()
    ranked = sorted(row, reverse=True)
    if len(row) < 3:
        return gap
    third = ranked[2] if target is None or len(row) == 3 else (ranked[2] + ranked[3]) / 2
    return gap / max(ranked[0] - third, 1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("towards", [False, True])
def test_losses_are_their_definitions(name, classes, towards):
    logits = 5 * torch.randn(30, classes, generator=torch.Generator().manual_seed(classes))
    labels = torch.arange(30) % classes
    targets = (labels + 1) % classes if towards else None
    found = LOSSES[name](logits, labels, targets)
    expected = [
        by_hand(name, row, label, None if targets is None else targets[place].item())
        for place, (row, label) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True))
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["margin", "dlr"])
def test_positive_means_fooled(name):
    logits = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(100) % 6
    assert torch.equal(LOSSES[name](logits, labels, None) > 0, logits.argmax(1) != labels)


@given(scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_the_ratio_ignores_scale_and_shift(scale, shift):
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels, ratio = torch.arange(20) % 5, LOSSES["dlr"]
    assert torch.allclose(ratio(scale * logits + shift, labels, None), ratio(logits, labels, None), atol=1e-8)


def test_a_confident_model_keeps_its_cross_entropy_gradient():
    """At a margin of 30 the float32 softmax is exactly one-hot; the attack's loss still has a slope."""
    logits = torch.tensor([[30.0, 0.0, -5.0]], requires_grad=True)
    (exact,) = torch.autograd.grad(LOSSES["ce"](logits, torch.tensor([0]), None).sum(), logits)
    (rounded,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0])), logits)
    assert rounded[0, 0] == 0
    assert exact[0, 0] == pytest.approx(-(torch.tensor(-30.0).exp().item()), rel=1e-2)


def test_runner_up_ranks_the_other_classes():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 1.0, 5.0]])
    labels = torch.tensor([0, 3])
    ranks = [runner_up(logits, labels, rank).tolist() for rank in range(3)]
    assert ranks == [[2, 1], [1, 2], [3, 0]]


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_target_class_is_reached_and_true_members_are_left_alone(loss):
    classifier, images = linear(), some()
    labels = predicted(classifier, images)
    adversarial = PGD(eps=0.3, steps=20, loss=loss, target_class=2)(classifier, images, labels)
    assert torch.equal(adversarial[labels == 2], images[labels == 2])
    reached = predicted(classifier, adversarial)[labels != 2] == 2
    assert reached.float().mean() > 0.9
    untargeted = PGD(eps=0.3, steps=20, loss=loss)(classifier, images, labels)
    assert (predicted(classifier, untargeted)[labels != 2] == 2).float().mean() < 0.6


def test_a_wrong_image_is_still_pushed_to_the_target():
    """Misclassified is not enough when one class is wanted."""
    classifier, images = linear(), some()
    guess = predicted(classifier, images)
    labels = torch.where(guess == 0, torch.ones_like(guess), torch.zeros_like(guess))  # wrong for every image
    adversarial = PGD(eps=0.3, steps=20, target_class=4)(classifier, images, labels)
    assert (predicted(classifier, adversarial) == 4).float().mean() > 0.9
    assert torch.equal(PGD(eps=0.3, steps=20)(classifier, images, labels), images)


def test_all_targets_find_the_nearest_boundary():
    """On a linear model, a run towards each class breaks exactly what can be broken."""
    classifier, images = linear(8), some(300)
    labels = predicted(classifier, images)
    weight, eps = classifier[1].weight.detach(), 0.02
    logits = classifier(images).detach()
    reach = eps * (weight[labels][:, None] - weight[None]).abs().sum(2)
    margin = logits.gather(1, labels[:, None]) - logits
    can_fall = ((margin < reach) & (F.one_hot(labels, 8) == 0)).any(1)
    attack = PGD(eps=eps, steps=10, loss="margin", targets=7, start="image")
    fell = predicted(classifier, attack(classifier, images, labels)) != labels
    assert torch.equal(fell, can_fall)
    assert 20 < can_fall.sum() < 280


def test_more_targets_than_classes_are_all_classes():
    classifier, images = linear(3), some(10)
    labels = predicted(classifier, images)
    few, many = (PGD(eps=0.05, steps=3, targets=k)(classifier, images, labels) for k in (2, 50))
    assert torch.equal(few, many)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"targets": -1}, "targets=-1"),
        ({"targets": 2, "target_class": 1}, "give one of the two"),
        ({"target_class": -2}, "target_class=-2"),
        ({"draws": 0}, "draws=0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"eps": 1.5}, "eps=1.5"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"step_size": -1}, "step_size=-1"),
        ({"restarts": 0}, "restarts=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_invalid_settings_name_the_value(settings, message):
    with pytest.raises(ValueError, match=message):
        PGD(**({"eps": 0.1} | settings))


def test_a_target_class_beyond_the_head():
    with pytest.raises(ValueError, match="target_class=7 is out of range; there are 5 classes"):
        PGD(eps=0.1, target_class=7)(linear(), some(2), torch.zeros(2, dtype=torch.long))


# --- random classifiers -----------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Adds large noise to the input, other noise at every pass, from a generator of its own."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.inner, self.size, self.generator = linear(), size, torch.Generator().manual_seed(0)
        self.passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.inner(images + self.size * torch.randn(images.shape, generator=self.generator))


def test_draws_are_passes_and_make_the_attack_stronger():
    labels = predicted(linear(), images := some(100))

    def survivors(draws: int) -> tuple[float, int]:
        noisy = Noisy(0.25)
        adversarial = PGD(eps=0.04, steps=5, draws=draws)(noisy, images, labels)
        passes = noisy.passes
        votes = sum(predicted(noisy, adversarial) == labels for _ in range(40))
        return (votes / 40).mean().item(), passes

    (one, _), (many, passes) = survivors(1), survivors(16)
    assert passes % 16 == 0
    assert many < one - 0.05, "one lucky draw is not a broken image"


# --- nested budgets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", [PGD(eps=0, steps=3), FGSM(eps=0), UniformNoise(eps=0)], ids=repr)
def test_a_sweep_is_nested(attack):
    """What falls at a budget falls at all larger ones, within its own ball; the smallest is a plain call."""
    classifier, images = linear(), some(100)
    labels = predicted(classifier, images)
    budgets = [0.04, 0.005, 0.02, 0.01]
    found = attack.sweep(classifier, images, labels, budgets)
    assert list(found) == sorted(budgets)
    standing = torch.ones(100, dtype=torch.bool)
    for eps, adversarial in found.items():
        assert (adversarial - images).abs().max() <= eps + 1e-6
        now = predicted(classifier, adversarial) == labels
        assert not (now & ~standing).any()
        standing = now
    alone = type(attack)(**{**vars(attack), "eps": 0.005})(classifier, images, labels)
    assert torch.equal(found[0.005], alone)


def test_a_sweep_works_less_than_separate_calls():
    sizes = []
    classifier = linear()
    labels = predicted(classifier, images := some(100))
    budgets = [0.005, 0.02, 0.08, 0.3]

    def counted(points):
        sizes.append(len(points))
        return classifier(points)

    PGD(eps=0, steps=5).sweep(counted, images, labels, budgets)
    together = sum(sizes)
    sizes.clear()
    for eps in budgets:
        PGD(eps=eps, steps=5)(counted, images, labels)
    assert together < 0.8 * sum(sizes)


# --- features ---------------------------------------------------------------------------------------------------------


def test_the_feature_attack_looks_at_no_label():
    classifier, images = linear(), some(30)
    attack = FeaturePGD(eps=0.05, steps=10)
    right, wrong = (
        attack(classifier, images, labels) for labels in (predicted(classifier, images), torch.zeros(30).long())
    )
    assert torch.equal(right, wrong)


def test_the_feature_attack_turns_features_further_than_noise():
    classifier, images = linear(), some(30)
    labels = predicted(classifier, images)

    def cosine(points):
        return F.cosine_similarity(classifier(points), classifier(images)).mean().item()

    turned, noise = (a(classifier, images, labels) for a in (FeaturePGD(eps=0.05, steps=10), UniformNoise(eps=0.05)))
    assert cosine(turned) < cosine(noise) - 0.1


def test_the_feature_attack_needs_a_random_start():
    with pytest.raises(ValueError, match="no slope at the image itself"):
        FeaturePGD(eps=0.1, start="image")


# --- replaced gradients -----------------------------------------------------------------------------------------------


def test_the_value_is_the_transform_and_the_slope_the_surrogate():
    images = some(3).requires_grad_()
    for surrogate, slope in ((None, 1.0), (lambda x: 3 * x, 3.0)):
        result = replace_backward(torch.round, surrogate)(images)
        assert torch.equal(result.detach(), images.detach().round())
        (gradient,) = torch.autograd.grad(result.sum(), images)
        assert torch.allclose(gradient, torch.full_like(images, slope))


def test_bpda_breaks_what_rounding_hides():
    """Rounded inputs have no gradient: PGD finds nothing. The attacker who knows replaces the backward pass."""
    classifier, images = linear(), some(60)

    def rounded(points):
        return (points * 32).round() / 32

    labels = predicted(defended := lambda points: classifier(rounded(points)), images)
    attack = PGD(eps=0.06, steps=10)
    unaware = predicted(defended, attack(defended, images, labels)) == labels
    aware = predicted(defended, attack(bpda(classifier, rounded), images, labels)) == labels
    assert unaware.float().mean() > 0.8
    assert aware.float().mean() < 0.2


# --- representation ---------------------------------------------------------------------------------------------------


@component
class Sample:
    """A component with every kind of field."""

    eps: float
    steps: int = 20
    names: tuple[str, ...] = ("a", "b")
    hidden: int = field(default=0, repr=False)
    table: dict = field(default_factory=dict, hash=False)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Sample(eps=0.1), "Sample(eps=0.1)"),
        (Sample(eps=0, steps=20, names=("b",)), "Sample(eps=0, names=('b',))"),
        (Sample(eps=0.5, hidden=3, table={"k": 1}), "Sample(eps=0.5, table={'k': 1})"),
        (Sample(eps=1, steps=True), "Sample(eps=1, steps=True)"),
        (PGD(eps=0.1, norm="l2", loss="dlr"), "PGD(eps=0.1, norm='l2', loss='dlr')"),
    ],
)
def test_representations_are_short_and_paste_back(made, text):
    assert repr(made) == text
    assert repr(eval(text)) == text
    with pytest.raises(FrozenInstanceError):
        made.eps = 2
