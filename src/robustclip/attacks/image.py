"""Attacks on images in pixel space: uniform noise, FGSM and PGD, for l_inf and l_2.

An attack is a frozen dataclass; calling it returns adversarial images. What happens to an image depends on that image
and the attack's seed only, never on its neighbors in the batch: random starts are seeded by the image's own bytes.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.checks import check_choice, check_images, check_integer, check_labels, check_range

Classifier = Callable[[Tensor], Tensor]
MAX_SEED = 2**31 - 1


# --- norms ------------------------------------------------------------------------------------------------------------


class Linf:
    """Every pixel may change by at most eps."""

    name = "linf"

    def random(self, noise: Tensor, eps: float) -> Tensor:
        """A uniform point of the ball from `noise` (n, 3, h, w), uniform in [-1, 1]."""
        return eps * noise

    def ascend(self, gradient: Tensor) -> Tensor:
        """Steepest ascent direction of unit length."""
        return gradient.sign()

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """Nearest point of the ball."""
        return delta.clamp(-eps, eps)


class L2:
    """The Euclidean length of the change of an image is at most eps."""

    name = "l2"

    def random(self, noise: Tensor, eps: float) -> Tensor:
        """A random direction at a radius uniform in [0, eps], taken from the first entry of the noise."""
        radius = noise.flatten(1)[:, 0].abs().view(-1, 1, 1, 1)
        return eps * radius * self.ascend(noise)

    def ascend(self, gradient: Tensor) -> Tensor:
        """Steepest ascent direction of unit length."""
        return gradient / _length(gradient).clamp(min=1e-12)

    def project(self, delta: Tensor, eps: float) -> Tensor:
        """Nearest point of the ball."""
        return delta * (eps / _length(delta).clamp(min=1e-12)).clamp(max=1)


NORMS: dict[str, Linf | L2] = {"linf": Linf(), "l2": L2()}


def _length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


# --- shared behaviour -------------------------------------------------------------------------------------------------


def own_noise(images: Tensor, seed: int) -> Tensor:
    """Uniform noise in [-1, 1], each image's drawn from a generator seeded by its own bytes and `seed`."""
    noise = torch.empty(images.shape)
    for row, image in zip(noise, images.detach().float().cpu(), strict=True):
        own = zlib.crc32(image.contiguous().numpy().tobytes(), seed & 0xFFFFFFFF)
        row.uniform_(-1, 1, generator=torch.Generator().manual_seed((seed << 32) + own))
    return noise.to(images)


@contextmanager
def frozen(classifier: Classifier):
    """Turn weight gradients off and leave training mode while attacking; restore both afterwards."""
    if not isinstance(classifier, nn.Module):
        yield
        return
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


def input_gradient(losses: Tensor, images: Tensor) -> Tensor:
    """Gradient of each image's loss; one that is missing or not a number would fake robustness, so it is an error."""
    if not losses.requires_grad:
        raise ValueError("the classifier's logits carry no gradient; remove no_grad or detach from its forward pass")
    (gradient,) = torch.autograd.grad(losses, images, torch.ones_like(losses))
    if gradient.isnan().any():
        raise ValueError("the classifier's gradient contains NaN; look for square roots or divisions at zero in it")
    return gradient


