"""What all attacks share: what an attacker faces, what it returns, who is attacked at all, and what is checked.

An attack is a frozen dataclass; calling it returns adversarial images or texts, `pairs` what it makes of a `Target`.
What happens to an image depends on that image and the attack's seed only, never on its neighbors in the batch: random
numbers are seeded by the image's own bytes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustclip.attacks.ascent import NORMS
from robustclip.attacks.losses import fooled
from robustclip.checks import check_choice, check_images, check_integer, check_labels, check_range
from robustclip.classes import Classes
from robustclip.component import component
from robustclip.defenses.base import as_defense, features_of
from robustclip.models import Clip, ZeroShotClassifier, logits_of, modules_of

Classifier = Callable[[Tensor], Tensor]
Captions = list[list[str]]  # one list per image
MAX_SEED = 2**31 - 1
TOGETHER = 128  # images whose captions are attacked together


# --- what an attacker faces, and what it returns ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Target:
    """What an attacker faces: a CLIP, the classes it chooses between, and the defense if the attacker knows it."""

    clip: Clip
    classes: Classes
    defense: Callable[[Classifier], Classifier] | None = None
    held_out: Callable[[int], tuple[Tensor, Tensor]] | None = None  # n -> labelled training images, for who asks
    _built: dict[Classes, Classifier] = field(default_factory=dict, init=False, repr=False)

    def classifier(self, classes: Classes | None = None) -> Classifier:
        """Images to the logits of the classes, as the attacker sees them: with a gradient through the defense."""
        classes = self.classes if classes is None else classes
        if classes not in self._built:
            plain = ZeroShotClassifier(self.clip, classes)
            self._built[classes] = as_defense(self.defense)(plain).for_attack() if self.defense else plain
        return self._built[classes]

    def features(self) -> Classifier:
        """Images to unit features (n, d): the CLIP's own, or what the defense leaves of them."""
        return features_of(self.classifier())


@dataclass(frozen=True, eq=False)
class Pair:
    """Attacked images and the classes, with their prompts, that they are scored with."""

    images: Tensor  # (n, 3, h, w)
    classes: Classes
    own: list[str] | None = None  # for image i, text i stands in for the prompt of its true class


def predictions(pair: Pair, labels: Tensor, build: Callable[[Classes], Classifier]) -> Tensor:
    """Predicted classes (n,) of a pair by the classifier that `build` makes for its classes.

    The true ones (n,) only say where an image's own text belongs.
    """
    classes, own = pair.classes, pair.own or []
    more = [text for text in dict.fromkeys(own) if text not in classes.prompts]
    if more:
        classes = Classes((*classes.names, *more), (*classes.prompts, *more))
    with torch.no_grad():
        logits = build(classes)(pair.images)
    if own:
        columns = torch.tensor([[classes.prompts.index(text)] for text in own], device=logits.device)
        logits = logits.scatter(1, labels[:, None].long(), logits.gather(1, columns))
    return logits[:, : len(pair.classes)].argmax(1)


