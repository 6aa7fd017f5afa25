"""What a loss may look at: one batch, and what the attacks make of it on first use."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.ascent import NORMS
from robustclip.attacks.base import frozen
from robustclip.fast import fast
from robustclip.models import Clip
from robustclip.training.parallel import gather, share

if TYPE_CHECKING:
    from robustclip.training.recipes import Recipe

CHUNK = 512  # texts encoded together


class Stopwatch(defaultdict):
    """Seconds by what they were spent on; a block inside another one counts for itself only."""

    def __init__(self) -> None:
        super().__init__(float)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Time a block."""
        begin, inside = time.perf_counter(), sum(self.values())
        yield
        self[what] += time.perf_counter() - begin - (sum(self.values()) - inside)


class Texts:
    """Text features of the CLIP in training: computed anew with gradients if they change, else once."""

    def __init__(self, clip: Clip) -> None:
        weights = clip.network.named_parameters()
        self.clip, self._known = clip, {}
        self.learn = any(weight.requires_grad for name, weight in weights if not name.startswith(("visual.", "logit_")))

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(k, d) unit features of k prompts."""
        key = tuple(prompts)
        if self.learn:
            return torch.cat([self.clip.encode_texts(key[at : at + CHUNK]) for at in range(0, len(key), CHUNK)])
        if key not in self._known:
            self._known = {key: self.clip.text_features(key)}
        return self._known[key]


class Batch:
    """One global batch: with several processes `images` are this process's share, all else is everybody's.

    `eps` is the budget of this update, `noise` where its attack starts, uniform in [-1, 1].
    """

    def __init__(
        self, recipe: "Recipe", texts: Texts, images: Tensor, labels: Tensor, prompts: Sequence[str],
        noise: Tensor, eps: float, spent: Stopwatch,
    ) -> None:  # fmt: skip
        self.recipe, self.clip, self.texts, self.images, self.labels = recipe, texts.clip, texts, images, labels
        self.prompts, self.noise, self.eps, self.spent = tuple(prompts), noise, eps, spent
        self.present, self.places = labels.unique(return_inverse=True)  # classes here; each picture's among them

    def features(self, images: Tensor) -> Tensor:
        """(n, d) unit features of everybody's images, with gradients."""
        return gather(self.clip.encode_images(images))

    def logits(self, features: Tensor, texts: Tensor) -> Tensor:
        """s cos(I, T)."""
        return self.clip.logit_scale.float() * features @ texts.T

    @cached_property
    def class_texts(self) -> Tensor:
        """Features of all class prompts."""
        return self.texts(self.prompts)

    @cached_property
    def present_prompts(self) -> list[str]:
        """The prompts of the classes in the batch, each once."""
        return [self.prompts[label] for label in self.present.tolist()]

    @cached_property
    def attacked_prompts(self) -> list[str]:
        """`present_prompts` after the text attack on the current text tower: each distinct prompt costs once."""
        with self.spent.on("text attack"):
            return self.recipe.text(self.clip, self.present_prompts)

    @cached_property
    def attacked_images(self) -> Tensor:
        """The images after the image attack on the current weights."""
        with self.spent.on("image attack"):
            return self.recipe.attack(self)


def inner_maximum(batch: Batch) -> Tensor:
    """The last l_inf PGD iterate on the cross-entropy over all class prompts, for every image of the batch.

    Unlike the attack used for measuring, images that are already wrong are attacked, too: training learns from them.
    Gradients go to the pixels only, and are taken on the `fast` twin.
    """
    labels, scale = batch.labels[share(len(batch.labels))], batch.clip.logit_scale.float().detach()
    with frozen(batch.clip):
        encode, texts = fast(batch.clip, batch.recipe.precision).encode_images, batch.texts(batch.prompts)

        def slope(points: Tensor) -> Tensor:
            loss = F.cross_entropy(scale * encode(points) @ texts.T, labels, reduction="sum")
            return torch.autograd.grad(loss, points)[0]

        return climb(batch, slope)


def leaking_maximum(batch: Batch) -> Tensor:
    """As `inner_maximum`, with MMCoA's released oversight: the gradients that each step leaves in the weights stay."""
    labels = batch.labels[share(len(batch.labels))]

    def slope(points: Tensor) -> Tensor:
        logits = batch.logits(batch.clip.encode_images(points), batch.texts(batch.prompts))
        F.cross_entropy(logits, labels).backward()
        return points.grad

    return climb(batch, slope)


def climb(batch: Batch, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """Sign steps from a random start up the slope, always inside the ball and the pixel range."""
    linf, eps, recipe = NORMS["linf"], batch.eps, batch.recipe
    step_size = 2 * eps / max(1, recipe.attack_steps) if recipe.step_size is None else recipe.step_size
    points = (batch.images + linf.random(batch.noise, eps)).clamp(0, 1)
    for _ in range(recipe.attack_steps):
        moved = points + step_size * linf.ascend(slope(points.requires_grad_()))
        points = (batch.images + linf.project(moved.detach() - batch.images, eps)).clamp(0, 1)
    return points.detach()
