"""Classifiers whose robustness is an illusion, each for another reason, and an attack that forgets its budget.

They exist to be caught: `robustclip.audit` has a check for each. All are defenses, `classifier -> classifier`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.attacks.base import Classifier
from robustclip.attacks.gradient import PGD
from robustclip.component import component


class Defended(nn.Module):
    """A classifier behind a broken defense."""

    def __init__(self, classifier: Classifier, defense: "Broken") -> None:
        super().__init__()
        self.classifier, self.defense, self.training = classifier, defense, False

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) pixels in [0, 1] to (n, classes) logits."""
        return self.defense._logits(self.classifier, images)


class Broken:
    """A defense that only looks robust: `_logits` is what the defended classifier answers."""

    def __call__(self, classifier: Classifier) -> Defended:
        """The classifier behind this defense."""
        return Defended(classifier, self)


@component
class Quantised(Broken):
    """f(round(x (levels - 1)) / (levels - 1)): a step function has no slope, the adversarial examples remain."""

    levels: int = 32

    def _logits(self, classifier: Classifier, images: Tensor) -> Tensor:
        return classifier((images * (self.levels - 1)).round() / (self.levels - 1))


@component
class Saturated(Broken):
    """scale f(x): no decision changes, but the softmax rounds to 0 and 1 and cross-entropy loses its slope."""

    scale: float = 1e4

    def _logits(self, classifier: Classifier, images: Tensor) -> Tensor:
        return self.scale * classifier(images)


@component
class Noisy(Broken):
    """f(x + deviation z), z standard normal: an attack on one draw is judged by another, each try is a lottery."""

    deviation: float = 0.05

    def _logits(self, classifier: Classifier, images: Tensor) -> Tensor:
        return classifier(images + self.deviation * torch.randn_like(images))


@component
class OptimisedAtTestTime(Broken):
    """Moves the image towards the class it already favours: an attack that cannot see the steps aims elsewhere."""

    steps: int = 3
    step_size: float = 1 / 255

    def _logits(self, classifier: Classifier, images: Tensor) -> Tensor:
        moved = images.detach()
        for _ in range(self.steps):
            with torch.enable_grad():
                confidence = classifier(moved.requires_grad_()).log_softmax(1).amax(1).sum()
                (gradient,) = torch.autograd.grad(confidence, moved)
            moved = moved.detach() + self.step_size * gradient.sign()
        return classifier(images + (moved - images).detach())


@component
class Detached(Broken):
    """Denoises as x - (x - blur(x)), the first x detached: the output is right, the gradient points the wrong way."""

    def _logits(self, classifier: Classifier, images: Tensor) -> Tensor:
        noise = images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return classifier(images.detach() - noise)


@component
class Planted(Broken):
    """Shifts classes by one where mean(x) is near period (k + 1/2): planted examples to which no gradient points."""

    period: float
    width: float = 0.005

    def _logits(self, classifier: Classifier, images: Tensor) -> Tensor:
        logits, phase = classifier(images), images.detach().mean((1, 2, 3)) / self.period % 1
        inside = (phase - 0.5).abs() < self.width / 2
        return torch.where(inside[:, None], logits.roll(1, dims=1), logits)


@component
class BatchCentred(Broken):
    """f(x_i) - mean_j f(x_j), to balance the classes: the answer depends on who else is in the batch."""

    def _logits(self, classifier: Classifier, images: Tensor) -> Tensor:
        logits = classifier(images)
        return logits - logits.mean(0)


@component
class Offset(Broken):
    """f(I (x + offset) - offset), I a 1x1 convolution: harmless in float32, but bfloat16 has no digits left for x."""

    offset: float = 64.0

    def _logits(self, classifier: Classifier, images: Tensor) -> Tensor:
        identity = torch.eye(3, device=images.device, dtype=images.dtype)[..., None, None]
        return classifier((F.conv2d(images + self.offset, identity) - self.offset).to(images.dtype))


@component
class SquareRooted(Broken):
    """f(x) + sqrt((x - x)^2): the logits do not change, the derivative of the square root is infinite times 0."""

    def _logits(self, classifier: Classifier, images: Tensor) -> Tensor:
        return classifier(images) + (images - images).square().sum((1, 2, 3)).sqrt()[:, None]


@component
class ForgetfulPGD(PGD):
    """A broken attack: whatever `eps` it is given, it moves within `real_eps`."""

    real_eps: float = 0.25 / 255

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """PGD with the wrong budget."""
        return PGD(eps=self.real_eps, steps=self.steps, seed=self.seed).perturb(classifier, images, labels)
