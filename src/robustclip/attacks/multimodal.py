"""Attacks on images and texts at once: Sep-Attack, Co-Attack and the set-level guidance attack (SGA).

In classification the texts are the class prompts. A multimodal attack returns pairs of images and prompts; the attacker
has won an image as soon as one pair is misclassified:

    pairs = SepAttack(image=PGD(eps=1/255), reading="worst").pairs(clip, prompts, images, labels)
    stands = torch.stack([predictions(pair, labels, clip) == labels for pair in pairs]).all(0)

In retrieval they are captions, one or more per image: `attack.on_captions(clip, images, captions)`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.base import Attack, Classifier, frozen, own_noise
from robustclip.attacks.gradient import Ascent, Objective, Steps
from robustclip.attacks.losses import fooled
from robustclip.attacks.text import BertAttack, TextAttack, kl_divergence
from robustclip.checks import check_choice, check_images, check_labels, check_range
from robustclip.component import component
from robustclip.models import ZeroShotClassifier

Build = Callable[[Any, Sequence[str]], Classifier]  # (clip, prompts) -> the classifier that the attacker sees
Encode = Callable[[Tensor], Tensor]  # images -> unit features (n, d)
Loss = Callable[[Tensor, Tensor], Tensor]  # points (m, 3, h, w), their rows in the batch -> what to maximise (m,)
Captions = list[list[str]]  # one list per image
FOOLING = 1e6  # more than any loss: a point that fools is better than all that do not


@dataclass(frozen=True, eq=False)
class Pair:
    """Attacked images and the prompts they are classified with."""

    images: Tensor  # (n, 3, h, w)
    prompts: list[str]  # one per class
    own: list[str] | None = None  # for image i, text i stands in for the prompt of its true class


def predictions(pair: Pair, labels: Tensor, clip: Any, build: Build = ZeroShotClassifier) -> Tensor:
    """Predicted classes (n,) of a pair; the true ones (n,) only say where an image's own text belongs."""
    classes, own = len(pair.prompts), pair.own or []
    texts = [*pair.prompts, *dict.fromkeys(text for text in own if text not in pair.prompts)]
    with torch.no_grad():
        logits = build(clip, texts)(pair.images)
    if own:
        columns = torch.tensor([[texts.index(text)] for text in own], device=logits.device)
        logits = logits.scatter(1, labels[:, None].long(), logits.gather(1, columns))
    return logits[:, :classes].argmax(1)


def check_captions(captions: Sequence[Sequence[str]], images: int) -> None:
    """Raise ValueError unless there is a list of at least one caption for each image."""
    if len(captions) != images or any(isinstance(group, str) or not len(group) for group in captions):
        raise ValueError(f"captions must be {images} lists, one per image, of one text or more, got {captions!r:.80}")


def attacked_prompts(clip: Any, text: TextAttack, prompts: Sequence[str]) -> list[str]:
    """The prompts after the text attack, computed once as long as the weights stay."""
    key = ("attacked", repr(text), tuple(prompts))
    return list(clip.remembered(key, lambda: text(clip, list(prompts))))


