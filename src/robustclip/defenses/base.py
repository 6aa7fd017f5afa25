"""What all defenses share: how a defended classifier answers, and what an attacker who knows the defense can use.

A defense is a frozen dataclass; calling it with a classifier gives a `Defended` classifier, which any attack takes.

    defended = CLIPure(steps=10)(zero_shot(clip, role))
    defended.at(3)(images)                      # the same with other random numbers
    PGD(eps=1 / 255)(defended.for_attack(), images, labels)   # an aware attack
    defended.at(SCORING_DRAW)(adversarial)      # judged by random numbers that no attacker has seen

Random numbers belong to an image and a draw: what happens to an image depends on its own pixels and on the draw, never
on its neighbours in the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.component import component
from robustclip.models import ZeroShotClassifier
from robustclip.randomness import draw_seed, own_noise

Classifier = Callable[[Tensor], Tensor]
SCORING_DRAW = 1_000_003  # the draw at which answers count; attacks use 0, 1, 2, ...


@component
class Defense(ABC):
    """From a classifier to a defended one. Text features come from `classifier.text_features`, nowhere else."""

    randomised: ClassVar[bool] = False  # whether draws differ

    @abstractmethod
    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What the defended classifier answers, (n, classes), to (n, 3, h, w) pixels in [0, 1]."""

    def surrogate(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What an attacker who knows the defense differentiates instead: same shape, a useful gradient (BPDA)."""
        return self.logits(classifier, images, draw)

    def gate(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor | None:
        """What decides for each image whether the defense acts, (n,); None for a defense that always does."""
        return None

    def passes(self, classes: int) -> tuple[int, int]:
        """Images through the tower, forward and backward, for one answer to one image, at most."""
        return 1, 0

    def noise(self, images: Tensor, draw: int, part: int | str = 0, shape: Sequence[int] | None = None) -> Tensor:
        """Uniform noise in [-1, 1] like the images, or (n, *shape): its own for each image, draw and part."""
        return own_noise(images, draw_seed(getattr(self, "seed", 0), draw, part), shape)

    def __call__(self, classifier: Classifier) -> "Defended":
        """The classifier behind this defense."""
        return Defended(classifier, self)


class Defended(nn.Module):
    """A classifier behind a defense, with the random numbers of one draw."""

    def __init__(self, classifier: Classifier, defense: Defense, draw: int = 0) -> None:
        super().__init__()
        self.classifier, self.defense, self.draw = classifier, defense, draw
        self.training = getattr(classifier, "training", False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) pixels in [0, 1] to (n, classes) logits."""
        return self.defense.logits(self.classifier, images, self.draw)

    def at(self, draw: int) -> "Defended":
        """The same with the random numbers of another draw."""
        return type(self)(redrawn(self.classifier, draw), self.defense, draw)

    def surrogate(self, images: Tensor) -> Tensor:
        """What an attacker who knows the defense differentiates, (n, classes)."""
        return self.defense.surrogate(self.classifier, images, self.draw)

    def gate(self, images: Tensor) -> Tensor | None:
        """What decides for each image whether the defense acts, (n,), if anything does."""
        return self.defense.gate(self.classifier, images, self.draw)

    def for_attack(self) -> nn.Module:
        """The true answers, with the surrogate's gradient where one is asked for."""
        return _ForAttack(self)


class _ForAttack(nn.Module):
    """Value of a defended classifier, derivative of its surrogate."""

    def __init__(self, defended: Defended) -> None:
        super().__init__()
        self.defended, self.training = defended, defended.training

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) pixels in [0, 1] to (n, classes) logits."""
        defended = self.defended
        asked = torch.is_grad_enabled() and images.requires_grad
        if not asked or type(defended.defense).surrogate is Defense.surrogate:
            return defended(images)
        with torch.no_grad():
            value = defended(images)
        smooth = defended.surrogate(images)
        return value + (smooth - smooth.detach())

    def at(self, draw: int) -> "_ForAttack":
        """The same with the random numbers of another draw."""
        return _ForAttack(self.defended.at(draw))


@component
class OwnDefense(Defense):
    """Any other callable from a classifier to a classifier, as a defense; it declares no passes and has no draws."""

    defense: Callable[[Classifier], Classifier]

    def __call__(self, classifier: Classifier) -> Defended:
        """The classifier behind this defense, which is asked to build it once."""
        return _OwnDefended(classifier, self)

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What the callable's classifier answers."""
        return self.defense(classifier)(images)


class _OwnDefended(Defended):
    def __init__(self, classifier: Classifier, defense: OwnDefense, draw: int = 0) -> None:
        super().__init__(classifier, defense, draw)
        self.built = defense.defense(classifier)

    def forward(self, images: Tensor) -> Tensor:
        return self.built(images)

    surrogate = forward


def as_defense(defense: Callable[[Classifier], Classifier]) -> Defense:
    """A defense as it is, any other callable as `OwnDefense`."""
    return defense if isinstance(defense, Defense) else OwnDefense(defense=defense)


def redrawn(classifier: Classifier, draw: int) -> Classifier:
    """The classifier with the random numbers of another draw, itself where it has none."""
    return classifier.at(draw) if hasattr(classifier, "at") else classifier


def features_of(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """Images to unit features (n, d), for attackers who climb them: a CLIP's own, or what a defense leaves of them.

    A defense is put before the axes of feature space as classes, so that its logits are s u.
    """
    plain = undefended(classifier)
    if classifier is plain:
        return plain.clip.encode_images
    axes = rebuilt(classifier, ZeroShotClassifier.of_axes(plain.clip))
    return lambda images: F.normalize(axes(images).float(), dim=1)


def unwrapped(classifier: Classifier) -> Classifier:
    """The classifier behind the defenses, if there are any."""
    while isinstance(classifier, _ForAttack | Defended):
        classifier = classifier.defended if isinstance(classifier, _ForAttack) else classifier.classifier
    return classifier


def undefended(classifier: Classifier) -> ZeroShotClassifier:
    """The zero-shot classifier behind the defenses; a ValueError for any other kind."""
    inside = unwrapped(classifier)
    if isinstance(inside, ZeroShotClassifier):
        return inside
    raise ValueError(
        f"a {type(inside).__name__} has neither image features nor prompts to attack: it is no ZeroShotClassifier, "
        "with or without defenses; attack its logits, or make a function that defends a defense by `as_defense`"
    )


def rebuilt(classifier: Classifier, plain: ZeroShotClassifier) -> Classifier:
    """The same defenses at the same draws before another zero-shot classifier."""
    if isinstance(classifier, _ForAttack):
        return rebuilt(classifier.defended, plain).for_attack()
    if isinstance(classifier, Defended):
        return type(classifier)(rebuilt(classifier.classifier, plain), classifier.defense, classifier.draw)
    return plain
