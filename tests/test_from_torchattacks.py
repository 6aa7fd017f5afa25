"""Attacks of torchattacks as ours: same pictures, same manners, and any instance can be adapted."""

import inspect
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from robustclip import _torchvision
from robustclip.attacks import PGD, FromTorchattacks, UniformNoise, adapt
from robustclip.attacks.base import as_attack
from robustclip.attacks.from_torchattacks import L2_ONLY, OURS, seeded

_torchvision.prepare()
import torchattacks  # noqa: E402  torchvision has to be prepared first

SIDE = 6
CLASSES = [getattr(torchattacks, name) for name in torchattacks.__all__ if name not in ("LGV", "MultiAttack")]
SETTINGS = {  # unlike the defaults, so that adapting has something to recall
    "APGD": {"norm": "L2", "steps": 3, "loss": "dlr", "rho": 0.6, "n_restarts": 2},
    "APGDT": {"steps": 2, "n_classes": 4},
    "AutoAttack": {"version": "rand", "norm": "L2"},
    "CW": {"c": 5, "steps": 9},
    "DeepFool": {"steps": 4},
    "FAB": {"steps": 3, "multi_targeted": True, "n_classes": 3},
    "GN": {"std": 0.03},
    "PGD": {"alpha": 0.01, "steps": 2, "random_start": False},
    "PGDRS": {"steps": 2, "noise_type": "uniform", "noise_sd": 0.2},
    "Pixle": {"x_dimensions": (1, 2), "max_iterations": 3},
    "SparseFool": {"lam": 2, "steps": 3},
    "Square": {"n_queries": 7, "resc_schedule": False},
    "TIFGSM": {"kernel_name": "linear", "len_kernel": 3, "steps": 2},
}


