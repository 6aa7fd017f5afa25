"""Building blocks for attackers who know a defense.

Random defenses: `draws` of the gradient attacks averages over them (EOT). Defenses whose gradient is useless: replace
their backward pass (BPDA), here for a step that maps images to images.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from robustclip.attacks.base import Classifier

Transform = Callable[[Tensor], Tensor]


def replace_backward(transform: Transform, surrogate: Transform | None = None) -> Transform:
    """The same transform of images whose gradient is that of `surrogate`, by default of the identity (BPDA).

    The value is transform(x) exactly; the derivative is d surrogate(x) / dx.
    """

    def replaced(images: Tensor) -> Tensor:
        with torch.no_grad():
            value = transform(images)
        smooth = images if surrogate is None else surrogate(images)
        return value.detach() + (smooth - smooth.detach())

    return replaced


def bpda(classifier: Classifier, transform: Transform, surrogate: Transform | None = None) -> Classifier:
    """What an attacker climbs who knows that `transform` stands first: the same logits, a usable gradient."""
    through = replace_backward(transform, surrogate)
    return lambda images: classifier(through(images))
