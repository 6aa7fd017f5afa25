"""Attacks on images: within the budget, as strong as they should be, and the same for every image in any company."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from robustclip import models
from robustclip.attacks import APGD, FGSM, PGD, AutoAttack, FeaturePGD, FromTorchattacks, Square, UniformNoise, square
from robustclip.attacks.ascent import NORMS
from robustclip.attacks.base import as_attack
from robustclip.component import component
from robustclip.data.roles import role, tinyworld_samples
from robustclip.randomness import own_noise

models._torchvision.prepare()
import torchattacks  # noqa: E402  torchvision has to be prepared first

SIDE = 4
PIXELS = 3 * SIDE * SIDE
ATTACKS = [
    UniformNoise(eps=0.1),
    FGSM(eps=0.1),
    PGD(eps=0.1, steps=3),
    PGD(eps=0.1, steps=3, start="image", step_size=0.04),
    PGD(eps=0.1, steps=2, restarts=3, seed=5),
    PGD(eps=0.7, steps=3, norm="l2"),
    PGD(eps=0.7, steps=2, norm="l2", restarts=2, start="image"),
    PGD(eps=0.1, steps=3, loss="margin"),
    PGD(eps=0.7, steps=3, loss="dlr", norm="l2", draws=2),
    PGD(eps=0.1, steps=2, loss="dlr", targets=2),
    PGD(eps=0.1, steps=3, target_class=1),
    FeaturePGD(eps=0.1, steps=3),
    FeaturePGD(eps=0.7, steps=3, norm="l2"),
    APGD(eps=0.1, steps=5),
    APGD(eps=0.7, steps=5, norm="l2", restarts=2),
    APGD(eps=0.1, steps=3, loss="dlr", targets=9),
    APGD(eps=0.1, steps=3, loss="dlr", target_class=1, draws=2),
    Square(eps=0.1, queries=12),
    Square(eps=0.7, queries=6, norm="l2", restarts=2, seed=3),
    AutoAttack(eps=0.1, steps=3, queries=6),
    AutoAttack(eps=0.7, steps=3, norm="l2", parts=("apgd-ce", "apgd-dlr"), draws=2),
    FromTorchattacks(name="FAB", eps=0.1),
    FromTorchattacks(name="PGDL2", eps=0.7, settings={"steps": 3}, seed=2),
    FromTorchattacks(name="CW", settings={"steps": 5, "c": 10}),
]
table = pytest.mark.parametrize("attack", ATTACKS, ids=repr)


def some(keep: Callable[[Any], Any]) -> pytest.MarkDecorator:
    """The attacks of the table for which a test makes sense."""
    return pytest.mark.parametrize("attack", [attack for attack in ATTACKS if keep(attack)], ids=repr)


def looks_at_labels(attack) -> bool:
    """Whether being misclassified is all it wants: not with one class in mind, nor in a label-free attack."""
    return not isinstance(attack, FeaturePGD) and getattr(attack, "target_class", None) is None


def follows_gradients(attack) -> bool:
    return not isinstance(attack, UniformNoise | Square)


def draws_numbers(attack) -> bool:
    if isinstance(attack, FromTorchattacks):
        return attack.name == "PGDL2"
    return hasattr(attack, "seed") and getattr(attack, "start", "random") != "image"


def returns_its_best(attack) -> bool:
    """FAB and CW look for the nearest image that fools, and return what they were given where they find none."""
    return getattr(attack, "name", "") not in ("FAB", "CW")


def ignores_neighbors(attack) -> bool:
    """torchattacks has one random generator per batch, and its CW stops when the loss of the whole batch rises."""
    return not isinstance(attack, FromTorchattacks) or attack.name == "FAB"


def linear(classes: int = 3, seed: int = 0, scale: float = 1.0) -> nn.Sequential:
    """A random linear classifier of tiny images."""
    layer = nn.Linear(PIXELS, classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * scale)
        layer.bias.copy_(-layer.weight.sum(1) / 2)  # mid-gray lies on every boundary
    return nn.Sequential(nn.Flatten(), layer).eval()


def tiny_images(n: int = 32, seed: int = 0, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def predicted(classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier(images).argmax(1)


def length(delta: torch.Tensor, norm: str) -> torch.Tensor:
    return delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).double().norm(dim=1)


def standing(classifier, attack, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which images are still classified correctly after the attack."""
    return predicted(classifier, attack(classifier, images, labels)) == labels