class Net(nn.Module):
    """A small smooth network with dropout and batch norm."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.3), nn.Linear(3 * SIDE**2, 16), nn.Tanh(),
                nn.Linear(16, classes),
            )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 5 * self.layers(images)


def some(n: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def predicted(classifier: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier(images).argmax(1)


def make(kind: type, model: nn.Module, **more):
    """An instance of a class of torchattacks with unusual settings."""
    return kind(model, **SETTINGS.get(kind.__name__, {}), **more)


# --- adapting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_instance_tells_its_settings(kind):
    """Adapted, pasted back and built again, it has the attributes it was made with."""
    model = Net().eval()
    parameters = inspect.signature(kind).parameters
    theirs = make(kind, model, **({"eps": 0.05} if "eps" in parameters else {}))
    attack = adapt(theirs)
    again = eval(repr(attack))
    assert again == attack
    assert hash(again) == hash(attack)
    assert dict(attack.settings) == SETTINGS.get(kind.__name__, {})
    assert attack.eps == (0.05 if "eps" in parameters else math.inf)
    rebuilt = vars(attack.build(model, some(1)))
    plain = (int, float, str, bool, tuple, type(None))
    ours = ("seed", "n_classes", "n_target_classes")  # the seed is that of the adapter, the classes are the model's
    for name, value in vars(theirs).items():
        if isinstance(value, plain) and name not in ours:
            assert rebuilt[name] == value, name


def test_several_attacks_in_one():
    model, images = Net().eval(), some(30)
    parts = [torchattacks.FGSM(model, eps=0.01), torchattacks.PGD(model, eps=0.05, steps=3, random_start=False)]
    attack = adapt(torchattacks.MultiAttack(parts))
    assert eval(repr(attack)) == attack
    labels = predicted(model, images)
    left = predicted(model, attack(model, images, labels)) == labels
    either = [predicted(model, part(images, labels)) == labels for part in parts]
    assert torch.equal(left, either[0] & either[1])
    assert not torch.equal(left, either[0])


def test_as_attack_takes_both():
    ours, theirs = PGD(eps=0.1), torchattacks.FGSM(Net(), eps=0.1)
    assert as_attack(ours) is ours
    assert as_attack(theirs) == FromTorchattacks(name="FGSM", eps=0.1)


class Halfway(torchattacks.PGD):
    """Not a class of torchattacks itself."""


def test_classes_of_other_modules_have_full_names():
    attack = adapt(Halfway(Net(), eps=0.1, steps=2))
    assert repr(attack) == f"FromTorchattacks(name='{__name__}.Halfway', eps=0.1, settings={{'steps': 2}})"
    assert isinstance(attack.build(Net(), some(1)), Halfway)


def wanting(change) -> torchattacks.PGD:
    attack = torchattacks.PGD(Net())
    change(attack)
    return attack


@pytest.mark.parametrize(
    "theirs",
    [
        wanting(lambda attack: setattr(attack, "attack_mode", "targeted(random)")),
        wanting(lambda attack: attack.set_normalization_used([0.5] * 3, [0.5] * 3)),
        wanting(lambda attack: attack.set_return_type("int")),
    ],
    ids=["targeted", "normalised", "bytes"],
)
def test_other_modes_are_refused(theirs):
    with pytest.raises(ValueError, match=r"default mode, float results and pixels in \[0, 1\]"):
        adapt(theirs)


class Forgetful(torchattacks.PGD):
    def __init__(self, model, strength=1):
        super().__init__(model)


def test_settings_that_cannot_be_recalled():
    with pytest.raises(ValueError, match="cannot tell the strength of this Forgetful; write FromTorchattacks"):
        adapt(Forgetful(Net()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "Nonsense"}, "unknown attack 'Nonsense'; name a class of torchattacks, such as FAB"),
        ({"name": "attack"}, "unknown attack 'attack'"),
        ({"name": "torch.nn.Linear"}, r"unknown attack 'torch\.nn\.Linear'"),
        ({"name": "PGD"}, "eps=inf is not allowed; it must be a finite number between 0 and 1"),
        ({"name": "PGD", "eps": 8}, "eps=8 is not allowed"),
        ({"name": "CW", "eps": float("nan")}, "eps=nan is not allowed"),
        ({"name": "PGD", "eps": 0.1, "settings": {"stepz": 1}}, "unknown setting of PGD 'stepz'; .* alpha, steps"),
        ({"name": "PGD", "eps": 0.1, "settings": {"model": 1}}, "unknown setting of PGD 'model'"),
        ({"name": "FAB", "eps": 0.1, "seed": -1}, "seed=-1 .* between 0 and"),
    ],
)
def test_invalid_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        FromTorchattacks(**arguments)


def test_budgets_are_measured_in_the_attacks_norm():
    assert FromTorchattacks(name="CW", eps=3).norm == "l2"
    assert FromTorchattacks(name="FAB", eps=3, settings={"norm": "L2"}).norm == "l2"
    assert FromTorchattacks(name="FAB", eps=0.3).norm == "linf"
    assert all(hasattr(torchattacks, name) for name in L2_ONLY)
    assert all(set(OURS) & set(inspect.signature(kind).parameters) for kind in CLASSES)


# --- the same pictures ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torchattacks", "ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_pictures_are_theirs(kind):
    """On images that are right, with the same seed: the adapter adds nothing but manners."""
    model, images = Net().eval().requires_grad_(False), some()
    labels = predicted(model, images)
    theirs = make(kind, model, **({"seed": 0} if "seed" in inspect.signature(kind).parameters else {}))
    with seeded(0, torch.device("cpu")):
        expected = theirs(images, labels)
    found = adapt(theirs)(model, images, labels)
    assert torch.allclose(found, expected.detach().clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("name", ["CW", "FAB", "APGD", "Square", "PGDL2", "DeepFool", "Jitter", "EOTPGD"])
def test_manners(name):
    """Weights, their gradients, modes and random states stay, also where the classifier is a mere function."""
    model, images = Net().train(), some()
    labels = predicted(model.eval(), images)
    labels[:3] = (labels[:3] + 1) % 4
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    settings = {"n_queries": 20} if name == "Square" else {}
    attack = FromTorchattacks(name=name, settings=settings, **({} if name in ("CW", "DeepFool") else {"eps": 0.1}))
    adversarial = attack(model, images, labels)
    assert model.training
    assert torch.equal(adversarial[:3], images[:3]), "wrong ones come back"
    function = attack(lambda points: model.eval()(points), images, labels)
    assert torch.equal(adversarial, function)
    assert not adversarial.requires_grad
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]


def test_the_seed_is_the_seed():
    model, images = Net().eval(), some()
    labels = predicted(model, images)
    for name in ("APGD", "PGD"):  # one with a seed of its own, one that draws from the global state
        first, again, other = (
            FromTorchattacks(name=name, eps=0.1, seed=seed)(model, images, labels) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_a_budget_for_an_attack_without_one():
    """CW finds the nearest image it can; within eps, robust accuracy falls with eps, and too far is not broken."""
    model, images = Net().eval(), some(40)
    labels = predicted(model, images)
    attack = FromTorchattacks(name="CW", settings={"c": 20, "steps": 60})
    free = attack(model, images, labels)
    fell = predicted(model, free) != labels
    assert fell.float().mean() > 0.9
    distance = (free - images).flatten(1).norm(dim=1)
    eps = distance[fell].median().item()
    bounded = FromTorchattacks(name="CW", eps=eps, settings={"c": 20, "steps": 60})(model, images, labels)
    assert ((bounded - images).flatten(1).norm(dim=1) <= eps * (1 + 1e-5)).all()
    near = fell & (distance <= eps)
    assert torch.allclose(bounded[near], free[near], atol=1e-6)
    assert (predicted(model, bounded) != labels)[near].all()
    assert (predicted(model, bounded) == labels)[~near].any()


def test_pictures_that_are_not_numbers_are_not_returned():
    """Momentum attacks divide by the size of the gradient, which may be zero."""
    model, images = Net().eval(), some()
    labels = predicted(model, images)

    def flat(points: torch.Tensor) -> torch.Tensor:
        return 0 * model(points) + nn.functional.one_hot(labels[: len(points)], 4)

    adversarial = FromTorchattacks(name="MIFGSM", eps=0.1)(flat, images, labels)
    assert torch.isfinite(adversarial).all()


def test_gradients_of_any_memory_layout():
    """PGDL2 flattens them with `view`, which asks for the plain one."""
    model, images = Net().eval(), some()

    def columns_last(points: torch.Tensor) -> torch.Tensor:
        return model((2 * points).contiguous(memory_format=torch.channels_last) / 2)

    attack, labels = FromTorchattacks(name="PGDL2", eps=0.3, settings={"steps": 2}), predicted(model, images)
    torch.testing.assert_close(attack(columns_last, images, labels), attack(model, images, labels))


@pytest.mark.parametrize("classes", [2, 3, 12])
def test_targets_are_the_classes_there_are(classes):
    """FAB-T asks for nine other classes unless told otherwise."""
    model, images = Net(classes).eval(), some(20)
    labels = predicted(model, images)
    attack = FromTorchattacks(name="FAB", eps=0.05, settings={"multi_targeted": True})
    found = predicted(model, attack(model, images, labels)) != labels
    noise = predicted(model, UniformNoise(eps=0.05)(model, images, labels)) != labels
    assert found.sum() > noise.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    """torchattacks computes in float32, the classifier in its own."""
    own, images = Net().eval().to(dtype), some()

    def model(points: torch.Tensor) -> torch.Tensor:
        return own(points.to(dtype))

    labels = predicted(model, images)
    for name in ("FAB", "PGD"):
        adversarial = FromTorchattacks(name=name, eps=0.25)(model, images, labels)
        assert (adversarial - images).abs().max() <= 0.25 + 1e-6
        assert (predicted(model, adversarial) != labels).any()
