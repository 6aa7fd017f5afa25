"""The inner attack: what the pictures of an update become before the weights learn from them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.ascent import STARTS, FixedSteps, Objective, ascend
from robustclip.attacks.base import frozen
from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component
from robustclip.fast import fast
from robustclip.models import PRECISIONS, Clip
from robustclip.training.batch import Batch

Loss = Callable[[Tensor], Tensor]  # points (n, 3, h, w) -> what to raise, one number each


def cross_entropy(batch: Batch, clip: Clip) -> Loss:
    """CE(f(x'), t) over all class prompts."""
    scale, texts, labels, shown = batch.scale, batch.texts(batch.prompts), batch.own_labels, batch.recipe.shown

    def loss(points: Tensor) -> Tensor:
        logits = scale * clip.encode_images(shown(clip, points)) @ texts.T
        return F.cross_entropy(logits, labels, reduction="none")

    return loss


def feature_distance(batch: Batch, clip: Clip) -> Loss:
    """1 - cos(f(x'), f(x)), which needs no labels."""
    with torch.no_grad():
        clean = clip.encode_images(batch.images)
    return lambda points: 1 - (clip.encode_images(points) * clean).sum(1)


def embedding_distance(batch: Batch, clip: Clip) -> Loss:
    """|phi(x') - phi_0(x)|^2 of embeddings before their normalisation; phi_0 is the original image tower."""
    with torch.no_grad():
        clean = batch.original.raw_images(batch.images)
    return lambda points: (clip.raw_images(points) - clean).square().sum(1)


OBJECTIVES: dict[str, Callable[[Batch, Clip], Loss]] = {
    "cross-entropy": cross_entropy, "features": feature_distance, "embeddings": embedding_distance,
}  # fmt: skip
MODELS = ("tuned", "original")
KEEPS = ("last", "best")


@component
class InnerAttack:
    """Sign steps that raise an objective within the l_inf ball of the update's eps around each picture.

    `objective` is the cross-entropy over all class prompts, a distance of "features" or raw "embeddings" from where
    they were, or a function (batch, clip) -> (points -> one number each). A step is `step_size` long: 2 eps / steps by
    default, 1.25 eps / steps from a one-sided start, which lies in [0, eps] above the picture. `momentum` adds up the
    signs of earlier steps. The last point counts, or the "best" seen. The budget grows to eps over the share `warm_up`
    of the updates. The attack is on the CLIP in training ("tuned") or on the one it started from ("original").

    Unlike attacks for measuring, pictures that are already wrong are attacked, too: training learns from them.
    Gradients go to the pixels only and are taken on the `fast` twin at a `precision`. `leak` is MMCoA's released
    oversight: the gradients that each step has in the weights join the update.
    """

    objective: str | Callable[[Batch, Clip], Loss] = "cross-entropy"
    steps: int = 3
    step_size: float | None = None
    start: str = "random"
    momentum: float = 0.0
    keep: str = "last"
    warm_up: float = 0.3
    model: str = "tuned"
    precision: str = "float32"
    leak: bool = False

    def __post_init__(self) -> None:
        if not callable(self.objective):
            check_choice("objective", self.objective, OBJECTIVES)
        check_integer("attack_steps", self.steps, 0)
        if self.step_size is not None:
            check_range("step_size", self.step_size, 1e-9)
        check_range("momentum", self.momentum, 0, 1)
        check_range("warm_up", self.warm_up, 0, 1)
        for name, choices in (("start", STARTS), ("keep", KEEPS), ("model", MODELS), ("precision", PRECISIONS)):
            check_choice(name, getattr(self, name), choices)
        if self.leak and (self.model, self.keep) != ("tuned", "last"):
            raise ValueError("leak=True is not allowed with model='original' or keep='best'; leave these as they are")

    def __call__(self, batch: Batch) -> Tensor:
        """The pictures of a batch after the attack."""
        batch = batch if self.model == "tuned" else batch.before
        build = self.objective if callable(self.objective) else OBJECTIVES[self.objective]
        if self.leak:
            return self._climb(batch, lambda points, _: (build(batch, batch.clip)(points), None), slope=_leaking)
        with frozen(batch.clip):
            loss = build(batch, fast(batch.clip, self.precision))
            return self._climb(batch, lambda points, _: (loss(points), None))

    def _climb(self, batch: Batch, objective: Objective, **how: Any) -> Tensor:
        length = (1.25 if self.start == "one-sided" else 2) * batch.eps / max(1, self.steps)
        stepper = FixedSteps(length if self.step_size is None else self.step_size, self.momentum)
        return ascend(objective, batch.images, eps=batch.eps, steps=self.steps, stepper=stepper, start=self.start,
                      noise=batch.noise, keep=self.keep, **how).images  # fmt: skip

    def eps_at(self, eps: float, update: int, updates: int) -> float:
        """The budget of an update."""
        return eps * min(1, (update + 1) / max(1, self.warm_up * updates))

    def passes(self) -> tuple[int, int]:
        """Image passes forward and backward that it takes; distances look at the clean picture first."""
        return self.steps + (self.keep == "best") + (self.objective != "cross-entropy"), self.steps


def _leaking(loss: Tensor, points: Tensor) -> Tensor:
    """The slope of the mean; the gradients in the weights stay."""
    loss.mean().backward()
    return points.grad
