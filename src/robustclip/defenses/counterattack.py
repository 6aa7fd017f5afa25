"""Counterattacks: move the image so that its feature leaves the place where an attack may have put it.

Counterattack()                                       TTC (Xing et al., 2025), as released
Counterattack(threshold=None)                         the same without a gate: every image is counterattacked
Counterattack(steps=4, step_size=3 / 255, momentum=0.9, orthogonal=0.5, drift="cosine", sharpness=5)      like DOC
Counterattack(steps=4, radius=8 / 255, mirrored=True, drift="mirror", threshold=0.7, sharpness=70)        like MAC
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component
from robustclip.defenses.base import Classifier, features_of, undefended, unwrapped
from robustclip.defenses.baselines import Correction, started, within
from robustclip.defenses.views import flipped
from robustclip.models import ZeroShotClassifier, load

Encode = Callable[[Tensor], Tensor]


def soft_sign(gradient: Tensor, width: float = 1.0) -> Tensor:
    """tanh(g / (width mean|g|)): a sign that has a slope, whatever the size of the gradient."""
    return torch.tanh(gradient / (width * gradient.abs().mean((1, 2, 3), keepdim=True)).clamp(min=1e-20))


@component
class Counterattack(Correction):
    """TTC: drive the feature f as far as possible from where it is, if it hardly moves under noise.

    delta_0 = n uniform in [-radius, radius];   score = ||f(x + n) - f(x)|| / ||f(x)||
    delta_i = P(delta_{i-1} + step sign grad ||f(x + delta_{i-1}) - f(x)||^2),   i = 1 ... steps
    x + sum_i w_i delta_i, w_i proportional to exp(beta i), where score < threshold; else x + delta_0

    `closed` says what images behind a closed gate get: that "noise", or "nothing". `reverse` counterattacks images
    whose score is above the threshold instead; without a threshold, all. `beta` = None takes the last delta. `original`
    names the CLIP whose features the score looks at, as TTC does on fine-tuned hosts; "" is the host.

    Relatives: `drift` = "cosine" scores by 1 - the mean cosine to `drift_draws` noisy copies (DOC), "mirror" by the
    cosine to the mirror image (MAC, as far as it is known); with `sharpness` s the gate is soft,
    w = sigmoid(s (threshold - score) / threshold), x + w delta + (1 - w) delta_0. `momentum` and `orthogonal`, a random
    part orthogonal to the gradient, bend the steps; `mirrored` moves image and mirror image by one delta and
    averages the two answers.
    """

    steps: int = 2
    step_size: float = 1 / 255
    radius: float = 4 / 255
    beta: float | None = 2.0
    threshold: float | None = 0.2
    reverse: bool = False
    closed: str = "noise"
    drift: str = "relative"
    drift_draws: int = 1
    sharpness: float | None = None
    momentum: float = 0.0
    orthogonal: float = 0.0
    mirrored: bool = False
    original: str = ""
    seed: int = 0
    randomised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("closed", self.closed, ("noise", "nothing"))
        check_choice("drift", self.drift, ("relative", "cosine", "mirror"))
        check_integer("drift_draws", self.drift_draws, 1)
        check_range("momentum", self.momentum, 0, 1)
        check_range("orthogonal", self.orthogonal, 0)
        for name in ("beta", "sharpness"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0)
        if self.threshold is not None:
            check_range("threshold", self.threshold, 1e-9)

    @property
    def lacks(self) -> tuple[str, ...]:
        """Without a threshold there is no gate to close."""
        return ("gate",) if self.threshold is None else ()

    # --- the gate

    def score(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """How much the feature of each image moves, (n,), differentiable."""
        return self._scored(classifier, images, draw, self.start(images, draw))[0]

    def _scored(self, classifier: Classifier, images: Tensor, draw: int, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The score, and the features of the views that it has looked at."""
        encode = encoder(self._scorer(classifier))
        here = encode(images)
        if self.drift == "mirror":
            mirrored = encode(flipped(images))
            return F.cosine_similarity(mirrored, here, dim=1), [here, mirrored]
        noises = [noise, *(self.start(images, draw, part) for part in range(1, self.drift_draws))]
        moved = [encode(images + one) for one in noises]
        if self.drift == "cosine":
            return 1 - sum(F.cosine_similarity(one, here, dim=1) for one in moved) / len(moved), [here]
        return sum((one - here).norm(dim=1) for one in moved) / len(moved) / here.norm(dim=1), [here]

    def gate(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """(threshold - score) / threshold, or its negative: counterattacked where it is positive."""
        return self._room(self.score(classifier, images, draw))

    def _room(self, score: Tensor) -> Tensor:
        room = (self.threshold - score) / self.threshold
        return -room if self.reverse else room

    def _scorer(self, classifier: Classifier) -> Classifier:
        if not self.original:
            return classifier
        clip = undefended(classifier).clip
        other = clip.remembered(("original", self.original), lambda: load(self.original, str(clip.device)))
        return ZeroShotClassifier.of_axes(other)

    # --- the steps

    def start(self, images: Tensor, draw: int, part: int | str = "start") -> Tensor:
        """The noise that scores, starts, and is all that images behind a closed gate get."""
        return started(self, images.detach(), draw, part)

    def moves(
        self, encode: Encode, images: Tensor, draw: int, smooth: bool = False,
        noise: Tensor | None = None, places: Sequence[Tensor] = (),
    ) -> Tensor:  # fmt: skip
        """The weighted delta of the steps from the start; `smooth` ones keep their graph, down to the images.

        `noise` and `places`, the start and the features of the views, are made if nobody has them yet.
        """
        with torch.enable_grad():
            images = images if smooth else images.detach()
            views = self._views(images) if self.steps else []
            here = [*places[: len(views)], *map(encode, views[len(places) :])]
            here = here if smooth else [one.detach() for one in here]
            delta, velocity = self.start(images, draw) if noise is None else noise, torch.zeros_like(images)
            path = [delta]
            for step in range(self.steps):
                delta = delta if smooth and step else delta.detach().requires_grad_()
                seen = zip(self._views(images + delta), here, strict=True)
                distance = sum((encode(view) - place).square().sum(1) for view, place in seen)
                (gradient,) = torch.autograd.grad(distance.sum(), delta, create_graph=smooth)
                ahead = self._bent(gradient, images, draw, step)
                velocity = self.momentum * velocity + (1 - self.momentum) * ahead
                turn = soft_sign(velocity) if smooth else velocity.sign()
                delta = within(images, delta + self.step_size * turn, self.radius)
                path.append(delta if smooth else delta.detach())
        return self._weighted(path)

    def _views(self, images: Tensor) -> list[Tensor]:
        return [images, flipped(images)] if self.mirrored else [images]

    def _bent(self, gradient: Tensor, images: Tensor, draw: int, step: int) -> Tensor:
        """The unit gradient plus a random part orthogonal to it; the gradient where nothing bends the steps."""
        if not (self.momentum or self.orthogonal):
            return gradient
        unit = F.normalize(gradient.flatten(1), dim=1)
        if self.orthogonal:
            other = self.noise(images, draw, f"orthogonal {step}").flatten(1)
            other = other - (other * unit).sum(1, keepdim=True) * unit
            unit = unit + self.orthogonal * F.normalize(other, dim=1)
        return unit.view_as(gradient)

    def _weighted(self, path: list[Tensor]) -> Tensor:
        if self.beta is None:
            return path[-1]
        weights = (self.beta * torch.arange(len(path), dtype=torch.float64)).softmax(0).tolist()
        return sum(weight * delta for weight, delta in zip(weights, path, strict=True))

    # --- the defense

    def correction(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """w delta + (1 - w) delta_0 of each image, with the slope of a soft w if it is asked for."""
        return self.shared(classifier, images, draw)[0]

    def shared(self, classifier: Classifier, images: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """The correction, and w, how much of the counterattack each image got, (n,)."""
        plain, noise = images.detach(), self.start(images, draw)
        share, places = self._share(classifier, images, draw, noise)
        still = noise if self.closed == "noise" else torch.zeros_like(plain)
        moved, rows = still.clone(), share.detach().nonzero()[:, 0]  # a closed gate spares the steps
        if len(rows):
            known = [place[rows] for place in places]
            moved[rows] = self.moves(encoder(classifier), plain[rows], draw, noise=noise[rows], places=known)
        return still + share[:, None, None, None] * (moved - still), share

    def _share(self, classifier: Classifier, images: Tensor, draw: int, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        """w, and the features that the steps lead away from, as far as the gate has looked at them."""
        if self.threshold is None:
            return torch.ones(len(images), device=images.device), []
        soft = self.sharpness is not None
        with torch.set_grad_enabled(soft and torch.is_grad_enabled()):
            score, places = self._scored(classifier, images, draw, noise)
            room = self._room(score)
            share = torch.sigmoid(self.sharpness * room) if soft else (room > 0).to(images.dtype)
        return share, [] if self.original else [place.detach() for place in places]

    def corrected(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The moved images; deltas count as constants in their gradient, a soft gate does not."""
        return images + self.correction(classifier, images, draw)

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What the classifier answers to the moved images."""
        return self.answer(classifier, self.corrected(classifier, images, draw))

    def answer(self, classifier: Classifier, moved: Tensor) -> Tensor:
        """The mean answer over the views."""
        return sum(map(classifier, self._views(moved))) / (1 + self.mirrored)

    def smooth(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Steps along tanh in place of the sign, unrolled; the gate is left as if it were open."""
        return self.answer(classifier, images + self.moves(encoder(classifier), images, draw, smooth=True))

    def passes(self, classes: int) -> tuple[int, int]:
        """The gate's, the places that it has not looked at, the steps and the answer (each for all views)."""
        views, mirror, gated = 1 + self.mirrored, self.drift == "mirror", self.threshold is not None
        gate = gated * (2 if mirror else 1 + self.drift_draws)
        known = 0 if self.original else gated * (1 + mirror)
        return gate + max(0, views - known) * bool(self.steps) + views * (1 + self.steps), views * self.steps


def encoder(classifier: Classifier) -> Encode:
    """Images to the features a counterattack moves: a CLIP's before they are scaled, or those a defense leaves."""
    if isinstance(classifier, ZeroShotClassifier):
        return classifier.clip.raw_images
    return features_of(classifier) if isinstance(unwrapped(classifier), ZeroShotClassifier) else classifier