class Retriever(ZeroShotClassifier):
    """Images to one logit per image of the set, that of its best caption: its accuracy is image-to-text recall@1."""

    def __init__(self, clip: Clip, captions: Captions) -> None:
        super().__init__(clip, list(chain(*captions)))
        self.sizes = [len(group) for group in captions]

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) pixels in [0, 1] to (n, images of the set) logits."""
        return torch.stack([part.amax(1) for part in super().forward(images).split(self.sizes, 1)], 1)


# --- input checks -----------------------------------------------------------------------------------------------------


def check_attackable(images: Tensor) -> Tensor:
    """Return `images` if an attack can keep a budget on them, else raise ValueError."""
    if check_images(images).dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"images are {images.dtype}, whose pixels are too coarse for a budget to be kept; give images.float(), and "
            "let a model in half precision cast them itself"
        )
    return images


def check_captions(captions: Sequence[Sequence[str]], images: int) -> None:
    """Raise ValueError unless there is a list of at least one caption for each image."""
    if len(captions) != images or any(isinstance(group, str) or not len(group) for group in captions):
        raise ValueError(f"captions must be {images} lists, one per image, of one text or more, got {captions!r:.80}")


def check_settings(attack: Any) -> None:
    """Raise ValueError unless the budget and the amounts of work of an attack are in range."""
    norm = check_choice("norm", getattr(attack, "norm", "linf"), NORMS)
    check_range("eps", attack.eps, 0, math.inf if norm == "l2" else 1)
    for name in ("steps", "queries", "restarts", "draws"):
        check_integer(name, getattr(attack, name, 1), 1)
    check_integer("seed", getattr(attack, "seed", 0), 0, MAX_SEED)


def regroup(texts: Sequence[str], captions: Captions) -> Captions:
    """The texts in groups as long as those of `captions`."""
    following = iter(texts)
    return [[next(following) for _ in group] for group in captions]


@contextmanager
def frozen(classifier: Classifier) -> Iterator[None]:
    """Turn weight gradients off and leave training and inference mode while attacking; restore all afterwards."""
    modules = [module for held in modules_of(classifier) for module in held.modules()]
    asking = [weight for module in modules for weight in module.parameters(recurse=False) if weight.requires_grad]
    training = [module for module in modules if getattr(module, "training", False)]  # frozen scripts have no mode
    for weight in asking:
        weight.requires_grad_(False)
    for module in training:
        module.training = False
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)
        for module in training:
            module.training = True


# --- kinds of attack --------------------------------------------------------------------------------------------------


class Adversary(ABC):
    """Every kind of attack: on images, on texts, on both."""

    eps: float  # the image budget; 0 where images stay as they are
    changes_images: ClassVar[bool]
    changes_texts: ClassVar[bool]
    pairs_made = 1  # how many pairs it offers, at most

    @abstractmethod
    def pairs(self, target: Target, images: Tensor, labels: Tensor) -> list[Pair]:
        """What it makes of (n, 3, h, w) pixels in [0, 1] with (n,) true labels.

        It has won an image as soon as one pair is misclassified.
        """

    @abstractmethod
    def on_captions(self, clip: Clip, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        """Attacked images (n, 3, h, w) and captions, of which every image has one or more."""

    @abstractmethod
    def passes(self, classes: int) -> tuple[int, int]:
        """Calls of the classifier, forward and backward, per image and at most, on a head of so many classes."""

    @property
    def inner(self) -> Any:
        """The attack inside those that only run another one on the images, such as `Fast`; else itself."""
        return self

    def with_images(self, change: Callable[["Attack"], "ImageAdversary"]) -> "Adversary":
        """The same with its attack on images changed, if it has one of ours."""
        return self


class ImageAdversary(Adversary):
    """An attack that is called with a classifier, images and labels and returns images."""

    changes_images: ClassVar[bool] = True
    changes_texts: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for (n, 3, h, w) pixels in [0, 1] and (n,) true labels."""

    def pairs(self, target: Target, images: Tensor, labels: Tensor) -> list[Pair]:
        """One pair, of the adversarial images and the clean prompts."""
        return [Pair(self(target.classifier(), images, labels), target.classes)]

    def on_captions(self, clip: Clip, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        """Images against recall@1 of their captions among all captions; the captions stay."""
        check_captions(captions, len(check_attackable(images)))
        labels = torch.arange(len(images), device=images.device)
        parts = zip(images.split(TOGETHER), labels.split(TOGETHER), strict=True)
        gallery = Retriever(clip, captions) if captions else None
        return torch.cat([self(gallery, *part) if gallery else images for part in parts]), captions


@component
class Attack(ImageAdversary):
    """What our image attacks share: input checks, and no work on images that are already misclassified."""

    stop = True  # whether an image that fools is left alone
    eps: float

    def __post_init__(self) -> None:
        check_settings(self)

    @abstractmethod
    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for a batch where the attacker has not won yet."""

    def look(self, classifier: Classifier, images: Tensor) -> Tensor:
        """The scores (n, classes) by which the attacker judges whether an image fools."""
        with torch.no_grad():
            return logits_of(classifier, images)

    def won(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Where the attacker has what it wants: any other class first."""
        return fooled(scores, labels)

    def __call__(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for (n, 3, h, w) pixels in [0, 1] and (n,) true labels; misclassified ones come back."""
        check_attackable(images)
        with frozen(classifier):
            adversarial = images.detach().clone(memory_format=torch.contiguous_format)
            if not len(images):
                return adversarial
            scores = self.look(classifier, adversarial)
            labels = check_labels(labels, scores.shape[1], len(images)).clone().long()
            standing = (~self.won(scores, labels) | (not self.stop)).nonzero()[:, 0]
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

    def passes(self, classes: int) -> tuple[int, int]:
        """One to see which images stand, and those of its steps."""
        steps = getattr(self, "steps", 1)
        return 1 + steps, steps

    def unstopped(self) -> "Attack":
        """The same without a stop where an image fools, if it has one."""
        return self

    def with_images(self, change: Callable[["Attack"], ImageAdversary]) -> ImageAdversary:
        """This one, changed."""
        return change(self)


@component
class OwnAttack(ImageAdversary):
    """Any other callable (classifier, images, labels) -> images, whose output is checked.

    It keeps its budget if it has an `eps`, measured by its `norm` ("linf" or "l2").
    """

    attack: Callable[[Classifier, Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.attack) or " at 0x" in repr(self.attack):
            raise ValueError(
                f"{self.attack!r} is no attack whose repr tells its settings; make it a frozen dataclass with a "
                "__call__(classifier, images, labels)"
            )

    @property
    def eps(self) -> float:
        """Its budget; infinite if it declares none."""
        return getattr(self.attack, "eps", math.inf)

    @property
    def inner(self) -> Any:
        """The callable itself, which has the settings."""
        return self.attack

    def passes(self, classes: int) -> tuple[int, int]:
        """What it says of itself, else one each way for each of its steps."""
        if hasattr(self.attack, "passes"):
            return self.attack.passes(classes)
        steps = getattr(self.attack, "steps", 1)
        return 1 + steps, steps

    def __call__(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """What it returns, if that can be scored and keeps the budget."""
        found = self.attack(classifier, check_images(images), labels)
        try:
            if check_images(found).shape != images.shape:
                raise ValueError(f"their shape is {tuple(found.shape)} instead of {tuple(images.shape)}")
            if (excess := self._excess(found.detach() - images)) > 1e-5 + 1e-4 * self.eps:
                raise ValueError(f"they leave the budget eps={self.eps} by {excess:.3g}; project them into it")
        except ValueError as error:
            raise ValueError(f"what {self.attack!r} returned cannot be scored: {error}") from error
        return found.detach()

    def _excess(self, change: Tensor) -> float:
        """How far the worst change lies outside the ball."""
        norm = getattr(self.attack, "norm", "linf")
        if self.eps == math.inf or norm not in NORMS or not len(change):
            return 0.0
        return float((change - NORMS[norm].project(change, self.eps)).abs().max())


def as_attack(attack: Callable) -> Adversary:
    """Our attacks as they are, instances of torchattacks adapted, any other callable as `OwnAttack`."""
    if isinstance(attack, Adversary):
        return attack
    if not is_theirs(type(attack)):
        return OwnAttack(attack=attack)
    from robustclip.attacks.from_torchattacks import adapt

    return adapt(attack)


def is_theirs(kind: type) -> bool:
    """Whether `kind` is an attack of torchattacks; found out without importing it."""
    return any(f"{base.__module__}.{base.__name__}" == "torchattacks.attack.Attack" for base in kind.__mro__)