class MultimodalAttack(ABC):
    """What all of them share: input checks, and a model that is left as it was."""

    eps: float  # the image budget; a field or a property
    text: TextAttack

    def __post_init__(self) -> None:
        if not isinstance(self.text, TextAttack) or self.text.images:
            raise ValueError(f"text={self.text!r} is not allowed; give a text attack that needs no labelled images")

    @abstractmethod
    def _paired(self, clip: Any, prompts: list[str], images: Tensor, labels: Tensor, build: Build) -> list[Pair]:
        """As `pairs`, for a checked batch and a frozen model."""

    @abstractmethod
    def _captioned(self, clip: Any, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        """As `on_captions`, for a checked batch and a frozen model."""

    def pairs(
        self, clip: Any, prompts: Sequence[str], images: Tensor, labels: Tensor, build: Build = ZeroShotClassifier
    ) -> list[Pair]:
        """Attacked images and prompts for (n, 3, h, w) pixels in [0, 1], (n,) true labels and one prompt per class.

        `build(clip, prompts)` makes the classifier that the attacker sees, with its defense if the attacker knows it.
        """
        images, prompts = check_images(images).detach(), list(prompts)
        labels = check_labels(labels, len(prompts), len(images)).long()
        with frozen(clip):
            return self._paired(clip, prompts, images, labels, build) if len(images) else [Pair(images, prompts)]

    def on_captions(self, clip: Any, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        """Attacked images (n, 3, h, w) and captions, of which every image has one or more."""
        images = check_images(images).detach()
        check_captions(captions, len(images))
        with frozen(clip):
            return self._captioned(clip, images, captions) if len(images) else (images, [])


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

    def _paired(self, clip: Any, prompts: list[str], images: Tensor, labels: Tensor, build: Build) -> list[Pair]:
        attacked = attacked_prompts(clip, self.text, prompts)
        if self.reading == "attacked":
            return [Pair(self.image(build(clip, attacked), images, labels), attacked)]
        alone = to_the_end(self.image, build(clip, prompts), images, labels)
        if self.reading == "released":
            return [Pair(alone, attacked)]
        classifier = build(clip, attacked)
        both = self.image(classifier, images, labels)
        with torch.no_grad():
            stands = ~fooled(classifier(both), labels)
        both[stands] = alone[stands]
        return [Pair(alone, prompts), Pair(images, attacked), Pair(both, attacked)]

    def _captioned(self, clip: Any, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        if not isinstance(self.image, Ascent) or not self.image.random_start:
            raise ValueError(f"image={self.image!r} cannot attack without labels; give PGD or APGD with a random start")
        return leave(self.image, clip.encode_images, images), regroup(self.text(clip, list(chain(*captions))), captions)


@component
class Following(MultimodalAttack):
    """What Co-Attack and SGA share: images that follow the attacked texts up the features of the encoders."""

    eps: float
    steps: int = 10
    step_size: float | None = None
    text: TextAttack = BertAttack()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._climber()

    def _climber(self, kind: type[Steps] = Steps, default: float = 1 / 4) -> Steps:
        """The ascent; `default` is the step size as a fraction of eps."""
        step_size = default * self.eps if self.step_size is None else self.step_size
        return kind(eps=self.eps, steps=self.steps, step_size=step_size, seed=self.seed)


@component
class CoAttack(Following):
    """Text first, then the image away from itself and from its attacked text (Zhang et al. 2022).

    max KL(softmax(u) || softmax(u')) + weight KL(softmax(v') || softmax(u')), with u, u' the clean and adversarial
    image feature and v' the attacked text feature of the true class; the mean over several captions. `step_size`
    defaults to 1.25 eps / steps; the start is uniform in [0, eps] as released ("one-sided"), or in [-eps, eps].
    """

    weight: float = 3
    start: str = "one-sided"

    def __post_init__(self) -> None:
        check_choice("start", self.start, ("one-sided", "two-sided"))
        check_range("weight", self.weight, 0)
        super().__post_init__()

    def _climber(self) -> Steps:
        return super()._climber(OneSidedSteps if self.start == "one-sided" else Steps, 1.25 / max(self.steps, 1))

    def _paired(self, clip: Any, prompts: list[str], images: Tensor, labels: Tensor, build: Build) -> list[Pair]:
        attacked = attacked_prompts(clip, self.text, prompts)
        texts = clip.text_features(attacked)[labels].double()
        found = leave(self._climber(), encoder(clip, build, prompts), images, (self.weight, texts))
        return [Pair(found, attacked)]

    def _captioned(self, clip: Any, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        """Each image follows all of its captions: mean_m KL(p_m || q) is KL(mean_m p_m || q) up to a constant."""
        attacked = regroup(self.text(clip, list(chain(*captions))), captions)
        means = pooled(clip, attacked, lambda texts: texts.softmax(1)).log()
        return leave(self._climber(), clip.encode_images, images, (self.weight, means)), attacked


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

    def _paired(self, clip: Any, prompts: list[str], images: Tensor, labels: Tensor, build: Build) -> list[Pair]:
        captions = [[prompts[label]] for label in labels.tolist()]
        found, texts = self._captioned(clip, images, captions, encoder(clip, build, prompts))
        return [Pair(found, prompts, own=list(chain(*texts)))]

    def _captioned(
        self, clip: Any, images: Tensor, captions: Captions, encode: Encode | None = None
    ) -> tuple[Tensor, Captions]:
        encode = encode or clip.encode_images
        texts = pooled(clip, self._rewrite(clip, encode, images, captions), lambda features: features)
        turns = count()

        def loss(points: Tensor, rows: Tensor) -> Tensor:
            views = self._views(points, images[rows], next(turns))
            return -sum((encode(view).double() * texts[rows]).sum(1) for view in views)

        found = ascend(self._climber(), images, loss)
        return found, self._rewrite(clip, encode, found, captions)

    def _rewrite(self, clip: Any, encode: Encode, images: Tensor, captions: Captions) -> Captions:
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


def divergence(encode: Encode, *references: tuple[float, Tensor]) -> Loss:
    """The weighted sum of KL(softmax(reference) || softmax(u')) over coordinates of features u' (n, d), in float64."""

    def loss(points: Tensor, rows: Tensor) -> Tensor:
        features = encode(points).double()
        return sum(weight * kl_divergence(reference[rows], features) for weight, reference in references)

    return loss


def encoder(clip: Any, build: Build, prompts: Sequence[str]) -> Encode:
    """Images to unit features (n, d): the CLIP's own, or what a defended classifier leaves of them.

    That classifier is built on a CLIP whose texts are the axes of feature space, so that its logits are s u.
    """
    if build is ZeroShotClassifier:
        return clip.encode_images
    axes, seen = torch.eye(clip.text_features(prompts).shape[1], device=clip.logit_scale.device), copy(clip)
    seen.encode_images, seen.text_features = clip.encode_images, lambda texts: axes[list(map(int, texts))]
    classifier = build(seen, list(map(str, range(len(axes)))))
    return lambda images: F.normalize(classifier(images).float(), dim=1)


def pooled(clip: Any, captions: Captions, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of the transformed features of each image's captions (n, d), in float64."""
    features = transform(clip.text_features(list(chain(*captions))).double())
    return torch.stack([part.mean(0) for part in features.split([len(group) for group in captions])])


def regroup(texts: Sequence[str], captions: Captions) -> Captions:
    """The texts in groups as long as those of `captions`."""
    following = iter(texts)
    return [[next(following) for _ in group] for group in captions]


@component
class OneSidedSteps(Steps):
    """Projected gradient ascent from a start in [0, eps] above the image, as Co-Attack and AdvPT release it."""

    def start(self, images: Tensor, restart: int) -> Tensor:
        """Uniform in [x, x + eps], clipped to the pixel range."""
        return (images + self.eps * own_noise(images, self.seed + 7919 * restart).abs()).clamp(0, 1)


def ascend(climber: Ascent, images: Tensor, *losses: Loss) -> Tensor:
    """The points of highest loss in the eps-balls around the images, which nobody leaves early; one run per loss."""

    def endless(loss: Loss, points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return loss(points, rows), points.new_zeros(len(points), dtype=torch.bool)

    return climber.maximise([partial(endless, loss) for loss in losses], images) if climber.eps else images.clone()


def leave(climber: Ascent, encode: Encode, images: Tensor, *references: tuple[float, Tensor]) -> Tensor:
    """Images whose features leave where they were and, weighted, the references (n, d)."""
    with torch.no_grad():
        clean = encode(images).double()
    return ascend(climber, images, divergence(encode, (1, clean), *references))


def to_the_end(attack: Attack, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    """An ascent on all images without a stop where they fool: of the points that do, if any, that of highest loss."""
    if not isinstance(attack, Ascent):
        return attack(classifier, images, labels)

    def rewarded(objective: Objective, points: Tensor, rows: Tensor) -> Tensor:
        values, won = objective(points, rows)
        return values.double() + FOOLING * won

    with frozen(classifier):
        objectives = attack.objectives(classifier, images, labels)
        return ascend(attack, images, *(partial(rewarded, objective) for objective in objectives))
