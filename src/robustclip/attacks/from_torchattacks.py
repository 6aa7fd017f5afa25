"""Any attack of torchattacks as one of ours: `FromTorchattacks(name="FAB", eps=4/255)`, or `adapt(instance)`."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustclip import _torchvision
from robustclip.attacks.ascent import NORMS, check_gradient, input_gradient
from robustclip.attacks.base import MAX_SEED, Attack, Classifier, is_theirs
from robustclip.checks import check_choice, check_integer
from robustclip.component import component

L2_ONLY = ("CW", "DeepFool", "PGDL2", "PGDRSL2")
OURS = ("model", "eps", "seed", "verbose")  # arguments of torchattacks that are fields of ours, or not wanted
AMOUNTS = ("steps", "n_restarts", "n_queries", "restarts", "max_iterations", "eot_iter")  # of work: none does nothing
STORED = {  # settings that torchattacks stores under another name
    "rho": "thr_decr",
    "resc_schedule": "rescale_schedule",
    "max_iterations": "max_patches",
    "noise_type": "noise_func.noise_type",
    "noise_sd": "noise_func.noise_sd",
    "x_dimensions": "p1_x_dimensions",
    "y_dimensions": "p1_y_dimensions",
}


@component
class FromTorchattacks(Attack):
    """The class `name` of torchattacks with its `settings`; without eps for those that have none, such as CW.

    What comes back is moved into the budget if one is given. Neighbors matter where torchattacks draws random numbers.
    Attacks on several targets never ask for more classes than there are. Other modules' are named "module.Class".

    FromTorchattacks(name="FAB", eps=4/255, settings={"multi_targeted": True})   FAB-T
    FromTorchattacks(name="CW", settings={"steps": 200})                         the L2 attack of Carlini and Wagner
    """

    name: str
    eps: float = math.inf
    settings: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", tuple(sorted(dict(self.settings).items())))
        known = signature(load(self.name)).parameters
        for setting, value in self.settings:
            check_choice(f"setting of {self.name}", setting, [each for each in known if each not in OURS])
            if setting in AMOUNTS:
                check_integer(setting, value, 1)
        if self.eps != math.inf or "eps" in known:
            super().__post_init__()
        check_integer("seed", self.seed, 0, MAX_SEED)

    def __repr__(self) -> str:
        """The call that makes this object again."""
        told = {"name": self.name, "eps": self.eps, "settings": dict(self.settings), "seed": self.seed}
        defaults = {"eps": math.inf, "settings": {}, "seed": 0}
        return f"FromTorchattacks({', '.join(f'{k}={v!r}' for k, v in told.items() if v != defaults.get(k))})"

    @property
    def norm(self) -> str:
        """The norm that measures `eps`."""
        return dict(self.settings).get("norm", "L2" if self.name in L2_ONLY else "Linf").lower()

    def passes(self, classes: int) -> tuple[int, int]:
        """About as many as its steps and restarts say; FAB looks twice in a step, and at all classes or one by one."""
        known = {name: entry.default for name, entry in signature(load(self.name)).parameters.items()}
        known |= dict(self.settings)
        if "attacks" in known:
            forward, backward = zip(*(part.passes(classes) for part in known["attacks"]), strict=True)
            return 1 + sum(forward), sum(backward)
        runs = known.get("n_restarts", 1) * known.get("eot_iter", 1)
        steps = runs * known.get("steps", known.get("n_queries", 1))
        if self.name != "FAB":
            return 1 + runs + steps, steps
        targets = min(known["n_classes"], classes) - 1
        forward = 2 + 2 * steps + 6 * runs
        return (1 + forward * targets, steps * targets) if known["multi_targeted"] else (1 + forward, steps * classes)

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Let torchattacks work on the images, then keep what is a number and lies in the budget."""
        with seeded(self.seed, images.device), torch.enable_grad():
            attack = self.build(Model(classifier, images), images[:1])
            found = attack(images.float().contiguous(), labels).detach().to(images)
        found = torch.where(found.isfinite(), found, images)
        if self.eps < math.inf:
            found = images + NORMS[self.norm].project(found - images, self.eps)
        return found.clamp(0, 1)

    def build(self, model: nn.Module, image: Tensor) -> Any:
        """The torchattacks object for a model."""
        ours = {"model": model, "eps": self.eps, "seed": self.seed}
        kind, settings = load(self.name), dict(self.settings)
        known = signature(kind).parameters
        settings |= {name: value for name, value in ours.items() if name in known}
        if "n_classes" in known:
            settings["n_classes"] = min(settings.get("n_classes", 10), model(image).shape[1])
        if "attacks" in settings:  # the parts of a MultiAttack
            settings["attacks"] = [part.build(model, image) for part in settings["attacks"]]
        return kind(**settings)


