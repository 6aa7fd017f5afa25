"""SCC (Liu et al., 2025): a counterattack as warm-up, then a correction that views and texts agree on.

No code was to be had; what its paper leaves open is a field here.

    SelfConsistency()                        both parts
    SelfConsistency(steps=0, count=1)        neither: the warm-up alone, TTC
    SelfConsistency(count=1)                 the semantic part alone
    SelfConsistency(steps=0)                 the spatial part alone: the warm-up's image, answers averaged over views
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.losses import without
from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component
from robustclip.defenses.base import Classifier, features_of, undefended
from robustclip.defenses.baselines import Correction, within
from robustclip.defenses.counterattack import Counterattack, encoder, soft_sign
from robustclip.defenses.views import each_view, flipped
from robustclip.randomness import normal


@component
class SelfConsistency(Correction):
    """x_w = x + TTC(x);   q = mean_l softmax(s cos(f(v_l(x_w)), t)),   yhat = argmax q.

    t_soft = n(sum_k q_k^(1/T) t_k), the sharpened soft prototype
    J(delta) = mean_l [cos(f(v_l(x + delta)), t_soft) - max_{k != yhat} cos(f(v_l(x + delta)), t_k)]
    delta <- P(delta + step sign grad J), `steps` times, from the warm-up's delta or from zero
    answer: mean_l s cos(f(v_l(x + delta)), t)

    The views v_l are the image, its mirror image, and from the third on either of them with normal noise of a small
    `deviation`. `gated` corrects only images that the warm-up's gate counterattacks; `confident` multiplies the first
    cosine by max_k q_k.
    """

    warmup: Counterattack = Counterattack()
    steps: int = 3
    step_size: float = 1 / 255
    radius: float = 4 / 255
    count: int = 3
    deviation: float = 0.02
    temperature: float = 0.5
    start: str = "warm-up"
    gated: bool = False
    confident: bool = False
    seed: int = 0
    randomised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("count", self.count, 1)
        check_range("temperature", self.temperature, 1e-3)
        check_range("deviation", self.deviation, 0, 1)
        check_choice("start", self.start, ("warm-up", "zero"))

    @property
    def lacks(self) -> tuple[str, ...]:
        """One view is no vote, and without steps nothing follows the pseudo-label."""
        return ("views",) * (self.count == 1) + ("guess",) * (not self.steps) + self.warmup.lacks

    def seen(self, images: Tensor, around: Tensor, draw: int, use: str) -> list[Tensor]:
        """The views; noise belongs to the image `around` which they are made, and to the use they are made for."""
        views = [images, flipped(images)][: self.count]
        for turn in range(2, self.count):
            noise = self.deviation * normal(self.noise(around, draw, f"{use} {turn}"))
            views.append((views[turn % 2] + noise).clamp(0, 1))
        return views

    def prototype(self, classifier: Classifier, warm: Tensor, images: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """q (n, classes) of the warm images, averaged over the views, and the soft prototype (n, d)."""
        found = each_view(classifier, self.seen(warm, images, draw, "guess")).softmax(2).mean(0)
        sharp = (found.clamp(min=1e-30).log() / self.temperature).softmax(1)
        return found, F.normalize(sharp @ undefended(classifier).text_features, dim=1)

    def margins(self, classifier: Classifier, views: list[Tensor], found: Tensor, target: Tensor) -> Tensor:
        """J (n,): the mean over views of the cosine to the prototype beyond the hardest other class."""
        features = each_view(features_of(classifier), views)
        cosines, guess = features @ undefended(classifier).text_features.T, found.argmax(1)
        hardest = torch.stack([without(one, guess).amax(1) for one in cosines])
        weight = found.amax(1) if self.confident else 1.0
        return (weight * (features * target).sum(2) - hardest).mean(0)

    def correction(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """delta(x), (n, 3, h, w)."""
        warm, share = self.warmup.shared(classifier, images, draw)
        if not self.steps:
            return warm
        with torch.no_grad():
            found, target = self.prototype(classifier, images + warm, images, draw)
        delta = warm if self.start == "warm-up" else torch.zeros_like(images)
        for step in range(self.steps):
            with torch.enable_grad():
                delta = delta.detach().requires_grad_()
                views = self.seen(images + delta, images, draw, f"step {step}")
                (gradient,) = torch.autograd.grad(self.margins(classifier, views, found, target).sum(), delta)
            delta = within(images, delta.detach() + self.step_size * gradient.sign(), self.radius)
        return torch.where(share[:, None, None, None] > 0.5, delta, warm) if self.gated else delta

    def views(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits of each view of the corrected images."""
        moved = self.corrected(classifier, images, draw)
        return each_view(classifier, self.seen(moved, images, draw, "answer"))

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Their mean."""
        return self.views(classifier, images, draw).mean(0)

    def guess(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What the pseudo-label is read from: log q of the warm images."""
        warm = self.warmup.corrected(classifier, images, draw)
        return self.prototype(classifier, warm, images, draw)[0].clamp(min=1e-30).log()

    def gate(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The warm-up's."""
        return self.warmup.gate(classifier, images, draw)

    def smooth(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Warm-up and correction along tanh in place of the sign, unrolled."""
        with torch.enable_grad():
            warm = self.warmup.moves(encoder(classifier), images, draw, smooth=True)
            found, target = self.prototype(classifier, images + warm, images, draw)
            delta = warm.clone() if self.start == "warm-up" else torch.zeros_like(images)  # apart from its prototype
            for step in range(self.steps):
                delta = delta if delta.requires_grad else delta.requires_grad_()
                views = self.seen(images + delta, images, draw, f"step {step}")
                margins = self.margins(classifier, views, found, target)
                (gradient,) = torch.autograd.grad(margins.sum(), delta, create_graph=True)
                delta = within(images, delta + self.step_size * soft_sign(gradient), self.radius)
            return each_view(classifier, self.seen(images + delta, images, draw, "answer")).mean(0)

    def passes(self, classes: int) -> tuple[int, int]:
        """The warm-up without an answer, the pseudo-label, the steps and the answer, all over the views."""
        forward, backward = self.warmup.passes(classes)
        forward -= 1 + self.warmup.mirrored
        guess = self.count if self.steps else 0
        steps = self.steps * self.count
        return forward + guess + steps + self.count, backward + steps