def fooled(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows of `logits` put another class first."""
    return logits.argmax(1) != labels


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """What all image attacks share: input checks, and no work on images that are already misclassified."""

    eps: float

    def __post_init__(self) -> None:
        check_range("eps", self.eps, 0, 1)

    @abstractmethod
    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for a batch that the classifier gets right."""

    def __call__(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for (n, 3, h, w) pixels in [0, 1] and (n,) true labels; misclassified ones come back."""
        check_images(images)
        adversarial = images.detach().clone()
        if not len(images):
            return adversarial
        with frozen(classifier):
            with torch.no_grad():
                logits = classifier(adversarial)
            labels = check_labels(labels, logits.shape[1], len(images)).long()
            standing = (~fooled(logits, labels)).nonzero()[:, 0]
            if self.eps and len(standing):
                adversarial[standing] = self.perturb(classifier, adversarial[standing], labels[standing])
        return adversarial


@dataclass(frozen=True, kw_only=True)
class UniformNoise(Attack):
    """The control: uniform noise in the l_inf ball of radius eps, without looking at the classifier."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed, 0, MAX_SEED)

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Add the noise and clip to the pixel range."""
        return (images + self.eps * own_noise(images, self.seed)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient descent on the cross-entropy.

    x_{k+1} = P(x_k + step_size * direction(grad_x CE(f(x_k), y))), where P projects onto the eps-ball around the
    image and onto [0, 1]. `step_size` defaults to 2.5 eps / steps, capped at eps. Broken images leave the batch at
    once, so the adversarial image returned is the first that fools; those that never break return with the highest
    loss seen. Only images that still stand see the next restart.
    """

    steps: int = 20
    step_size: float | None = None
    norm: str = "linf"
    random_start: bool = True
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        check_range("eps", self.eps, 0, 1 if self.norm == "linf" else float("inf"))
        check_integer("steps", self.steps, 1)
        check_integer("restarts", self.restarts, 1)
        check_integer("seed", self.seed, 0, MAX_SEED)
        if self.step_size is not None:
            check_range("step_size", self.step_size, 0)

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Run all restarts; keep the first fooling image, else the one of highest loss."""
        best, best_loss = images.clone(), images.new_full((len(images),), -float("inf"))
        standing = torch.arange(len(images), device=images.device)
        for restart in range(self.restarts):
            found, loss, broken = self._climb(classifier, images[standing], labels[standing], restart)
            better = broken | (loss > best_loss[standing])
            best[standing[better]], best_loss[standing[better]] = found[better], loss[better]
            standing = standing[~broken]
            if not len(standing):
                break
        return best

    def _start(self, images: Tensor, restart: int) -> Tensor:
        """First iterate: random in the ball (always for later restarts), or the image itself."""
        if not self.random_start and restart == 0:
            return images.clone()
        noise = own_noise(images, self.seed + 7919 * restart)
        return (images + NORMS[self.norm].random(noise, self.eps)).clamp(0, 1)

    def _climb(
        self, classifier: Classifier, images: Tensor, labels: Tensor, restart: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One run: the best image found, its loss, and whether it fools, for every image."""
        norm = NORMS[self.norm]
        step_size = min(self.eps, 2.5 * self.eps / self.steps) if self.step_size is None else self.step_size
        best, best_loss = images.clone(), images.new_full((len(images),), -float("inf"))
        broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        rows = torch.arange(len(images), device=images.device)
        current = self._start(images, restart)
        for step in range(self.steps + 1):
            current.requires_grad_(step < self.steps)
            with torch.set_grad_enabled(step < self.steps):
                logits = classifier(current)
                loss = F.cross_entropy(logits, labels[rows], reduction="none")
            now = fooled(logits, labels[rows])
            better = now | (loss.detach() > best_loss[rows])
            best[rows[better]], best_loss[rows[better]] = current.detach()[better], loss.detach()[better]
            broken[rows[now]] = True
            if step == self.steps or now.all():
                break
            gradient, stay = input_gradient(loss, current), ~now
            rows, moved = rows[stay], current.detach()[stay] + step_size * norm.ascend(gradient[stay])
            origin = images[rows]
            current = (origin + norm.project(moved - origin, self.eps)).clamp(0, 1)
        return best, best_loss, broken


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """The fast gradient sign method: one l_inf step of length eps from the image itself."""

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """x + eps sign(grad_x CE(f(x), y)), clipped to the pixel range."""
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(classifier(images), labels, reduction="none")
        gradient = input_gradient(loss, images)
        return (images.detach() + self.eps * gradient.sign()).clamp(0, 1)
