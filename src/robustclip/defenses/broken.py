"""Classifiers whose robustness is an illusion, each for another reason, and an attack that forgets its budget.

They exist to be caught: `robustclip.audit` has a check for each. All are defenses, `classifier -> classifier`.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.gradient import PGD
from robustclip.component import component
from robustclip.defenses.base import Classifier, Defense


@component
class Quantised(Defense):
    """f(round(x (levels - 1)) / (levels - 1)): a step function has no slope, the adversarial examples remain."""

    levels: int = 32

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits of the images in few levels."""
        return classifier((images * (self.levels - 1)).round() / (self.levels - 1))


@component
class Saturated(Defense):
    """scale f(x): no decision changes, but the softmax rounds to 0 and 1 and cross-entropy loses its slope."""

    scale: float = 1e4

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Scaled logits."""
        return self.scale * classifier(images)


@component
class Noisy(Defense):
    """f(x + deviation z), z standard normal: an attack on one draw is judged by another, each try is a lottery."""

    deviation: float = 0.05
    randomised = True

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits of one noisy copy; its noise is nobody's, it comes from the global state."""
        return classifier(images + self.deviation * torch.randn_like(images))


@component
class OptimisedAtTestTime(Defense):
    """Moves the image towards the class it already favours: an attack that cannot see the steps aims elsewhere."""

    steps: int = 3
    step_size: float = 1 / 255

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits of the moved images, whose gradient does not know that they were moved."""
        moved = images.detach()
        for _ in range(self.steps):
            with torch.enable_grad():
                confidence = classifier(moved.requires_grad_()).log_softmax(1).amax(1).sum()
                (gradient,) = torch.autograd.grad(confidence, moved)
            moved = moved.detach() + self.step_size * gradient.sign()
        return classifier(images + (moved - images).detach())


@component
class Detached(Defense):
    """Denoises as x - (x - blur(x)), the first x detached: the output is right, the gradient points the wrong way."""

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits of the blurred images."""
        noise = images - F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return classifier(images.detach() - noise)


@component
class Planted(Defense):
    """Shifts classes by one where mean(x) is near period (k + 1/2): planted examples to which no gradient points."""

    period: float
    width: float = 0.005

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits, or those of the next class."""
        logits, phase = classifier(images), images.detach().mean((1, 2, 3)) / self.period % 1
        inside = (phase - 0.5).abs() < self.width / 2
        return torch.where(inside[:, None], logits.roll(1, dims=1), logits)


@component
class BatchCentred(Defense):
    """f(x_i) - mean_j f(x_j), to balance the classes: the answer depends on who else is in the batch."""

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits without their mean over the batch."""
        logits = classifier(images)
        return logits - logits.mean(0)


@component
class Offset(Defense):
    """f(I (x + offset) - offset), I a 1x1 convolution: harmless in float32, but bfloat16 has no digits left for x."""

    offset: float = 64.0

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits of the images after an offset came and went."""
        identity = torch.eye(3, device=images.device, dtype=images.dtype)[..., None, None]
        return classifier((F.conv2d(images + self.offset, identity) - self.offset).to(images.dtype))


@component
class SquareRooted(Defense):
    """f(x) + sqrt((x - x)^2): the logits do not change, the derivative of the square root is infinite times 0."""

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits plus nothing, with a derivative that is not a number."""
        return classifier(images) + (images - images).square().sum((1, 2, 3)).sqrt()[:, None]


@component
class ForgetfulPGD(PGD):
    """A broken attack: whatever `eps` it is given, it moves within `real_eps`."""

    real_eps: float = 0.25 / 255

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """PGD with the wrong budget."""
        return PGD(eps=self.real_eps, steps=self.steps, seed=self.seed).perturb(classifier, images, labels)
