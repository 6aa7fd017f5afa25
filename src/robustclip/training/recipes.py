"""Recipes of adversarial fine-tuning: one loss each, on a batch that knows its attacked images and prompts.

    tuned = train(TeCoA(eps=4/255), clip, Pictures.of("cifar10", n=20_000)).clip

A recipe of one's own is a subclass with a `loss`; nothing else is needed.
"""

from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.text import BertAttack, TextAttack
from robustclip.checks import check_choice, check_integer, check_range
from robustclip.classes import Classes
from robustclip.component import component
from robustclip.models import Clip
from robustclip.prompts import LEARNED, OF_TEXTS, add_context, add_frame
from robustclip.training.batch import Batch
from robustclip.training.inner import InnerAttack
from robustclip.training.optimisation import Optimisation
from robustclip.training.pictures import SAMPLERS

TRAINS = ("image", "text", "both", "prompt")
LOGIT_SCALES = ("frozen", "clamped", "free")


@component
class Recipe(ABC):
    """What all recipes share: a loss on pictures attacked within `eps`, followed by an optimisation.

    It learns from `shots` pictures per class, or from all, in the order of the `sampler`. `trains` names the towers
    that learn, or the "prompt" that `prepare` adds; `logit_scale` says what happens to the temperature. Batch
    statistics stay frozen, so that no image depends on its neighbors.
    """

    eps: float
    attack: InnerAttack = InnerAttack()
    optimisation: Optimisation = Optimisation()
    shots: int | None = None
    sampler: str = "fixed"
    trains: str = "image"
    logit_scale: str = "frozen"
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("eps", self.eps, 0, 1)
        check_integer("seed", self.seed, 0)
        if self.shots is not None:
            check_integer("shots", self.shots, 1)
        for name, choices in (("sampler", SAMPLERS), ("trains", TRAINS), ("logit_scale", LOGIT_SCALES)):
            check_choice(name, getattr(self, name), choices)

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """A recipe from flat settings, each of which finds its part: `eps`, `attack_steps`, `step_size`, `rate` ...

        `epochs` without `updates` set aside the fixed number of updates.
        """
        settings = ({"updates": None} if settings.get("epochs") else {}) | settings
        parts = {"optimisation": cls.optimisation, "attack": cls.attack}
        home = {"attack_steps" if name == "steps" else name: part for part in parts for name in vars(parts[part])}
        own = {field.name for field in fields(cls)} - parts.keys()
        if unknown := [name for name in settings if name not in own and name not in home]:
            known = ", ".join(sorted([*own, *home]))
            raise ValueError(f"setting {unknown[0]!r} does not fit {cls.__name__}; choose among {known}")
        for part in parts:
            given = {name: value for name, value in settings.items() if home.get(name) == part}
            parts[part] = replace(parts[part], **{name.removeprefix("attack_"): value for name, value in given.items()})
        return cls(**{name: value for name, value in settings.items() if name in own}, **parts)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """What to minimise, a scalar."""

    def shown(self, clip: Clip, images: Tensor) -> Tensor:
        """What a CLIP is shown of pictures: themselves."""
        return images

    def prepare(self, clip: Clip, classes: Classes) -> Clip:
        """Add to a copy of the CLIP what the recipe needs besides its weights: prompts, a transform of its texts."""
        return clip

    def learns(self, name: str) -> bool:
        """Whether a weight of the network is trained, or of the transform of its texts."""
        if name == "logit_scale":
            return self.logit_scale != "frozen"
        if name in LEARNED or name.startswith(OF_TEXTS):
            return self.trains == "prompt"
        return name != "logit_bias" and self.trains in ("both", "image" if name.startswith("visual.") else "text")

    def passes(self) -> tuple[int, int]:
        """Image passes forward and backward that each picture of an update takes."""
        forward, backward = self.attack.passes()
        return forward + 1, backward + 1


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
class WithoutText(TeCoA):
    """Contrastive adversarial training without text: an attacked image has to find its own clean image in the batch."""

    def passes(self) -> tuple[int, int]:
        """With those of the clean images."""
        forward, backward = super().passes()
        return forward + 1, backward + 1

    def loss(self, batch: Batch) -> Tensor:
        """CE(Z) + CE(Z^T), halved, with the row number as target."""
        logits = batch.logits(batch.features(batch.attacked_images), batch.features(batch.images))
        own = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@component
class MMCoA(Recipe):
    """Both modalities: attacked images with clean prompts, clean images with attacked prompts (Zhou et al. 2024)."""

    trains: str = "both"
    text: TextAttack = BertAttack(offset="shifted", end_token=False)
    image_weight: float = 0.5
    text_weight: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("image_weight", self.image_weight, 0)
        check_range("text_weight", self.text_weight, 0)
        check_range("image_weight + text_weight", self.image_weight + self.text_weight, 1e-9)

    def passes(self) -> tuple[int, int]:
        """Those of the terms that count."""
        clean = bool(self.text_weight)
        forward, backward = super().passes() if self.image_weight else (0, 0)
        return forward + clean, backward + clean

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
class AdvPT(TeCoA):
    """Adversarial prompt tuning: `vectors` of context for the text tower, against images attacked without labels.

    The encoders stay as they are, and the attack turns image features away from where they were: it ignores prompts.
    """

    trains: str = "prompt"
    attack: InnerAttack = InnerAttack(objective="features", start="one-sided", keep="best")
    vectors: int = 8

    def prepare(self, clip: Clip, classes: Classes) -> Clip:
        """Add the context."""
        return add_context(clip, self.vectors, self.seed)


@component
class VP(TeCoA):
    """A visual prompt: a frame of pixels, the same for all images, trained against attacks through it."""

    trains: str = "prompt"
    width: int = 4

    def prepare(self, clip: Clip, classes: Classes) -> Clip:
        """Add the frame."""
        return add_frame(clip, self.width, self.seed)
