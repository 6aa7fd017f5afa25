"""Attacks on images and texts at once: Sep-Attack, Co-Attack and the set-level guidance attack (SGA).

In classification the texts are the class prompts. A multimodal attack returns pairs of images and prompts; the attacker
has won an image as soon as one pair is misclassified:

    target = Target(clip, classes)
    pairs = SepAttack(image=PGD(eps=1/255), reading="worst").pairs(target, images, labels)
    stands = torch.stack([predictions(pair, labels, target.classifier) == labels for pair in pairs]).all(0)

In retrieval they are captions, one or more per image: `attack.on_captions(clip, images, captions)`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, count
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.ascent import FixedSteps, Objective, ascend
from robustclip.attacks.base import (
    TOGETHER,
    Adversary,
    Attack,
    Captions,
    Pair,
    Target,
    check_attackable,
    check_captions,
    check_settings,
    frozen,
    regroup,
)
from robustclip.attacks.losses import fooled
from robustclip.attacks.text import BertAttack, TextAttack, kl_divergence
from robustclip.checks import check_choice, check_labels, check_range
from robustclip.component import component
from robustclip.models import Clip
from robustclip.randomness import own_noise

Encode = Callable[[Tensor], Tensor]  # images -> unit features (n, d)


class MultimodalAttack(Adversary):
    """What all of them share: input checks, and a model that is left as it was."""

    changes_images: ClassVar[bool] = True
    changes_texts: ClassVar[bool] = True
    text: TextAttack

    def __post_init__(self) -> None:
        if not isinstance(self.text, TextAttack) or self.text.images:
            raise ValueError(f"text={self.text!r} is not allowed; give a text attack that needs no labelled images")

    @abstractmethod
    def _paired(self, target: Target, images: Tensor, labels: Tensor) -> list[Pair]:
        """As `pairs`, for a checked batch and a frozen model."""

    @abstractmethod
    def _captioned(self, clip: Clip, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        """As `on_captions`, for a checked batch and a frozen model."""

    def pairs(self, target: Target, images: Tensor, labels: Tensor) -> list[Pair]:
        """Attacked images and prompts for (n, 3, h, w) pixels in [0, 1] and (n,) true labels."""
        check_attackable(images)
        labels = check_labels(labels, len(target.classes), len(images)).long()
        with frozen(target.clip):
            images = images.detach().clone()
            return self._paired(target, images, labels.clone()) if len(images) else [Pair(images, target.classes)]

    def on_captions(self, clip: Clip, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        """Attacked images (n, 3, h, w) and captions, of which every image has one or more; some at a time."""
        check_captions(captions, len(check_attackable(images)))
        with frozen(clip):
            images = images.detach().clone()
            parts = [slice(at, at + TOGETHER) for at in range(0, len(images), TOGETHER)]
            done = [self._captioned(clip, images[part], captions[part]) for part in parts]
        return torch.cat([found for found, _ in done] or [images]), [group for _, texts in done for group in texts]


@component
class SepAttack(MultimodalAttack):
    """An image attack and a text attack without interaction, in three readings.

    released   the image against the clean prompts, scored with the attacked ones
    attacked   the image against the attacked prompts
    worst      for each image the worst of image alone, text alone and both; never weaker than the other two readings

    Images against clean prompts do not stop when they fool: a higher loss carries over better to other prompts.
    Captions have no labels: there all readings are max KL(softmax(u) || softmax(u')) of the image features u.
    """

    image: Attack
    text: TextAttack = BertAttack()
    reading: str = "released"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reading", self.reading, ("released", "attacked", "worst"))

    @property
    def eps(self) -> float:
        """The image budget."""
        return self.image.eps

    @property
    def pairs_made(self) -> int:
        """Three in the worst reading."""
        return 3 if self.reading == "worst" else 1

    @property
    def inner(self) -> Any:
        """The attack on images."""
        return self.image.inner

    def passes(self, classes: int) -> tuple[int, int]:
        """Those of the image attack, twice in the worst reading."""
        worst, (forward, backward) = self.reading == "worst", self.image.passes(classes)
        return forward * (1 + worst) + worst, backward * (1 + worst)

    def with_images(self, change: Callable[[Attack], Adversary]) -> "SepAttack":
        """With another image attack."""
        return replace(self, image=self.image.with_images(change))

    def _paired(self, target: Target, images: Tensor, labels: Tensor) -> list[Pair]:
        attacked = self.text.attacked(target)
        if self.reading == "attacked":
            return [Pair(self.image(target.classifier(attacked), images, labels), attacked)]
        alone = self.image.unstopped()(target.classifier(), images, labels)
        if self.reading == "released":
            return [Pair(alone, attacked)]
        classifier = target.classifier(attacked)
        both = self.image(classifier, images, labels)
        with torch.no_grad():
            stands = ~fooled(classifier(both), labels)
        both[stands] = alone[stands]
        return [Pair(alone, target.classes), Pair(images, attacked), Pair(both, attacked)]

    def _captioned(self, clip: Clip, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        image = self.image.inner
        if getattr(image, "start", "image") == "image":
            raise ValueError(f"image={image!r} cannot attack without labels; give PGD or APGD with a random start")
        found = image.maximise([leaving(clip.encode_images, images)], images)
        return found, regroup(self.text(clip, list(chain(*captions))), captions)


@component
class Following(MultimodalAttack):
    """What Co-Attack and SGA share: images that follow the attacked texts up the features of the encoders."""

    default_step = 1 / 4  # the step size as a fraction of eps
    start = "random"  # where in the ball
    eps: float
    steps: int = 10
    step_size: float | None = None
    text: TextAttack = BertAttack()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self)
        check_range("step_size", self.step_size or 0, 0)

    def climb(self, objective: Objective, images: Tensor) -> Tensor:
        """The points of highest loss in the eps-balls around the images, which nobody leaves early."""
        step_size = self.default_step * self.eps if self.step_size is None else self.step_size
        noise, stepper = own_noise(images, self.seed), FixedSteps(step_size)
        if not self.eps:
            return images.clone()
        return ascend(
            objective, images, eps=self.eps, steps=self.steps, stepper=stepper, start=self.start, noise=noise
        ).images


@component
class CoAttack(Following):
    """Text first, then the image away from itself and from its attacked text (Zhang et al. 2022).

    max KL(softmax(u) || softmax(u')) + weight KL(softmax(v') || softmax(u')), with u, u' the clean and adversarial
    image feature and v' the attacked text feature of the true class; the mean over several captions. `step_size`
    defaults to 1.25 eps / steps; the start is uniform in [0, eps] as released ("one-sided"), or in [-eps, eps]
    ("random").
    """

    weight: float = 3
    start: str = "one-sided"

    def __post_init__(self) -> None:
        check_choice("start", self.start, ("one-sided", "random"))
        check_range("weight", self.weight, 0)
        super().__post_init__()

    @property
    def default_step(self) -> float:
        """1.25 / steps."""
        return 1.25 / self.steps

    def passes(self, classes: int) -> tuple[int, int]:
        """One for the clean features; the last point is only looked at."""
        return self.steps + 2, self.steps

    def _paired(self, target: Target, images: Tensor, labels: Tensor) -> list[Pair]:
        attacked = self.text.attacked(target)
        texts = target.clip.text_features(attacked.prompts)[labels].double()
        found = self.climb(leaving(target.features(), images, (self.weight, texts)), images)
        return [Pair(found, attacked)]

    def _captioned(self, clip: Clip, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        """Each image follows all of its captions: mean_m KL(p_m || q) is KL(mean_m p_m || q) up to a constant."""
        attacked = regroup(self.text(clip, list(chain(*captions))), captions)
        means = pooled(clip, attacked, lambda texts: texts.softmax(1)).log()
        return self.climb(leaving(clip.encode_images, images, (self.weight, means)), images), attacked


@component
class SGA(Following):
    """Text against the image, image against all its attacked texts at several scales, text again (Lu et al. 2023).

    max -sum_{m, s} cos(f_I(s(x') + n), v'_m) over texts m and scales s, with Gaussian noise n of deviation `noise`,
    drawn anew in each step; pixels are scaled, before the model's own resize. `step_size` defaults to eps / 4. In
    classification each image has a prompt of its true class for itself.
    """

    scales: tuple[float, ...] = (1, 0.5, 0.75, 1.25, 1.5)
    noise: float = 0.05

    def __post_init__(self) -> None:
        check_range("scales", min(self.scales, default=0), 0.01)
        check_range("noise", self.noise, 0)
        if not hasattr(self.text, "against"):
            raise ValueError(f"text={self.text!r} cannot attack a text against an image; give a BertAttack")
        super().__post_init__()

    def passes(self, classes: int) -> tuple[int, int]:
        """One per scale in each step, and a look at the image before and after."""
        return 2 + len(self.scales) * (self.steps + 1), len(self.scales) * self.steps

    def _paired(self, target: Target, images: Tensor, labels: Tensor) -> list[Pair]:
        captions = [[target.classes.prompts[label]] for label in labels.tolist()]
        found, texts = self._followed(target.clip, target.features(), images, captions)
        return [Pair(found, target.classes, own=list(chain(*texts)))]

    def _captioned(self, clip: Clip, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        return self._followed(clip, clip.encode_images, images, captions)

    def _followed(self, clip: Clip, encode: Encode, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        texts = pooled(clip, self._rewrite(clip, encode, images, captions), lambda features: features)
        turns = count()

        def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            views = self._views(points, images[rows], next(turns))
            return -sum((encode(view).double() * texts[rows]).sum(1) for view in views), None

        found = self.climb(objective, images)
        return found, self._rewrite(clip, encode, found, captions)

    def _rewrite(self, clip: Clip, encode: Encode, images: Tensor, captions: Captions) -> Captions:
        """Each caption moved away from its image."""
        sizes = torch.tensor([len(group) for group in captions], device=images.device)
        with torch.no_grad():
            features = encode(images).repeat_interleave(sizes, 0)
        return regroup(self.text.against(clip, list(chain(*captions)), features), captions)

    def _views(self, points: Tensor, images: Tensor, turn: int) -> Iterator[Tensor]:
        """The points at every scale, with noise that the clean images' bytes, the seed and the turn decide."""
        for number, scale in enumerate(self.scales):
            size = [max(1, round(scale * side)) for side in points.shape[2:]]
            scaled = points if scale == 1 else F.interpolate(points, size=size, mode="bicubic", align_corners=False)
            uniform = own_noise(images, self.seed + 7919 * (1 + turn * len(self.scales) + number), scaled.shape[1:])
            normal = 2**0.5 * uniform.clamp(-1 + 1e-6, 1 - 1e-6).erfinv()
            yield (scaled + self.noise * normal).clamp(0, 1)


def leaving(encode: Encode, images: Tensor, *references: tuple[float, Tensor]) -> Objective:
    """How far features are from where those of the images were and, weighted, from other references (n, d)."""
    with torch.no_grad():
        clean = encode(images).double()
    return partial(divergence, encode, ((1, clean), *references))


def divergence(
    encode: Encode, references: tuple[tuple[float, Tensor], ...], points: Tensor, rows: Tensor
) -> tuple[Tensor, None]:
    """The weighted sum of KL(softmax(reference) || softmax(u')) over coordinates of features u' (n, d), in float64."""
    features = encode(points).double()
    return sum(weight * kl_divergence(reference[rows], features) for weight, reference in references), None


def pooled(clip: Clip, captions: Captions, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of the transformed features of each image's captions (n, d), in float64."""
    features = transform(clip.text_features(list(chain(*captions))).double())
    return torch.stack([part.mean(0) for part in features.split([len(group) for group in captions])])
