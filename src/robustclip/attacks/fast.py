"""Attack in low precision, judge in float32."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustclip.attacks.base import Adversary, Attack, Classifier, ImageAdversary, frozen
from robustclip.checks import check_choice
from robustclip.component import component
from robustclip.defenses.base import rebuilt, unwrapped
from robustclip.fast import twin_of
from robustclip.models import PRECISIONS


@component
class Fast(ImageAdversary):
    """Another attack, its gradients taken on the classifier's `fast` twin: Fast(attack=PGD(eps=4/255)).

    Every image is shown to the classifier itself in float32. One that still stands is attacked again, on the twin in
    float32 and in the end on the classifier, unless the twin's error is too small there to matter for which class comes
    first. So rounding neither invents a success nor hides one. Zero-shot classifiers and other modules that convolve
    pixels have a twin, with or without defenses; anything else is attacked directly.
    """

    attack: Attack
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise ValueError(f"attack={self.attack!r} is not allowed; give one of robustclip.attacks, such as PGD")
        check_choice("precision", self.precision, PRECISIONS)

    @property
    def eps(self) -> float:
        """The budget of the attack inside."""
        return self.attack.eps

    @property
    def inner(self) -> Any:
        """The attack inside."""
        return self.attack.inner

    def unstopped(self) -> "Fast":
        """The same without a stop where an image fools."""
        return replace(self, attack=self.attack.unstopped())

    def passes(self, classes: int) -> tuple[int, int]:
        """Those of the attack, and two looks at what it made."""
        forward, backward = self.attack.passes(classes)
        return forward + 2, backward

    def __call__(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for (n, 3, h, w) pixels in [0, 1] and (n,) true labels."""
        adversarial, rows = images.detach().clone(), torch.arange(len(images), device=images.device)
        for precision in dict.fromkeys((self.precision, "float32")):
            inside = twin_of(unwrapped(classifier), images, precision) if len(rows) else None
            if inside is None:
                break
            twin = rebuilt(classifier, inside)
            adversarial[rows] = self.attack(twin, images[rows], labels[rows])
            rows = rows[self._doubtful(classifier, twin, adversarial[rows], labels[rows])]
        adversarial[rows] = self.attack(classifier, images[rows], labels[rows])
        return adversarial

    def _doubtful(self, classifier: Classifier, twin: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Rows that stand although z_(1) - z_(2) <= 2 max_j |z_j - twin_j|: such an error can change the winner."""
        with frozen(classifier), frozen(twin):
            scores = self.attack.look(classifier, images)
            standing = (~self.attack.won(scores, labels)).nonzero()[:, 0]
            if not len(standing):  # some networks do not look at no images
                return standing
            scores = scores[standing]
            error = (self.attack.look(twin, images[standing]) - scores).abs().amax(1)
        best = scores.topk(min(2, scores.shape[1])).values
        return standing[~(best[:, 0] - best[:, -1] > 2 * error)]  # an error that is not a number counts


def at_precision(attack: Adversary, precision: str) -> Adversary:
    """The attack with image gradients in this precision, judged in float32, as far as it follows any."""
    return attack if precision == "float32" else attack.with_images(lambda one: Fast(attack=one, precision=precision))
