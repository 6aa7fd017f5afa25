"""Attack in low precision, judge in float32."""

import torch
from torch import Tensor

from robustclip.attacks.base import Attack, Classifier, frozen
from robustclip.checks import check_choice
from robustclip.component import component
from robustclip.fast import fast_classifier
from robustclip.models import PRECISIONS, ZeroShotClassifier


@component
class Fast:
    """Another attack, its gradients taken on the classifier's `fast` twin, its result checked in float32.

    Fast(attack=PGD(eps=4/255))

    Every image is shown to the classifier itself. Those that stand although the twin is fooled, be it that the attack
    stopped too early or never began, are attacked again without the twin. So rounding neither invents nor hides a
    success. Only a plain `ZeroShotClassifier` has a twin; anything else, such as a defended one, is attacked directly.
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

    def __call__(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for (n, 3, h, w) pixels in [0, 1] and (n,) true labels."""
        if type(classifier) is not ZeroShotClassifier or not len(images):
            return self.attack(classifier, images, labels)
        twin = fast_classifier(classifier, self.precision)
        adversarial = self.attack(twin, images, labels)
        standing = (~self._won(classifier, adversarial, labels)).nonzero()[:, 0]
        if len(standing):
            again = standing[self._won(twin, adversarial[standing], labels[standing])]
            adversarial[again] = self.attack(classifier, images[again], labels[again])
        return adversarial

    def _won(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        with frozen(classifier), torch.no_grad():
            return self.attack.won(self.attack.look(classifier, images), labels)