@pytest.fixture(scope="module")
def embedded():
    """The embedded model on ten classes, and images it gets right."""
    classifier = models.zero_shot(models.load(device="cpu"), role("cifar10"))
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 48)
    images = images.float() / 255
    right = predicted(classifier, images) == labels
    return classifier, images[right][:16], labels[right][:16]


@pytest.fixture(scope="module")
def many(embedded):
    """As `embedded`, with all images, right or wrong."""
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 48)
    return embedded[0], images.float() / 255, labels


# --- the budget -------------------------------------------------------------------------------------------------------


@given(
    eps=st.floats(0, 1),
    steps=st.integers(1, 5),
    norm=st.sampled_from(["linf", "l2"]),
    start=st.sampled_from(["random", "one-sided", "image"]),
    step_size=st.none() | st.floats(0, 3),
    classes=st.sampled_from([2, 3, 7]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_budget_is_kept(eps, steps, norm, start, step_size, classes, seed):
    """To float32 rounding, from images that touch the pixel bounds, for labels right or wrong."""
    classifier, images = linear(classes, seed), tiny_images(16, seed).mul(1.4).sub(0.2).clamp(0, 1)
    labels = torch.arange(16) % classes
    attack = PGD(eps=eps, steps=steps, norm=norm, start=start, step_size=step_size, restarts=2, seed=seed)
    adversarial = attack(classifier, images, labels)
    assert length(adversarial - images, norm).max() <= eps * (1 + 1e-5) + 3e-7
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.isfinite(adversarial).all()


@table
@given(eps=st.floats(0, 1), classes=st.sampled_from([2, 3, 7]), seed=st.integers(0, 1000))
@settings(max_examples=4, deadline=None)
def test_budget_of_every_attack(attack, eps, classes, seed):
    """Also of CW, which has none of its own."""
    classifier, images = linear(classes, seed), tiny_images(8, seed).mul(1.4).sub(0.2).clamp(0, 1)
    adversarial = replace(attack, eps=eps)(classifier, images, torch.arange(8) % classes)
    assert length(adversarial - images, getattr(attack, "norm", "linf")).max() <= eps * (1 + 1e-5) + 3e-7
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    assert torch.isfinite(adversarial).all()


@given(norm=st.sampled_from(["linf", "l2"]), eps=st.floats(1e-3, 2), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_projection_is_the_nearest_point(norm, eps, seed):
    """Inside nothing moves, outside the result lies on the sphere, and no random point of the ball is nearer."""
    strategy, delta = NORMS[norm], tiny_images(8, seed, -1, 1)
    inside = delta * (0.99 * eps / length(delta, norm).view(-1, 1, 1, 1)).float()
    assert torch.allclose(strategy.project(inside, eps), inside, atol=1e-6)
    outside = delta * (3 * eps / length(delta, norm).view(-1, 1, 1, 1)).float()
    near = strategy.project(outside, eps)
    assert torch.allclose(length(near, norm).float(), torch.tensor(float(eps)), rtol=1e-4)
    other = strategy.random(tiny_images(8, seed + 1, -1, 1), eps)
    assert length(other, norm).max() <= eps * 1.0001
    assert ((outside - near).flatten(1).norm(dim=1) <= (outside - other).flatten(1).norm(dim=1) + 1e-5).all()


@table
def test_zero_budget_returns_the_images(attack):
    images = tiny_images()
    for labels in (predicted(linear(), images), torch.zeros(32, dtype=torch.long)):
        assert torch.equal(replace(attack, eps=0)(linear(), images, labels), images)


# --- nothing else changes ---------------------------------------------------------------------------------------------


class Moody(nn.Module):
    """Behaves differently in training mode, and has weights that ask for gradients and weights that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.noise, self.head = nn.BatchNorm2d(3), nn.Dropout(0.5), linear()
        self.norm.bias.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.noise(self.norm(images)))


@table
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(attack, training):
    model = Moody().train(training)
    model.noise.train(not training)
    images, labels = tiny_images().requires_grad_(), torch.arange(32) % 3
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [(module.training, [w.requires_grad for w in module.parameters()]) for module in model.modules()]
    rng, numpy_rng, python_rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    pixels, classes = images.detach().clone(), labels.clone()

    adversarial = attack(model, images, labels)

    assert not adversarial.requires_grad
    assert torch.equal(images, pixels)
    assert torch.equal(labels, classes)
    assert images.requires_grad
    assert images.grad is None
    assert all(weight.grad is None for weight in model.parameters())
    assert [(m.training, [w.requires_grad for w in m.parameters()]) for m in model.modules()] == wanted
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert (np.random.get_state()[1] == numpy_rng).all()  # noqa: NPY002
    assert random.getstate() == python_rng


def test_the_model_is_restored_after_an_error():
    model = Moody().train()

    def out_of_luck(images):
        assert not any(module.training for module in model.modules())
        assert not any(weight.requires_grad for weight in model.parameters())
        raise RuntimeError("out of luck")

    model.forward = out_of_luck
    with pytest.raises(RuntimeError, match="out of luck"):
        FGSM(eps=0.1)(model, tiny_images(), torch.arange(32) % 3)
    assert all(module.training for module in model.modules())
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["norm.bias"]


@table
def test_gradients_are_found_under_no_grad(attack):
    classifier, images = linear(), tiny_images()
    labels = predicted(classifier, images)
    with torch.no_grad():
        inside = attack(classifier, images, labels)
    assert torch.equal(inside, attack(classifier, images, labels))


@table
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_stays(attack, dtype):
    classifier, images = linear().to(dtype), tiny_images().to(dtype)
    adversarial = attack(classifier, images, predicted(classifier, images))
    assert adversarial.dtype == dtype
    assert adversarial.shape == images.shape


@table
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_any_integer_labels_do(attack, dtype):
    classifier, images = linear(), tiny_images()
    labels = predicted(classifier, images)
    assert torch.equal(attack(classifier, images, labels.to(dtype)), attack(classifier, images, labels))


@table
def test_plain_functions_are_classifiers(attack):
    classifier, images = linear(), tiny_images()
    labels = predicted(classifier, images)
    assert torch.equal(attack(lambda x: classifier(x), images, labels), attack(classifier, images, labels))


@some(looks_at_labels)
def test_misclassified_images_come_back(attack):
    classifier, images = linear(), tiny_images()
    right = predicted(classifier, images)
    labels = torch.where(torch.arange(32) % 2 == 0, right, (right + 1) % 3)
    adversarial = attack(classifier, images, labels)
    assert torch.equal(adversarial[1::2], images[1::2])
    if returns_its_best(attack):
        assert not (adversarial[::2] == images[::2]).flatten(1).all(1).any()
    assert torch.equal(attack(classifier, images, (right + 1) % 3), images)


@table
@pytest.mark.parametrize("classes", [2, 3])
def test_small_heads_and_odd_batches(attack, classes):
    classifier, images = linear(classes), tiny_images(5)
    labels = predicted(classifier, images)
    assert attack(classifier, images[:0], labels[:0]).shape == (0, 3, SIDE, SIDE)
    one, whole = attack(classifier, images[:1], labels[:1]), attack(classifier, images, labels)
    if ignores_neighbors(attack):
        assert torch.allclose(one, whole[:1], atol=1e-6)
    assert one.shape == (1, 3, SIDE, SIDE)


@some(lambda attack: looks_at_labels(attack) and getattr(attack, "name", "") != "CW")
def test_a_batch_that_breaks_at_once(attack):
    """With a huge budget every image falls, most in the first step. (CW has none to give.)"""
    classifier, images = linear(3), tiny_images(9, low=0.45, high=0.55)
    labels = predicted(classifier, images)
    strong = replace(attack, eps=1.0 if getattr(attack, "norm", "linf") == "linf" else 5.0)
    fell = ~standing(classifier, strong, images, labels)
    assert fell.all() or (isinstance(attack, UniformNoise) and fell.any())


# --- strength ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_closed_form_on_a_linear_model(norm, steps):
    """Two classes, far from the pixel bounds: x + eps sign(w) for l_inf, x + eps w / |w| for l_2."""
    classifier, eps = linear(2, seed=3, scale=0.1), 0.05
    direction = classifier[1].weight[1] - classifier[1].weight[0]
    classifier[1].bias.data[0] += 2  # nothing breaks, so the strongest image is returned
    images, labels = tiny_images(8, low=0.3, high=0.7), torch.zeros(8, dtype=torch.long)
    best = direction.sign() if norm == "linf" else direction / direction.norm()
    expected = images + eps * best.detach().view(3, SIDE, SIDE)
    attack = PGD(eps=eps, steps=steps, norm=norm, start="image")
    assert torch.allclose(attack(classifier, images, labels), expected, atol=1e-6)
    if norm == "linf":
        assert torch.allclose(FGSM(eps=eps)(classifier, images, labels), expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("classes", "eps"), [(2, 0.01), (2, 0.03), (2, 0.1), (4, 0.01)])
def test_robust_accuracy_of_a_linear_model_is_exact(norm, classes, eps):
    """An image stands iff its margin to every other class exceeds eps times the dual norm of the weight difference."""
    classifier, images = linear(classes, seed=1), tiny_images(200, low=0.35, high=0.65)
    eps = eps if norm == "linf" else eps * PIXELS**0.5
    labels = predicted(classifier, images)
    weight = classifier[1].weight.detach()
    difference = weight[labels][:, None] - weight[None]  # (n, classes, pixels)
    dual = difference.abs().sum(2) if norm == "linf" else difference.norm(dim=2)
    logits = classifier(images).detach()
    margin = logits.gather(1, labels[:, None]) - logits - eps * dual
    truth = (margin + 1e9 * F.one_hot(labels, classes) > 0).all(1)
    found = standing(classifier, PGD(eps=eps, steps=40, norm=norm, restarts=2), images, labels)
    assert (found | ~truth).all(), "an attack cannot break what the mathematics protects"
    slack = 1 if classes == 2 else 20  # with more classes the steepest way leads to one class, not always the nearest
    assert found.sum() <= truth.sum() + slack
    assert (found.sum() < 200) == (truth.sum() < 200)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_budget_is_never_worse(embedded, norm):
    classifier, images, labels = embedded
    unit = 1 / 255 if norm == "linf" else 20 / 255
    rates = [
        standing(classifier, PGD(eps=eps * unit, steps=4, norm=norm), images, labels).float().mean().item()
        for eps in (0.25, 2, 8)
    ]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.5, "a tiny budget breaks few images"
    assert rates[-1] < 0.5, "a large one most of them"


def test_more_steps_are_not_weaker(embedded):
    classifier, images, labels = embedded
    few, many = (standing(classifier, PGD(eps=3 / 255, steps=steps), images, labels) for steps in (1, 8))
    assert many.sum() <= few.sum() + 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_restarts_only_add(norm):
    """What broke with one restart breaks with three: the first run is the same. And one more start does help."""
    classifier, images = bumpy(), tiny_images(200, seed=8)
    labels = predicted(classifier, images)
    eps = 0.05 if norm == "linf" else 0.2
    one, three, nine = (
        standing(classifier, PGD(eps=eps, steps=2, norm=norm, restarts=restarts), images, labels)
        for restarts in (1, 3, 9)
    )
    assert (one | ~three).all()
    assert (three | ~nine).all()
    assert nine.sum() < one.sum()


def bumpy() -> nn.Module:
    """A small random network with a rough surface, on which the start matters."""
    generator = torch.Generator().manual_seed(2)
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(PIXELS, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)
    )
    with torch.no_grad():
        for weight in layers.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / max(weight.shape[-1], 8)) ** 0.5)
        layers[1].bias.sub_(layers[1].weight.sum(1) / 2)
    return layers.eval()


@pytest.mark.parametrize("restarts", [1, 4])
def test_unbroken_images_have_the_highest_loss_seen(restarts):
    """Of all points the attack looked at, the best is returned, not the last."""
    classifier, images = bumpy(), tiny_images(100, seed=9)
    attack = PGD(eps=0.02, steps=4, step_size=0.03, restarts=restarts)
    images = images[standing(classifier, attack, images, predicted(classifier, images))]
    labels = predicted(classifier, images)
    assert len(images) > 20

    def losses(points):
        return F.cross_entropy(classifier(points), labels, reduction="none").detach()

    seen = []
    adversarial = attack(lambda x: seen.append(losses(x.detach())) or classifier(x), images, labels)
    path = torch.stack(seen[1:])  # the first call only asks which images are right
    assert len(path) == 5 * restarts
    assert torch.allclose(losses(adversarial), path.amax(0), atol=1e-5)
    assert (path.amax(0) > path[-1] + 1e-4).any(), "sometimes the last point is not the best"


def test_broken_images_are_not_attacked_further():
    """The first image that fools is returned: with a large budget, most move no further than needed."""
    classifier, images = linear(2), tiny_images(64, low=0.4, high=0.6)
    labels = predicted(classifier, images)
    attack = PGD(eps=0.4, steps=40, step_size=0.01, start="image")
    adversarial = attack(classifier, images, labels)
    moved = length(adversarial - images, "linf")
    assert (predicted(classifier, adversarial) != labels).all()
    one_step_less = images + (adversarial - images) * ((moved - 0.0101) / moved).view(-1, 1, 1, 1)
    assert (predicted(classifier, one_step_less) == labels).all()
    assert moved.max() < 0.2


def test_only_standing_images_are_computed():
    """Broken images leave the batch, so the work shrinks from step to step and from restart to restart."""
    sizes = []
    classifier = linear(2)
    images = tiny_images(64, low=0.4, high=0.6)
    labels = predicted(classifier, images)
    PGD(eps=0.05, steps=10, restarts=3)(lambda x: sizes.append(len(x)) or classifier(x), images, labels)
    assert sizes[0] == 64
    assert all(later <= earlier for earlier, later in pairwise(sizes))
    assert 0 < sizes[-1] < 32


def test_noise_is_at_most_as_harmful_as_pgd(embedded):
    classifier, images, labels = embedded
    noise, pgd = (standing(classifier, attack(eps=4 / 255), images, labels).sum() for attack in (UniformNoise, PGD))
    assert pgd < noise


# --- the same for every image in any company --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        UniformNoise(eps=8 / 255),
        PGD(eps=2 / 255, steps=4),
        PGD(eps=0.2, steps=4, norm="l2", restarts=2),
        FeaturePGD(eps=1 / 255, steps=2),
        APGD(eps=2 / 255, steps=4),
        Square(eps=8 / 255, queries=8),
        Square(eps=1.0, queries=8, norm="l2"),
        AutoAttack(eps=5 / 255, steps=2, queries=4, parts=("apgd-dlr", "square")),
    ],
    ids=repr,
)
def test_neighbors_do_not_matter(many, attack):
    """Alone, in other batches, in another order: the same outcome, and the same picture up to rounding."""
    classifier, images, labels = many[0], many[1][:24], many[2][:24]
    whole = attack(classifier, images, labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = attack(classifier, images[order], labels[order])
    ragged = torch.cat([attack(classifier, images[rows], labels[rows]) for rows in torch.arange(24).split([1, 5, 18])])
    broken = predicted(classifier, whole) != labels
    for other in (ragged, torch.empty_like(whole).index_copy_(0, order, shuffled)):
        assert ((predicted(classifier, other) != labels) == broken).float().mean() > 0.95
        assert ((whole - other).abs() < 1e-6).float().mean() > 0.95


def test_random_start_depends_on_the_image_and_the_seed_only():
    images = tiny_images(6)
    noise = own_noise(images, seed=3)
    assert torch.equal(own_noise(images.flip(0), seed=3).flip(0), noise)
    assert torch.equal(own_noise(images[2:3], seed=3), noise[2:3])
    assert not torch.equal(own_noise(images, seed=4), noise)
    assert len({row.numpy().tobytes() for row in noise}) == 6
    many = own_noise(tiny_images(400), seed=0)
    assert -1 <= many.min() < -0.99 < 0.99 < many.max() <= 1
    assert abs(many.mean()) < 0.02
    assert many.std() == pytest.approx(3**-0.5, rel=0.02)


@some(draws_numbers)
def test_seeds(attack):
    classifier, images = linear(), tiny_images()
    labels = predicted(classifier, images)
    first = attack(classifier, images, labels)
    assert torch.equal(attack(classifier, images, labels), first)
    assert not torch.equal(replace(attack, seed=attack.seed + 1)(classifier, images, labels), first)


def test_no_random_start_starts_at_the_image():
    seen = []
    classifier, images = linear(), tiny_images()
    labels = predicted(classifier, images)
    PGD(eps=0.1, steps=1, start="image")(lambda x: seen.append(x.detach()) or classifier(x), images, labels)
    assert torch.equal(seen[1], images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_later_restarts_start_elsewhere(norm):
    seen = []
    classifier, images = linear(), tiny_images(low=0.4, high=0.6)
    classifier[1].bias.data[0] += 50
    attack = PGD(eps=0.1, steps=1, norm=norm, start="image", restarts=3)
    attack(lambda x: seen.append(x.detach()) or classifier(x), images, torch.zeros(32, dtype=torch.long))
    starts = seen[1::2]
    assert len(starts) == 3
    assert all((length(start - images, norm) > 1e-3).all() for start in starts[1:])
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize(("steps", "step_size"), [(1, 0.1), (2, 0.1), (5, 0.05), (10, 0.025)])
def test_default_step_size(steps, step_size):
    """2.5 eps / steps, and never longer than eps."""
    classifier, images = bumpy(), tiny_images(seed=4)
    labels = predicted(classifier, images)
    default = PGD(eps=0.1, steps=steps)
    assert torch.equal(
        default(classifier, images, labels), replace(default, step_size=step_size)(classifier, images, labels)
    )


# --- parity -----------------------------------------------------------------------------------------------------------


class Exact(nn.Module):
    """Logits in double precision, so that losses are rounded as ours are: in single precision a gradient may vanish."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, images):
        return self.classifier(images).double()


def test_one_step_equals_torchattacks(embedded):
    classifier, images, labels = embedded
    theirs = torchattacks.PGD(Exact(classifier), eps=4 / 255, alpha=4 / 255, steps=1, random_start=False)(
        images, labels
    )
    ours = PGD(eps=4 / 255, steps=1, step_size=4 / 255, start="image")(classifier, images, labels)
    assert torch.equal(ours, theirs)
    assert torch.equal(FGSM(eps=4 / 255)(classifier, images, labels), theirs)


@pytest.mark.parametrize(("eps", "steps"), [(1 / 255, 5), (3 / 255, 5)])
def test_as_strong_as_torchattacks(embedded, eps, steps):
    """Same steps: ours keeps the best image, theirs the last; one image of 16 may differ by rounding."""
    classifier, images, labels = embedded
    alpha = 2.5 * eps / steps
    theirs = torchattacks.PGD(classifier, eps=eps, alpha=alpha, steps=steps, random_start=False)(images, labels)
    ours = PGD(eps=eps, steps=steps, step_size=alpha, start="image")
    assert standing(classifier, ours, images, labels).sum() <= (predicted(classifier, theirs) == labels).sum() + 1
    assert torch.equal(
        standing(classifier, ours, images, labels), standing(classifier, replace(ours, step_size=None), images, labels)
    )


@pytest.mark.parametrize("steps", [1, 5])
def test_l2_agrees_with_torchattacks_on_a_linear_model(steps):
    classifier, images = linear(3), tiny_images(16, low=0.3, high=0.7)
    classifier[1].bias.data[0] += 50
    labels = predicted(classifier, images)
    theirs = torchattacks.PGDL2(classifier, eps=0.3, alpha=0.1, steps=steps, random_start=False)(images, labels)
    ours = PGD(eps=0.3, steps=steps, step_size=0.1, norm="l2", start="image")(classifier, images, labels)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("eps", "alpha"), [(4 / 255, 4 / 255), (2 / 255, 0.5 / 255)])
def test_the_last_point_without_a_stop_is_torchattacks_pgd(embedded, eps, alpha):
    """Bit for bit, for images right and wrong."""
    classifier, images, labels = embedded
    labels = labels.where(torch.arange(len(labels)) % 4 > 0, (labels + 1) % 10)
    theirs = torchattacks.PGD(Exact(classifier), eps=eps, alpha=alpha, steps=4, random_start=False)(images, labels)
    last = PGD(eps=eps, steps=4, step_size=alpha, start="image", keep="last", stop=False)
    assert torch.equal(last(classifier, images, labels), theirs)


def plain_pgd(classifier, images, labels, eps, steps, step_size, start):
    """As MMCoA's code tests: steps of the gradient's sign, the last point counts."""
    points = (images + start).clamp(0, 1)
    for _ in range(steps):
        points.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(classifier(points), labels, reduction="sum"), points)
        points = (images + (points.detach() + step_size * slope.sign() - images).clamp(-eps, eps)).clamp(0, 1)
    return points


def test_the_last_iterate_of_mmcoa():
    classifier, images = bumpy(), tiny_images(60)
    labels = torch.arange(60) % 5
    ours = PGD(eps=0.02, steps=7, step_size=0.02, keep="last", stop=False, seed=3)(classifier, images, labels)
    expected = plain_pgd(classifier, images, labels, 0.02, 7, 0.02, 0.02 * own_noise(images, 3))
    assert torch.equal(ours, expected)
    kept = PGD(eps=0.02, steps=7, step_size=0.02, seed=3)(classifier, images, labels)
    assert not torch.equal(ours, kept)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_momentum_is_that_of_fare(norm):
    """Its inner loop by hand: v = g / |g|, velocity = (m velocity + v) / |.|, one step, projections."""
    classifier, images, eps, size = bumpy(), tiny_images(20), 0.1, 0.03
    labels = torch.arange(20) % 5
    change, velocity, unit = torch.zeros_like(images), torch.zeros_like(images), NORMS[norm]
    for _ in range(6):
        change.requires_grad_()
        loss = F.cross_entropy(classifier(images + change), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, change)
        velocity = unit.ascend(0.9 * velocity + unit.ascend(slope))
        change = unit.project(change.detach() + size * velocity, eps)
        change = (images + change).clamp(0, 1) - images
    attack = PGD(eps=eps, steps=6, step_size=size, momentum=0.9, norm=norm, start="image", keep="last", stop=False)
    found = attack(classifier, images, labels)
    assert torch.allclose(found, images + change, atol=1e-5)
    plain = replace(attack, momentum=0.0)(classifier, images, labels)
    assert torch.allclose(found, plain, atol=1e-3) == (norm == "linf"), "the sign of 0.9 v + sign(g) is that of g"


# --- what others give us ----------------------------------------------------------------------------------------------


def layouts(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same pixels in other orders of memory."""
    return {
        "channels last": images.to(memory_format=torch.channels_last),
        "transposed": images.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": images.repeat_interleave(2, 0)[::2],
        "expanded": images[:1].expand(len(images), -1, -1, -1),
    }


@table
@pytest.mark.parametrize("layout", layouts(tiny_images(2)))
def test_layouts_of_memory_do_not_matter(attack, layout):
    """Also for a model that turns pixels around itself."""
    classifier, images = linear(), tiny_images(6)

    def turning(points: torch.Tensor) -> torch.Tensor:
        return classifier(points.to(memory_format=torch.channels_last).contiguous())

    given = layouts(images)[layout]
    labels = predicted(classifier, given)
    expected = attack(classifier, given.clone(memory_format=torch.contiguous_format), labels)
    assert torch.equal(attack(turning, given, labels), expected)


@table
def test_inference_mode_is_left_while_attacking(attack):
    classifier = linear()
    labels = predicted(classifier, tiny_images())
    with torch.inference_mode():
        images, own = tiny_images(), labels.clone()
        inside = attack(classifier, images, own)
    assert torch.equal(inside, attack(classifier, tiny_images(), labels))


@table
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pixels_too_coarse_for_a_budget(attack, dtype):
    with pytest.raises(ValueError, match="too coarse for a budget"):
        attack(linear(), tiny_images(4).to(dtype), torch.zeros(4, dtype=torch.long))


@table
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: (logits, logits), r"must return logits of shape \(4, classes\), got a tuple"),
        (lambda logits: logits[:, 0], r"got shape \(4,\)"),
        (lambda logits: logits[None], r"got shape \(1, 4, 3\)"),
        (lambda logits: logits[:2], r"got shape \(2, 3\)"),
        (lambda logits: logits * torch.nan, "gives NaN logits"),
    ],
)
def test_what_is_no_table_of_logits(attack, spoil, message):
    classifier = linear()
    with pytest.raises(ValueError, match=message):
        attack(lambda images: spoil(classifier(images)), tiny_images(4), torch.zeros(4, dtype=torch.long))


@table
def test_passes_are_at_most_what_is_said(attack, monkeypatch):
    """Nothing breaks: every image takes the whole way."""
    classifier, images, counts = linear(5), tiny_images(6), [0, 0]
    monkeypatch.setattr(square, "TOGETHER", 1)
    classifier[1].bias.data[0] += 1e3

    def counted(points: torch.Tensor) -> torch.Tensor:
        counts[0] += len(points)
        if points.requires_grad and torch.is_grad_enabled():
            points = points.view_as(points)
            points.register_hook(lambda slope: counts.__setitem__(1, counts[1] + len(slope)))
        return classifier(points)

    attack(counted, images, torch.zeros(6, dtype=torch.long))
    forward, backward = attack.passes(5)
    assert counts[0] <= 6 * forward
    assert counts[1] <= 6 * backward
    if isinstance(attack, PGD | APGD | FGSM | FeaturePGD | UniformNoise):
        assert counts == [6 * forward, 6 * backward]


@component
class Own:
    """A user's attack, and ways in which one goes wrong."""

    eps: float = 0.1
    fault: str = ""

    def __call__(self, classifier, images, labels):
        faults = {
            "": lambda found: found,
            "far": lambda found: (found + 0.2).clamp(0, 1),
            "small": lambda found: found[..., :2],
            "few": lambda found: found[:-1],
            "nan": lambda found: found * torch.nan,
            "bright": lambda found: found + 1,
            "numpy": lambda found: found.numpy(),
        }
        return faults[self.fault]((images + self.eps).clamp(0, 1))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("far", r"they leave the budget eps=0\.1 by 0\.2"),
        ("small", r"their shape is \(4, 3, 4, 2\) instead of"),
        ("few", r"their shape is \(3, 3, 4, 4\) instead of"),
        ("nan", "NaN or infinity"),
        ("bright", r"must lie in \[0, 1\]"),
        ("numpy", "must be a torch.Tensor"),
    ],
)
def test_what_own_attacks_return_is_checked(fault, message):
    images, labels = tiny_images(4, high=0.6), torch.zeros(4, dtype=torch.long)
    fine, broken = as_attack(Own()), as_attack(Own(fault=fault))
    assert torch.equal(fine(linear(), images, labels), (images + 0.1).clamp(0, 1))
    assert fine.eps == 0.1
    with pytest.raises(ValueError, match=f"Own.*cannot be scored: .*{message}"):
        broken(linear(), images, labels)


