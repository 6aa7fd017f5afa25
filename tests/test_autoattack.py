"""AutoAttack: the worst of its parts, only on what still stands, and parity with torchattacks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustclip import _torchvision, models
from robustclip.attacks import APGD, AutoAttack, FromTorchattacks, Square
from robustclip.attacks.autoattack import PARTS
from robustclip.data.roles import role, tinyworld_samples

_torchvision.prepare()
import torchattacks  # noqa: E402  torchvision has to be prepared first

SIDE = 6


def bumpy(classes: int = 5, seed: int = 2) -> nn.Module:
    """A small random network with a rough surface."""
    layers = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * SIDE**2, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, classes)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in layers.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / max(weight.shape[-1], 8)) ** 0.5)
        layers[1].bias.sub_(layers[1].weight.sum(1) / 2)
    return layers.eval()


def some(n: int = 120, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def predicted(classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier(images).argmax(1)


def test_the_parts():
    attack = AutoAttack(eps=0.1, norm="l2", steps=7, queries=9, seed=3)
    assert [attack.attack(part) for part in PARTS] == [
        APGD(eps=0.1, norm="l2", steps=7, seed=3),
        APGD(eps=0.1, norm="l2", steps=7, seed=3, loss="dlr"),
        APGD(eps=0.1, norm="l2", steps=7, seed=3, loss="dlr", targets=9),
        FromTorchattacks(name="FAB", eps=0.1, seed=3, settings={"norm": "L2", "steps": 7, "multi_targeted": True}),
        Square(eps=0.1, norm="l2", queries=9, seed=3),
    ]
    assert attack.parts == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert AutoAttack(eps=0.1).steps == 100
    assert AutoAttack(eps=0.1).queries == 5000


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_stands_if_it_stands_every_part(norm):
    classifier, images = bumpy(), some()
    labels = predicted(classifier, images)
    attack = AutoAttack(eps=0.06 if norm == "linf" else 0.4, norm=norm, steps=3, queries=40)
    stands = [predicted(classifier, attack.attack(part)(classifier, images, labels)) == labels for part in attack.parts]
    whole = predicted(classifier, attack(classifier, images, labels)) == labels
    assert torch.equal(whole, torch.stack(stands).all(0))
    assert whole.sum() < min(one.sum() for one in stands), "together they are stronger than the best of them"


def test_only_standing_images_go_on():
    """And the one that no part breaks comes back as the part left it that pushed its margin highest."""
    classifier, images, sizes = bumpy(), some(), []
    labels = predicted(classifier, images)
    attack = AutoAttack(eps=0.02, steps=3, queries=5, parts=("apgd-ce", "apgd-dlr", "square"))
    adversarial = attack(lambda x: sizes.append(len(x)) or classifier(x), images, labels)
    alone = [attack.attack(part)(classifier, images, labels) for part in attack.parts]
    left = predicted(classifier, alone[0]) == labels
    assert sizes[0] == len(images)
    first_part = sizes[1:5]
    assert first_part == sorted(first_part, reverse=True)
    assert max(sizes[6:]) == left.sum(), "sizes[5] looks at what the first part made"
    stands = predicted(classifier, adversarial) == labels

    def margins(points: torch.Tensor) -> torch.Tensor:
        logits = classifier(points).detach()
        others = logits.masked_fill(F.one_hot(labels, 5).bool(), -torch.inf).amax(1)
        return (others - logits.gather(1, labels[:, None])[:, 0])[stands]

    assert torch.allclose(margins(adversarial), torch.stack([margins(each) for each in alone]).amax(0), atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("part", PARTS)
def test_few_classes(part, classes):
    """Where the original has no third or fourth logit to divide by, every part still finds what can be found."""
    classifier, images = bumpy(classes), some(60)
    labels = predicted(classifier, images)
    attack = AutoAttack(eps=0.06, steps=5, queries=60, parts=(part,))
    assert (predicted(classifier, attack(classifier, images, labels)) == labels).float().mean() < 0.8


def test_a_random_classifier_is_averaged():
    """With draws, an image counts as broken when the mean of several passes says so."""
    classifier, images, passes = bumpy(), some(30), []
    labels = predicted(classifier, images)

    def noisy(points: torch.Tensor) -> torch.Tensor:
        passes.append(len(points))
        drawn = torch.randn(points.shape, generator=torch.Generator().manual_seed(len(passes)))
        return classifier(points + 0.05 * drawn)

    AutoAttack(eps=0.02, steps=2, parts=("apgd-ce",), draws=7)(noisy, images, labels)
    assert passes[:7] == [30] * 7
    assert len(passes) == 7 * 5  # which stand; x_0, x_1 and x_2; what the part made


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("apgd",)}, "unknown part 'apgd'; choose one of: apgd-ce, apgd-dlr, apgd-t, fab-t, square"),
        ({"parts": ()}, "parts is empty; choose some of: apgd-ce"),
        ({"steps": 0}, "steps=0 .* at least 1"),
        ({"queries": 1.5}, r"queries=1\.5 .* whole number"),
        ({"norm": "Linf"}, "unknown norm 'Linf'; choose one of: linf, l2"),
        ({"eps": -1}, "eps=-1 .* between 0 and 1"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoAttack(**{"eps": 0.1} | settings)


def test_as_strong_as_torchattacks():
    """Same budget, steps and queries on 16 images: at most one more stands than with theirs, and at most two fewer.

    Starts and squares are drawn differently, see the tests of the parts; FAB is theirs in both.
    """
    eps, classifier = 4 / 255, models.zero_shot(models.load(device="cpu"), role("cifar10"))
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 16)
    images = images.float() / 255
    theirs = torchattacks.AutoAttack(classifier, eps=eps, seed=0)
    for part in theirs._autoattack.attacks:  # it has no settings for these
        part.steps, part.n_queries = 4, 20
    with torch.random.fork_rng():
        rival = (predicted(classifier, theirs(images, labels)) == labels).sum().item()
    ours = AutoAttack(eps=eps, steps=4, queries=20)
    found = (predicted(classifier, ours(classifier, images, labels)) == labels).sum().item()
    assert rival - 2 <= found <= rival + 1
    assert 0 < rival < 14
