"""What a loss may look at: one batch, and what the attacks make of it on first use."""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from robustclip.models import Clip
from robustclip.training.parallel import gather, share

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
        others = ("network.visual.", "network.logit_")
        self.clip, self._known = clip, {}
        self.learn = any(part.requires_grad for name, part in clip.named_parameters() if not name.startswith(others))

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

    `eps` is the budget of this update, `noise` where its attack starts, uniform in [-1, 1]; `original` is the CLIP that
    training started from, as it was.
    """

    def __init__(
        self, recipe: Any, clip: Clip | Texts, images: Tensor, labels: Tensor, prompts: Sequence[str],
        noise: Tensor | None = None, eps: float | None = None, original: Clip | None = None,
        spent: Stopwatch | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.texts = recipe, clip if isinstance(clip, Texts) else Texts(clip)
        self.clip, self.original = self.texts.clip, original or self.texts.clip
        self.images, self.labels, self.prompts = images, labels, tuple(prompts)
        self.noise = torch.zeros_like(images) if noise is None else noise
        self.eps, self.spent = recipe.eps if eps is None else eps, Stopwatch() if spent is None else spent
        self.present, self.places = labels.unique(return_inverse=True)  # classes here; each picture's among them

    def features(self, images: Tensor) -> Tensor:
        """(n, d) unit features of everybody's images, with gradients."""
        return gather(self.clip.encode_images(self.recipe.shown(self.clip, images)))

    def raw(self, images: Tensor) -> Tensor:
        """As `features`, before they are scaled to unit length."""
        return gather(self.clip.raw_images(self.recipe.shown(self.clip, images)))

    def logits(self, features: Tensor, texts: Tensor) -> Tensor:
        """s cos(I, T)."""
        return self.scale * features @ texts.T

    @property
    def scale(self) -> Tensor | float:
        """s, which multiplies cosines: the CLIP's, or the inverse of a temperature that the recipe has of its own."""
        own = getattr(self.recipe, "temperature", None)
        return self.clip.logit_scale.float() if own is None else 1 / own

    @property
    def own_labels(self) -> Tensor:
        """The labels of `images`."""
        return self.labels[share(len(self.labels))]

    @cached_property
    def before(self) -> "Batch":
        """The same batch for the original CLIP."""
        return Batch(self.recipe, self.original, self.images, self.labels, self.prompts, self.noise, self.eps)

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
        """`present_prompts` after the recipe's text attack on the current text tower: each costs once."""
        with self.spent.on("text attack"):
            return self.recipe.text(self.clip, self.present_prompts)

    @cached_property
    def attacked_images(self) -> Tensor:
        """The images after the recipe's inner attack on the current weights."""
        with self.spent.on("image attack"):
            return self.recipe.attack(self)