def adapt(attack: Any) -> FromTorchattacks:
    """An instance of torchattacks as a `FromTorchattacks`, which takes the classifier it is called with instead."""
    kind, settings = type(attack), {}
    name = kind.__name__ if kind.__module__.startswith("torchattacks.") else f"{kind.__module__}.{kind.__name__}"
    for argument, default in signature(kind).parameters.items():
        if argument not in OURS and (value := _recall(attack, argument)) != default.default:
            settings[argument] = value
    if attack.attack_mode != "default" or attack.normalization_used or attack.return_type != "float":
        raise ValueError(f"{name} must keep its default mode, float results and pixels in [0, 1]; make a plain one")
    own = {"eps": attack.eps} if "eps" in signature(kind).parameters else {}
    return FromTorchattacks(name=name, settings=settings, seed=getattr(attack, "seed", None) or 0, **own)


def _recall(attack: Any, argument: str) -> Any:
    """The value that `attack` was made with."""
    if argument == "attacks":
        return tuple(map(adapt, attack.attacks))
    if argument == "n_classes" and hasattr(attack, "n_target_classes"):
        return attack.n_target_classes + 1
    try:
        return attrgetter(STORED.get(argument, argument))(attack)
    except AttributeError as error:
        name = type(attack).__name__
        remedy = f"write FromTorchattacks(name={name!r}) instead"
        raise ValueError(f"cannot tell the {argument} of this {name}; {remedy}") from error


def load(name: str) -> type:
    """The class called `name` in torchattacks, or "module.Class" elsewhere."""
    _torchvision.prepare()
    module, _, kind = name.rpartition(".")
    found = getattr(import_module(module or "torchattacks"), kind, None)
    if not (isinstance(found, type) and is_theirs(found)):
        raise ValueError(f"unknown attack {name!r}; name a class of torchattacks, such as FAB, CW or PGDL2")
    return found


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random states, which torchattacks draws from, and restore them afterwards."""
    drawn = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(drawn)  # noqa: NPY002


class Model(nn.Module):
    """A classifier as torchattacks wants it: a module on a device, with float32 pixels and logits."""

    def __init__(self, classifier: Classifier, images: Tensor) -> None:
        super().__init__()
        self.classify: Callable[[Tensor], Tensor] = lambda points: classifier(points.to(images.dtype)).float()
        self.place = nn.Parameter(torch.zeros((), device=images.device))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of (n, 3, h, w) pixels."""
        wanted = torch.is_grad_enabled() and images.requires_grad
        return PixelGradient.apply(images, self.classify) if wanted else self.classify(images)


class PixelGradient(torch.autograd.Function):
    """A classifier whose backward pass stops at the pixels, so that no attack fills the gradients of its weights."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits; their graph is kept for the backward pass."""
        with torch.enable_grad():
            ctx.images = images.detach().requires_grad_()
            ctx.logits = check_gradient(classify(ctx.images))
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, upper: Tensor) -> tuple[Tensor, None]:
        """Gradient of the pixels, in the plain layout that torchattacks expects."""
        return input_gradient(ctx.logits, ctx.images, upper).contiguous(), None