def test_own_attacks_tell_their_settings():
    assert as_attack(PGD(eps=0.1)) == PGD(eps=0.1)
    assert repr(as_attack(Own(eps=0.2))) == "OwnAttack(attack=Own(eps=0.2))"
    for nothing in (lambda classifier, images, labels: images, object(), 3):
        with pytest.raises(ValueError, match="no attack whose repr tells its settings"):
            as_attack(nothing)


def test_attacks_that_would_do_nothing():
    with pytest.raises(ValueError, match=r"steps=-1 .* at least 1"):
        FromTorchattacks(name="FAB", eps=0.1, settings={"steps": -1})


# --- settings and bad input -------------------------------------------------------------------------------------------


@table
def test_repr_pastes_back(attack):
    assert eval(repr(attack)) == attack
    assert hash(eval(repr(attack))) == hash(attack)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(eps=-0.1), r"eps=-0\.1 is not allowed; it must be a finite number between 0 and 1"),
        (lambda: PGD(eps=8), "eps=8 is not allowed; it must be a finite number between 0 and 1"),
        (lambda: FGSM(eps=1.5), r"eps=1\.5 .* between 0 and 1"),
        (lambda: UniformNoise(eps=float("nan")), "eps=nan .* between 0 and 1"),
        (lambda: UniformNoise(eps="8/255"), "eps='8/255' .* between 0 and 1"),
        (lambda: UniformNoise(eps=0.1, seed=-1), "seed=-1 .* between 0 and 2"),
        (lambda: PGD(eps=float("inf"), norm="l2"), "eps=inf .* at least 0"),
        (lambda: PGD(eps=0.1, norm="l1"), "unknown norm 'l1'; choose one of: linf, l2"),
        (lambda: PGD(eps=0.1, steps=0), "steps=0 .* at least 1"),
        (lambda: PGD(eps=0.1, steps=2.5), r"steps=2\.5 .* whole number"),
        (lambda: PGD(eps=0.1, restarts=0), "restarts=0 .* at least 1"),
        (lambda: PGD(eps=0.1, restarts=True), "restarts=True .* at least 1"),
        (lambda: PGD(eps=0.1, seed=2**40), "seed=1099511627776 .* between 0 and 2"),
        (lambda: PGD(eps=0.1, step_size=-1), "step_size=-1 .* at least 0"),
    ],
)
def test_invalid_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_have_names():
    with pytest.raises(TypeError):
        PGD(0.1)
    assert PGD(eps=3, norm="l2").eps == 3


