"""Recipes of adversarial fine-tuning: one loss each, on a batch that knows its attacked images and prompts.

    tuned = TeCoA(eps=4/255)(clip, Pictures.of("cifar10", n=20_000))

A recipe of one's own is a subclass with a `loss`; nothing else is needed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import BertAttack, FeaturePGD
from robustclip.attacks.text import TextAttack
from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component
from robustclip.fast import fast
from robustclip.models import PRECISIONS, Clip
from robustclip.prompts import add_context, add_frame
from robustclip.training import loop
from robustclip.training.batch import Batch, inner_maximum, leaking_maximum
from robustclip.training.pictures import SAMPLERS, Pictures

TRAINS = ("image", "text", "both", "prompt")
LOGIT_SCALES = ("frozen", "clamped", "free")


@component
class Recipe(ABC):
    """What all recipes share.

    `updates` of `batch_size` pictures, but at most `epochs` passes over the pictures; `shots` per class, or all, in the
    order of the `sampler`. The image attack takes `attack_steps` of `step_size` (2 eps / steps by default) within a
    budget that grows to `eps` over the share `warm_up` of the updates; `precision` is that of its gradients. The
    learning `rate` rises and falls once ("one-cycle") or stays. Weight decay is decoupled ("adamw"), or part of the
    gradient ("adam", "sgd"). `trains` names the towers that learn, `logit_scale` what happens to the temperature.
    Batch statistics stay frozen, so that no image depends on its neighbors.
    """

    eps: float
    updates: int = 600
    batch_size: int = 128
    epochs: float | None = None
    shots: int | None = None
    sampler: str = "fixed"
    attack_steps: int = 3
    step_size: float | None = None
    warm_up: float = 0.3
    precision: str = "float32"
    text: TextAttack = BertAttack(offset="shifted", end_token=False)
    leak: bool = False  # MMCoA's released oversight: the gradients of the image attack's steps join the update
    optimizer: str = "adamw"
    rate: float = 2e-3
    schedule: str = "one-cycle"
    weight_decay: float = 1e-4
    clip_norm: float | None = None
    trains: str = "image"
    logit_scale: str = "frozen"
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("eps", self.eps, 0, 1)
        for name in ("updates", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        check_integer("attack_steps", self.attack_steps, 0)
        check_integer("seed", self.seed, 0)
        if self.shots is not None:
            check_integer("shots", self.shots, 1)
        for name in ("epochs", "clip_norm", "step_size"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1e-9)
        check_range("warm_up", self.warm_up, 0, 1)
        check_range("rate", self.rate, 0)
        check_range("weight_decay", self.weight_decay, 0)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("trains", self.trains, TRAINS)
        check_choice("logit_scale", self.logit_scale, LOGIT_SCALES)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """What to minimise, a scalar."""

    def __call__(self, clip: Clip, pictures: Pictures, folder: Path | str | None = None) -> Clip:
        """A tuned copy of `clip`. With a `folder`, progress is kept there and an interrupted run goes on from it."""
        return loop.train(self, clip, pictures, folder and Path(folder))[0]

    def attack(self, batch: Batch) -> Tensor:
        """The image attack of an update."""
        return (leaking_maximum if self.leak else inner_maximum)(batch)

    def prepare(self, clip: Clip) -> Clip:
        """Add to a copy of the CLIP what the recipe needs besides its weights."""
        return clip

    def learns(self, name: str) -> bool:
        """Whether a weight of the network is trained."""
        if name == "logit_scale":
            return self.logit_scale != "frozen"
        if name in ("logit_bias", "visual.frame", "token_embedding.context"):
            return False
        return self.trains in ("both", "image" if name.startswith("visual.") else "text")

    def make_optimizer(self, weights: list[Tensor]) -> torch.optim.Optimizer:
        """The optimizer for these weights; the loop sets its rate."""
        return OPTIMIZERS[self.optimizer](weights, lr=self.rate, weight_decay=self.weight_decay)

    def passes(self) -> tuple[int, int]:
        """Image passes forward and backward that each picture of an update takes."""
        return self.attack_steps + 1, self.attack_steps + 1

    def updates_on(self, pictures: int) -> int:
        """How many updates there are on a set of so many pictures."""
        longest = math.inf if self.epochs is None else math.ceil(self.epochs * pictures / self.batch_size)
        return int(min(self.updates, longest))

    def rate_at(self, update: int, updates: int) -> float:
        """The learning rate of an update."""
        return self.rate * SCHEDULES[self.schedule](update / updates)

    def eps_at(self, update: int, updates: int) -> float:
        """The budget of an update."""
        return self.eps * min(1, (update + 1) / max(1, self.warm_up * updates))


def one_cycle(share: float, rise: float = 0.2, start: float = 1 / 25, end: float = 1e-4) -> float:
    """Up along half a cosine over the first fifth of the updates, down along another half over the rest."""
    if share < rise:
        low, place = start, 1 - share / rise
    else:
        low, place = end, (share - rise) / (1 - rise)
    return low + (1 - low) * (1 + math.cos(math.pi * place)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {"one-cycle": one_cycle, "constant": lambda share: 1.0}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.98), eps=1e-6),
    "adam": partial(torch.optim.Adam, betas=(0.9, 0.98), eps=1e-6),
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


# --- losses -----------------------------------------------------------------------------------------------------------


def contrast(batch: Batch, images: Tensor, texts: Tensor) -> Tensor:
    """The symmetric contrastive loss of images (n, d) and the texts of the present classes (k, d).

    The same value and gradient as with one row per picture and the row number as target, since texts of a class are
    equal: with n_c pictures of class c, CE(Z)_i = log sum_c n_c exp(Z_ic) - Z_iy, and each text is scored once.
    """
    logits, places = batch.logits(images, texts), batch.places
    own = logits.gather(1, places[:, None])[:, 0]
    to_texts = (logits + places.bincount(minlength=len(texts)).log()).logsumexp(1) - own
    to_images = logits.logsumexp(0)[places] - own
    return (to_texts + to_images).mean()


@component
class Standard(Recipe):
    """FT-standard: clean pictures, cross-entropy over the class prompts, or contrastive against the batch."""

    trains: str = "both"
    contrastive: bool = False

    def passes(self) -> tuple[int, int]:
        """One of each."""
        return 1, 1

    def loss(self, batch: Batch) -> Tensor:
        """CE(f(x), t), or the symmetric in-batch loss."""
        features = batch.features(batch.images)
        if self.contrastive:
            return contrast(batch, features, batch.texts(batch.present_prompts))
        return F.cross_entropy(batch.logits(features, batch.class_texts), batch.labels)


@component
class TeCoA(Recipe):
    """Text-guided adversarial training: CE over all class prompts on attacked images (Mao et al. 2023)."""

    def loss(self, batch: Batch) -> Tensor:
        """CE(f(x'), t)."""
        return F.cross_entropy(batch.logits(batch.features(batch.attacked_images), batch.class_texts), batch.labels)


@component
class MMCoA(Recipe):
    """Both modalities: attacked images with clean prompts, clean images with attacked prompts (Zhou et al. 2024)."""

    trains: str = "both"
    image_weight: float = 0.5
    text_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("image_weight", self.image_weight, 0)
        check_range("text_weight", self.text_weight, 0)
        check_range("image_weight + text_weight", self.image_weight + self.text_weight, 1e-9)

    def passes(self) -> tuple[int, int]:
        """Those of the terms that count."""
        passes = (self.attack_steps + 1) * bool(self.image_weight) + bool(self.text_weight)
        return passes, passes

    def loss(self, batch: Batch) -> Tensor:
        """image_weight L(I', T) + text_weight L(I, T'); a term of weight 0 costs nothing."""
        total = torch.zeros((), device=batch.images.device)
        if self.image_weight:
            attacked = batch.features(batch.attacked_images)
            total = total + self.image_weight * contrast(batch, attacked, batch.texts(batch.present_prompts))
        if self.text_weight:
            attacked = batch.texts(batch.attacked_prompts)
            total = total + self.text_weight * contrast(batch, batch.features(batch.images), attacked)
        return total


@component
class AdvPT(Recipe):
    """Adversarial prompt tuning: `vectors` of context for the text tower, against images attacked without labels.

    The encoders stay as they are, and the attack turns image features away from where they were: it ignores prompts.
    """

    trains: str = "prompt"
    vectors: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("attack_steps", self.attack_steps, 1)

    def prepare(self, clip: Clip) -> Clip:
        """Add the context."""
        return add_context(clip, self.vectors, self.seed)

    def passes(self) -> tuple[int, int]:
        """Two more forward: the clean features, and a look at the last point."""
        return self.attack_steps + 3, self.attack_steps + 1

    def learns(self, name: str) -> bool:
        """Only the context."""
        return name == "token_embedding.context"

    def attack(self, batch: Batch) -> Tensor:
        """Feature PGD as released: a one-sided start, steps of 1.25 eps / steps."""
        step_size = 1.25 * batch.eps / self.attack_steps if self.step_size is None else self.step_size
        attack = FeaturePGD(
            eps=batch.eps, steps=self.attack_steps, step_size=step_size, start="one-sided", seed=self.seed
        )
        nothing = torch.zeros(len(batch.images), dtype=torch.long, device=batch.images.device)
        return attack(fast(batch.clip, self.precision).encode_images, batch.images, nothing)

    def loss(self, batch: Batch) -> Tensor:
        """CE(f(x'), g(v, t))."""
        return F.cross_entropy(batch.logits(batch.features(batch.attacked_images), batch.class_texts), batch.labels)


@component
class VP(Recipe):
    """A visual prompt: a frame of pixels, the same for all images, trained against attacks through it."""

    trains: str = "prompt"
    width: int = 4

    def prepare(self, clip: Clip) -> Clip:
        """Add the frame."""
        return add_frame(clip, self.width, self.seed)

    def learns(self, name: str) -> bool:
        """Only the frame."""
        return name == "visual.frame"

    def loss(self, batch: Batch) -> Tensor:
        """CE(f(x' + frame), t)."""
        return F.cross_entropy(batch.logits(batch.features(batch.attacked_images), batch.class_texts), batch.labels)


# --- by name ----------------------------------------------------------------------------------------------------------

RECIPES: dict[str, Callable[..., Recipe]] = {
    "FT-standard": Standard,
    "FT-contrastive": partial(Standard, contrastive=True),
    "TeCoA": TeCoA,
    "TeCoA-both": partial(TeCoA, trains="both"),  # the text tower learns, too
    "MMCoA": MMCoA,
    "MMCoA-partial": partial(MMCoA, trains="image"),
    "MMCoA-image-term": partial(MMCoA, text_weight=0),
    "MMCoA-text-term": partial(MMCoA, image_weight=0),
    "MMCoA-leak": partial(MMCoA, leak=True),
    "MMCoA-decay": partial(MMCoA, weight_decay=0.2),
    "MMCoA-L2": partial(MMCoA, weight_decay=0.2, optimizer="adam"),  # the decay inside Adam's gradient, as released
    "MMCoA-sampler": partial(MMCoA, sampler="released"),
    "MMCoA-aligned": partial(MMCoA, text=BertAttack()),
    "AdvPT": AdvPT,
    "VP": VP,
}


def named_recipe(name: str, **settings: Any) -> Recipe:
    """The recipe called `name` with these settings."""
    return RECIPES[check_choice("recipe", name, RECIPES)](**settings)
