"""What an attack maximises: functions of (logits, labels, targets) that give one number per image.

`targets` is None for an untargeted attack, else one class per image to move towards. Logits become float64 first:
in float32 the softmax of a confident model rounds to 0 and 1, and with it the gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """-log p_y, or log p_t towards a target t."""
    logits = logits.double()
    if targets is None:
        return F.cross_entropy(logits, labels, reduction="none")
    return -F.cross_entropy(logits, targets, reduction="none")


def margin(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """The loss of Carlini and Wagner: max_{j != y} z_j - z_y, or z_t - z_y; positive where the attack wins."""
    logits = logits.double()
    true = logits.gather(1, labels[:, None])
    other = without(logits, labels).amax(1) if targets is None else logits.gather(1, targets[:, None])[:, 0]
    return other - true[:, 0]


def logit_ratio(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """The difference of logits ratio (DLR), which does not change when logits are scaled or shifted.

    (max_{j != y} z_j - z_y) / (z_(1) - z_(3)) with z_(1) >= z_(2) >= ...; towards a target, the divisor is
    z_(1) - (z_(3) + z_(4)) / 2. Three classes use z_(1) - z_(3) for both; two have no third logit: the plain margin.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels, targets)
    ranked = logits.double().topk(min(4, logits.shape[1]), dim=1).values
    third = ranked[:, 2] if targets is None else ranked[:, 2:].mean(1)
    return margin(logits, labels, targets) / (ranked[:, 0] - third).clamp(min=1e-12)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": logit_ratio}


def without(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits with those of `labels` at minus infinity."""
    return logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -torch.inf)


def runner_up(logits: Tensor, labels: Tensor, rank: int) -> Tensor:
    """The class in place `rank` (0 is the first) among all but the true one."""
    return without(logits, labels).argsort(dim=1, descending=True, stable=True)[:, rank]


def fooled(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows of `logits` put another class first."""
    return logits.argmax(1) != labels
