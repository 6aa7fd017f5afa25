"""A CLIP, an attack and defenses that take no time, and a small grid of them."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.component import component
from robustclip.data.sources import load_samples
from robustclip.models import _counted


@cache
def prototypes(role: str) -> dict[str, Tensor]:
    """Mean picture of each class of a role, by its prompt."""
    samples = load_samples(role, n=200)
    pooled = F.adaptive_avg_pool2d(samples.images, 8).flatten(1)
    return {prompt: pooled[samples.labels == label].mean(0) for label, prompt in enumerate(samples.prompts)}


class FakeClip(nn.Module):
    """Compares pictures with the mean picture of each class; `shift` makes another model of it."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift, self.logit_scale, self.image_size = shift, torch.tensor(20.0), (32, 32)
        self.digest, self.known = f"fake-{shift}", {}

    def encode_images(self, images: Tensor) -> Tensor:
        images = _counted(images)
        return F.normalize(F.adaptive_avg_pool2d(images, 8).flatten(1) - 0.5 + self.shift, dim=-1)

    def encode_texts(self, texts) -> Tensor:
        known = prototypes("cifar10") | prototypes("dtd")
        return F.normalize(torch.stack([known.get(text, torch.full((192,), 0.7)) for text in texts]) - 0.5, dim=-1)

    text_features = encode_texts

    def remembered(self, key, compute):
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One gradient step, and uniform noise by seed."""

    eps: float = 0.05
    seed: int = 0

    def __call__(self, classifier, images: Tensor, labels: Tensor) -> Tensor:
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(images), labels), images)
        return (images.detach() + self.eps * gradient.sign() + 1e-3 * self.seed).clamp(0, 1)


@component
class Paste:
    """An attack that puts a patch over the image."""

    patch: Tensor

    def __call__(self, classifier, images: Tensor, labels: Tensor) -> Tensor:
        return self.patch.expand_as(images).clone()


@dataclass(frozen=True, kw_only=True)
class Darken:
    """A defense: the classifier sees darker pictures."""

    factor: float = 0.5

    def __call__(self, classifier):
        return lambda images: classifier(images * self.factor)


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A defense that destroys the logits."""

    value: float = float("nan")

    def __call__(self, classifier):
        return lambda images: classifier(images) * self.value
