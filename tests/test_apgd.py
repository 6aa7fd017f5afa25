"""Auto-PGD: its schedule, its step sizes, the closed-form optimum on linear models, and parity with torchattacks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustclip import _torchvision, models
from robustclip.attacks import APGD, PGD, UniformNoise
from robustclip.attacks.apgd import AutoClimb, checkpoints
from robustclip.attacks.ascent import Climb, Here
from robustclip.data.roles import role, tinyworld_samples

_torchvision.prepare()
import torchattacks  # noqa: E402  torchvision has to be prepared first

SIDE = 4
PIXELS = 3 * SIDE * SIDE


def linear(classes: int = 2, seed: int = 3, scale: float = 1.0) -> nn.Sequential:
    """A random linear classifier of tiny images, with mid-gray on every boundary."""
    layer = nn.Linear(PIXELS, classes)
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(classes, PIXELS, generator=torch.Generator().manual_seed(seed)))
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    return nn.Sequential(nn.Flatten(), layer).eval()


def some(n: int, seed: int = 0, low: float = 0.3, high: float = 0.7) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def predicted(classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier(images).argmax(1)


@pytest.fixture(scope="module")
def embedded():
    """The embedded model on ten classes, and images it gets right."""
    classifier = models.zero_shot(models.load(device="cpu"), role("cifar10"))
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 28)
    images = images.float() / 255
    right = predicted(classifier, images) == labels
    return classifier, images[right][:24], labels[right][:24]


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_checkpoints_are_the_papers():
    """ceil(p_j N) with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(round(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06), 10))
    for steps in (1, 2, 7, 10, 50, 100, 1000):
        marks = checkpoints(steps)
        expected = {-int(-share * steps // 1) for share in shares[1:] if share <= 1}
        assert set(marks) == expected
        assert list(marks.values()) == [b - a for a, b in zip([0, *marks], marks, strict=False)]
    assert checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}


def climbing() -> AutoClimb:
    """A climb of one image of one pixel."""
    return AutoClimb(Climb(torch.zeros(1, 3, 1, 1), 0.1, "linf", 100))


def here(auto: AutoClimb, step: int, loss: float = 0.0) -> Here:
    """The place of step k: the point is filled with k, its gradient with -k."""
    rows, point, losses = torch.tensor([0]), torch.full((1, 3, 1, 1), float(step)), torch.tensor([loss])
    better = auto.climb.record(rows, point, losses, torch.tensor([False]))
    return Here(rows, point, -point, losses, better)


def climb(auto: AutoClimb, losses: list[float], first: int = 0) -> None:
    """Note a path of one image."""
    for step, loss in enumerate(losses):
        auto.note(here(auto, first + step, loss))


@pytest.mark.parametrize(
    ("losses", "halved"),
    [
        ([0, 1, 2, 3, 4], False),  # four rises of four
        ([0, 1, 2, 3, 2], True),  # three of four are not more than 0.75
        ([0, 5, 1, 2, 3], True),
        ([4, 3, 2, 1, 0], True),
    ],
)
def test_step_sizes_are_halved_when_the_climb_stalls(losses, halved):
    auto = climbing()
    climb(auto, losses)
    best = max(range(5), key=losses.__getitem__)
    point, gradient = auto.check(here(auto, 4, -9), 4)
    assert auto.step_size.item() == pytest.approx(0.1 if halved else 0.2)
    assert (point == (best if halved else 4)).all(), "a halved climb goes on from its best point"
    assert (gradient == -(best if halved else 4)).all()


def test_step_sizes_are_halved_when_nothing_improved_with_the_same_step_size():
    """The second condition: rises alone do not count if they stay below the best of the checkpoint before."""
    auto = climbing()
    climb(auto, [0, 1, 2, 3, 9])
    auto.check(here(auto, 4, -9), 4)
    assert auto.step_size.item() == pytest.approx(0.2)
    auto.latest[0] = 0.0
    climb(auto, [1, 2, 3, 4], first=5)
    point, _ = auto.check(here(auto, 8, -9), 4)
    assert auto.step_size.item() == pytest.approx(0.1)
    assert (point == 4).all()
    climb(auto, [5, 6, 7, 8], first=9)  # still below 9, but the step size has just changed
    auto.check(here(auto, 12, -9), 4)
    assert auto.step_size.item() == pytest.approx(0.1)


def test_the_first_steps_by_hand():
    """x_1 = x_0 + 2 eps sign(g), projected; x_2 takes 0.75 of its step and 0.25 of the last change."""
    seen, eps = [], 0.01
    valley = torch.tensor([0.505, 0.495, 0.52]).view(1, 3, 1, 1)  # the loss is highest here, in each color

    def classifier(images):
        seen.append(images.detach().clone())
        rise = -((images - valley) ** 2).sum((1, 2, 3))
        return torch.stack([10 - rise, rise], 1)

    start = torch.full((1, 3, 1, 1), 0.5)
    APGD(eps=eps, steps=3, start="image")(classifier, start, torch.tensor([0]))
    first = start + torch.tensor([eps, -eps, eps]).view(1, 3, 1, 1)
    # at x_1 the first two colors overshot: z goes back by 2 eps, to the other side of the ball
    ahead = start + torch.tensor([-eps, eps, eps]).view(1, 3, 1, 1)
    second = first + 0.75 * (ahead - first) + 0.25 * (first - start)
    second = start + (second - start).clamp(-eps, eps)
    assert torch.equal(seen[1], start)
    assert torch.allclose(seen[2], first, atol=1e-7)
    assert torch.allclose(seen[3], second, atol=1e-7)


def test_a_narrow_summit_is_found_by_halving():
    """Steps of a fixed length jump around it for ever."""
    summit = torch.tensor([0.5031, 0.4963, 0.5007]).view(1, 3, 1, 1)

    def classifier(images):
        rise = -(images - summit).abs().sum((1, 2, 3))
        return torch.stack([torch.full_like(rise, 10), rise], 1)

    image, label = torch.full((1, 3, 1, 1), 0.5), torch.tensor([0])
    auto = (APGD(eps=0.01, steps=100)(classifier, image, label) - summit).abs().max()
    plain = (PGD(eps=0.01, steps=100, step_size=0.02)(classifier, image, label) - summit).abs().max()
    assert auto < 2e-4
    assert plain > 1e-3


# --- linear models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("steps", "start"), [(1, "image"), (5, "image"), (20, "image"), (20, "random")])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_closed_form_on_a_linear_model(norm, steps, start, loss):
    """Two classes, far from the pixel bounds: x + eps sign(w) for l_inf, x + eps w / |w| for l_2."""
    classifier, eps = linear(scale=0.1), 0.05
    direction = classifier[1].weight[1] - classifier[1].weight[0]
    classifier[1].bias.data[0] += 2  # nothing breaks, so the strongest image is returned
    images, labels = some(8), torch.zeros(8, dtype=torch.long)
    best = direction.sign() if norm == "linf" else direction / direction.norm()
    expected = images + eps * best.detach().view(3, SIDE, SIDE)
    attack = APGD(eps=eps, steps=steps, norm=norm, start=start, loss=loss)
    assert torch.allclose(attack(classifier, images, labels), expected, atol=1e-6 if norm == "linf" else 1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_all_targets_robust_accuracy_of_a_linear_model_is_exact(norm):
    """An image falls iff its margin to some class is less than eps times the dual norm of the weight difference."""
    classifier, images = linear(8), some(300)
    eps = 0.01 if norm == "linf" else 0.05
    labels, weight = predicted(classifier, images), classifier[1].weight.detach()
    difference = weight[labels][:, None] - weight[None]
    reach = eps * (difference.abs().sum(2) if norm == "linf" else difference.norm(dim=2))
    logits = classifier(images).detach()
    margin = logits.gather(1, labels[:, None]) - logits
    can_fall = ((margin < reach) & (F.one_hot(labels, 8) == 0)).any(1)
    attack = APGD(eps=eps, steps=10, norm=norm, loss="margin", targets=7, start="image")
    assert torch.equal(predicted(classifier, attack(classifier, images, labels)) != labels, can_fall)
    assert 20 < can_fall.sum() < 280


def test_broken_images_leave_at_once():
    sizes, classifier, images = [], linear(), some(64, low=0.4, high=0.6)
    labels = predicted(classifier, images)
    adversarial = APGD(eps=0.02, steps=20)(lambda x: sizes.append(len(x)) or classifier(x), images, labels)
    fell = (predicted(classifier, adversarial) != labels).sum().item()
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64
    assert sizes[-1] == 64 - fell


# --- the embedded model -----------------------------------------------------------------------------------------------


def stand(classifier, images: torch.Tensor, labels: torch.Tensor) -> int:
    return (predicted(classifier, images) == labels).sum().item()


@pytest.mark.parametrize(
    ("norm", "eps", "steps", "loss"),
    [
        ("linf", 3 / 255, 10, "ce"),
        ("linf", 3 / 255, 10, "dlr"),
        ("linf", 3 / 255, 5, "targeted"),
        ("l2", 0.4, 10, "ce"),
    ],
)
def test_as_strong_as_torchattacks(embedded, norm, eps, steps, loss):
    """At most two images of 24 more stand than with theirs, and at most three fewer.

    The starts differ: theirs are stretched until one pixel reaches the budget, and drawn for the whole batch. With few
    steps theirs also looks for stalls more often than the paper says, after every step from the third on.
    """
    classifier, images, labels = embedded
    name = {"linf": "Linf", "l2": "L2"}[norm]
    if loss == "targeted":
        ours, theirs = {"loss": "dlr", "targets": 9}, torchattacks.APGDT(classifier, norm=name, eps=eps, steps=steps)
    else:
        ours, theirs = {"loss": loss}, torchattacks.APGD(classifier, norm=name, eps=eps, steps=steps, loss=loss)
    with torch.random.fork_rng():
        rival = stand(classifier, theirs(images, labels), labels)
    found = stand(classifier, APGD(eps=eps, steps=steps, norm=norm, **ours)(classifier, images, labels), labels)
    assert rival - 3 <= found <= rival + 2
    assert 0 < rival < 20, "a budget at which attacks can differ"


def test_white_box_beats_transfer_beats_noise(embedded):
    """The same budget with full knowledge, with a model of slightly other weights, and with none."""
    classifier, images, labels = embedded
    other = copy.deepcopy(classifier)
    generator = torch.Generator().manual_seed(0)
    for weight in other.clip.network.visual.parameters():
        weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator) if weight.ndim > 1 else 0)
    attack = APGD(eps=6 / 255, steps=8)
    white = stand(classifier, attack(classifier, images, labels), labels)
    # all images of the source count, also those it gets wrong: those are not attacked there
    transfer = stand(classifier, attack(other, images, predicted(other, images)), labels)
    noise = stand(classifier, UniformNoise(eps=6 / 255)(classifier, images, labels), labels)
    assert white < transfer < noise <= len(images)


def test_more_budget_steps_and_restarts_are_not_weaker(embedded):
    """Nested budgets never bring an image back; one image of 24 may stand longer by chance with more steps."""
    classifier, images, labels = embedded
    found = APGD(eps=0, steps=5).sweep(classifier, images, labels, [0, 1 / 255, 3 / 255, 1])
    counts = [stand(classifier, adversarial, labels) for adversarial in found.values()]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == len(images)
    assert counts[-1] <= len(images) * 0.1, "with eps = 1 any picture is allowed: chance or below"
    few, many = (APGD(eps=3 / 255, steps=steps)(classifier, images, labels) for steps in (2, 12))
    assert stand(classifier, many, labels) <= stand(classifier, few, labels) + 1
    twice = APGD(eps=3 / 255, steps=2, restarts=2)(classifier, images, labels)
    assert stand(classifier, twice, labels) <= stand(classifier, few, labels)
