"""What all image attacks share: norms, randomness, gradients, and who is attacked at all.

An attack is a frozen dataclass; calling it returns adversarial images. What happens to an image depends on that image
and the attack's seed only, never on its neighbors in the batch: random numbers are seeded by the image's own bytes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustclip.attacks.losses import fooled
from robustclip.checks import check_choice, check_images, check_integer, check_labels, check_range
from robustclip.component import component
from robustclip.randomness import own_noise  # noqa: F401 used by other attacks

Classifier = Callable[[Tensor], Tensor]
Outcome = tuple[Tensor, Tensor, Tensor]  # of one run: images, what it maximised in float64, which have won
MAX_SEED = 2**31 - 1


# --- norms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """What an attack has to know of the norm that measures its budget; changes are (n, 3, h, w)."""

    random: Callable[[Tensor, float], Tensor]  # (noise uniform in [-1, 1], eps) -> a point of the ball
    ascend: Callable[[Tensor], Tensor]  # gradient -> direction of steepest ascent, of unit length
    project: Callable[[Tensor, float], Tensor]  # (change, eps) -> nearest point of the ball


def _length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=1e-12)


def _random_l2(noise: Tensor, eps: float) -> Tensor:
    """A random direction at a radius uniform in [0, eps], taken from the first entry of the noise."""
    return eps * noise.flatten(1)[:, 0].abs().view(-1, 1, 1, 1) * (noise / _length(noise))


NORMS = {
    "linf": Norm(lambda noise, eps: eps * noise, torch.sign, lambda delta, eps: delta.clamp(-eps, eps)),
    "l2": Norm(
        _random_l2, lambda delta: delta / _length(delta), lambda delta, eps: delta * (eps / _length(delta)).clamp(max=1)
    ),
}


# --- shared behaviour -------------------------------------------------------------------------------------------------


@contextmanager
def frozen(classifier: Classifier):
    """Turn weight gradients off and leave training mode while attacking; restore both afterwards."""
    if not isinstance(classifier, nn.Module):
        classifier = nn.Identity()
    asking = [weight for weight in classifier.parameters() if weight.requires_grad]
    training = [module for module in classifier.modules() if module.training]
    for weight in asking:
        weight.requires_grad_(False)
    classifier.eval()
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)
        for module in training:
            module.training = True


def check_gradient(logits: Tensor) -> Tensor:
    """Return what a classifier computed if gradients can flow back through it, else raise ValueError."""
    if not logits.requires_grad:
        raise ValueError("the classifier's logits carry no gradient; remove no_grad or detach from its forward pass")
    return logits


def input_gradient(outputs: Tensor, images: Tensor, upper: Tensor | None = None) -> Tensor:
    """Gradient of the sum of `outputs`, or of their product with `upper`, with respect to the images.

    One that is missing or not a number would fake robustness, so it is an error.
    """
    upper = torch.ones_like(outputs) if upper is None else upper
    (gradient,) = torch.autograd.grad(check_gradient(outputs), images, upper, retain_graph=upper.ndim > 1)
    if gradient.isnan().any():
        raise ValueError("the classifier's gradient contains NaN; look for square roots or divisions at zero in it")
    return gradient


def best_of(runs: Iterable[Callable[[Tensor], Outcome]], images: Tensor) -> Tensor:
    """The first image of any run that wins, else the one of highest value; a run gets the rows that still stand."""
    best, highest = images.clone(), images.new_full((len(images),), -torch.inf, dtype=torch.float64)
    standing = torch.arange(len(images), device=images.device)
    for run in runs:
        found, values, won = run(standing)
        better = won | (values > highest[standing])
        best[standing[better]], highest[standing[better]] = found[better], values[better].double()
        standing = standing[~won]
        if not len(standing):
            break
    return best


@component
class Attack(ABC):
    """What all image attacks share: input checks, and no work on images that are already misclassified."""

    eps: float

    def __post_init__(self) -> None:
        norm = check_choice("norm", getattr(self, "norm", "linf"), NORMS)
        check_range("eps", self.eps, 0, math.inf if norm == "l2" else 1)
        for name in ("steps", "queries", "restarts", "draws"):
            if hasattr(self, name):
                check_integer(name, getattr(self, name), 1)
        check_integer("seed", getattr(self, "seed", 0), 0, MAX_SEED)

    @abstractmethod
    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for a batch where the attacker has not won yet."""

    def look(self, classifier: Classifier, images: Tensor) -> Tensor:
        """The scores (n, classes) by which the attacker judges whether an image fools."""
        with torch.no_grad():
            return classifier(images)

    def won(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Where the attacker has what it wants: any other class first."""
        return fooled(scores, labels)

    def __call__(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for (n, 3, h, w) pixels in [0, 1] and (n,) true labels; misclassified ones come back."""
        check_images(images)
        adversarial = images.detach().clone()
        if not len(images):
            return adversarial
        with frozen(classifier):
            scores = self.look(classifier, adversarial)
            labels = check_labels(labels, scores.shape[1], len(images)).long()
            standing = (~self.won(scores, labels)).nonzero()[:, 0]
            if self.eps and len(standing):
                adversarial[standing] = self.perturb(classifier, adversarial[standing], labels[standing])
        return adversarial

    def sweep(
        self, classifier: Classifier, images: Tensor, labels: Tensor, budgets: Sequence[float]
    ) -> dict[float, Tensor]:
        """Adversarial images for each budget, smallest first; what falls to a small one is reused for all larger.

        So the results are nested: robust accuracy never rises with eps, and the work shrinks.
        """
        found, current = {}, images.detach().clone()
        standing = torch.arange(len(images), device=images.device)
        for eps in sorted(budgets):
            attack = replace(self, eps=eps)
            current[standing] = attack(classifier, images[standing], labels[standing])
            with frozen(classifier):
                scores = self.look(classifier, current[standing])
            standing = standing[~self.won(scores, labels[standing])]
            found[eps] = current.clone()
        return found