@table
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images, labels: (images * 255, labels), "images must lie in \\[0, 1\\], got"),
        (lambda images, labels: (images - 0.5, labels), "normalisation belongs in the model"),
        (lambda images, labels: (images / 0, labels), "NaN or infinity"),
        (lambda images, labels: (images[0], labels), "shape \\(n, 3, height, width\\)"),
        (lambda images, labels: (images, labels + 1), "label 3 is out of range; this classifier has classes 0 to 2"),
        (lambda images, labels: (images, labels - 1), "label -1 is out of range"),
        (lambda images, labels: (images, labels[:-1]), "got 31 labels for 32 images"),
        (lambda images, labels: (images, labels.float()), "labels must be integers"),
    ],
)
def test_bad_input(attack, spoil, message):
    with pytest.raises(ValueError, match=message):
        attack(linear(), *spoil(tiny_images(), torch.arange(32) % 3))


@some(follows_gradients)
def test_missing_gradients_are_an_error(attack):
    """A defense that hides its gradient must not look robust."""
    classifier, images = linear(), tiny_images()
    labels = predicted(classifier, images)
    with pytest.raises(ValueError, match="logits carry no gradient; remove no_grad or detach"):
        attack(torch.no_grad()(classifier.forward), images, labels)


@some(follows_gradients)
def test_gradients_that_are_not_numbers_are_an_error(attack):
    classifier, images = linear(), tiny_images()
    labels = predicted(classifier, images)
    with pytest.raises(ValueError, match="gradient contains NaN; look for square roots"):
        attack(lambda x: classifier(x) + (x.flatten(1)[:, :1] * 0).sqrt(), images, labels)
