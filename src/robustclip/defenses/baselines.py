"""The oldest defenses at test time; each needs a classifier and nothing else, of whatever kind.

RandomNoise     one draw of noise on the image (RN)
AntiAdversary   a few steps towards the class that is ahead anyway (Alfarra et al., 2022)
Hedge           a few steps that raise the cross-entropies of all classes together (Wu et al., 2021)
LowPass         without the high frequencies
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component
from robustclip.defenses.base import Classifier, Defense


def within(images: Tensor, delta: Tensor, radius: float) -> Tensor:
    """The change, cut to the ball of `radius` and so that the images stay in [0, 1]."""
    return (images + delta.clamp(-radius, radius)).clamp(0, 1) - images


def started(defense: Defense, images: Tensor, draw: int, part: int | str = "start") -> Tensor:
    """Uniform noise of the defense's radius that keeps the images in [0, 1]: RN's answer, and where others start."""
    return within(images, defense.radius * defense.noise(images, draw, part), defense.radius)


def slope(loss: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the sum of (n,) losses, each of its own image only."""
    return torch.autograd.grad(loss.sum(), delta)[0]


class Correction(Defense):
    """A defense that moves the image before it is classified, x + delta(x).

    Its steps follow signs, whose derivative is zero almost everywhere: an attacker loses nothing by holding delta
    constant (BPDA with the identity), which is what a gradient through `logits` does.
    """

    def __post_init__(self) -> None:
        check_integer("steps", getattr(self, "steps", 0), 0)
        for name in ("step_size", "radius"):
            if getattr(self, name, None) is not None:
                check_range(name, getattr(self, name), 0, 1)

    @abstractmethod
    def correction(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """delta(x), (n, 3, h, w), without a graph."""

    def corrected(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The moved images, whose gradient is that of the images."""
        return images + self.correction(classifier, images.detach(), draw)

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What the classifier answers to the moved images."""
        return classifier(self.corrected(classifier, images, draw))


@component
class RandomNoise(Correction):
    """RN: s(clip(x + n)), n uniform in [-radius, radius], one draw."""

    radius: float = 4 / 255
    seed: int = 0
    randomised: ClassVar[bool] = True

    def correction(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The noise, which keeps the image in [0, 1]."""
        return started(self, images, draw)


@component
class AntiAdversary(Correction):
    """gamma_{k+1} = P(gamma_k - step sign grad CE(s(x + gamma_k), yhat)), yhat = argmax s(x); answers s(x + gamma_K).

    As published there is no projection, `radius` = None, and a step of 0.15; on CLIP nobody printed the settings.
    """

    steps: int = 2
    step_size: float = 1 / 255
    radius: float | None = 4 / 255

    def correction(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Steps down the cross-entropy of the present decision."""
        delta, decided = torch.zeros_like(images), None
        for _ in range(self.steps):
            with torch.enable_grad():
                logits = classifier(images + delta.requires_grad_())
                decided = logits.argmax(1) if decided is None else decided
                gradient = slope(F.cross_entropy(logits.double(), decided, reduction="none"), delta)
            delta = delta.detach() - self.step_size * gradient.sign()
            delta = delta if self.radius is None else within(images, delta, self.radius)
        return delta.detach()

    def passes(self, classes: int) -> tuple[int, int]:
        """Its steps and the answer."""
        return self.steps + 1, self.steps

    def guess(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The decision that the steps strengthen."""
        return classifier(images)


@component
class Hedge(Correction):
    """HD: x' = argmax over the ball of sum_c CE(s(x'), c), from a random start; answers s(x')."""

    steps: int = 20
    step_size: float = 1 / 255
    radius: float = 4 / 255
    seed: int = 0
    randomised: ClassVar[bool] = True

    def correction(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Steps up the cross-entropies of all classes together."""
        delta = started(self, images, draw)
        for _ in range(self.steps):
            with torch.enable_grad():
                logits = classifier(images + delta.requires_grad_()).double()
                gradient = slope(-logits.log_softmax(1).sum(1), delta)
            delta = within(images, delta.detach() + self.step_size * gradient.sign(), self.radius)
        return delta.detach()

    def guess(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What the steps set out from: an image that is far inside a wrong class here stays in it."""
        return classifier(images + started(self, images.detach(), draw))

    def passes(self, classes: int) -> tuple[int, int]:
        """Its steps and the answer."""
        return self.steps + 1, self.steps


@component
class LowPass(Defense):
    """s(F^-1(G F x)), F the Fourier transform of each channel, D the distance from frequency zero in frequency steps.

    ideal G = 1[D <= r]; gaussian G = exp(-D^2 / 2 r^2); butterworth G = 1 / (1 + (D / r)^4). `radius` is a share of the
    side: 40 of 224 pixels in released code.
    """

    radius: float = 40 / 224
    kind: str = "gaussian"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("ideal", "gaussian", "butterworth"))
        check_range("radius", self.radius, 1e-6)

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What the classifier answers to the smooth images."""
        if not len(images):
            return classifier(images)
        height, width = images.shape[-2:]
        down = torch.fft.fftfreq(height, 1 / height, device=images.device)[:, None]
        across = torch.fft.rfftfreq(width, 1 / width, device=images.device)
        ratio = (down**2 + across**2).sqrt() / (self.radius * width)
        smooth = torch.fft.irfft2(torch.fft.rfft2(images) * self.kept(ratio), s=(height, width))
        return classifier(smooth.clamp(0, 1))

    def kept(self, ratio: Tensor) -> Tensor:
        """G at D / r."""
        if self.kind == "ideal":
            return (ratio <= 1).float()
        return torch.exp(-(ratio**2) / 2) if self.kind == "gaussian" else 1 / (1 + ratio**4)
