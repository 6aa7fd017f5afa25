"""Recipes that move what texts say, and teach the image tower to follow: in the style of LAAT and of TIMA.

LAAT   text features spread by a closed form around their mean
TIMA   a linear map of all texts that learns, margins that follow the texts, and two distillations

Both are named after papers without code for this use; what is here is made of their parts.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.checks import check_choice, check_range
from robustclip.classes import Classes
from robustclip.component import component
from robustclip.models import Clip
from robustclip.prompts import OF_TEXTS, Expansion, LinearMap
from robustclip.training.batch import Batch
from robustclip.training.guided import divergence
from robustclip.training.recipes import TeCoA


def expansion(texts: Tensor) -> Expansion:
    """What spreads unit text features (k, d): angles to their mean grow so that the largest becomes a right one.

    Other texts are moved by the same centre and factor, so that classes that were not there have their places, too.
    """
    centre = F.normalize(texts.double().mean(0), dim=0)
    widest = (texts.double() @ centre).min().clamp(-1, 1).acos()
    return Expansion(centre.to(texts), (math.pi / 2 / widest).to(texts))


@component
class LAAT(TeCoA):
    """Language-driven anchors (Li et al., 2024) on a CLIP: a' the spread text features, f unit image features.

    -log softmax(f(x') a'^T / temperature)_y - smoothness cos(f(x), f(x')),   x' raises the first term

    `anchors` = "raw" leaves the texts as they are. What spreads them is kept with the model, so that it is judged with
    it, on any classes.
    """

    anchors: str = "expanded"
    temperature: float | None = 1.0
    smoothness: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("anchors", self.anchors, ("expanded", "raw"))
        check_range("smoothness", self.smoothness, 0)
        if self.temperature is not None:
            check_range("temperature", self.temperature, 1e-3)

    def prepare(self, clip: Clip, classes: Classes) -> Clip:
        """Add what spreads the texts of these classes."""
        if self.anchors == "expanded":
            clip.text_transform = expansion(clip.text_features(classes.prompts))
        return clip

    def loss(self, batch: Batch) -> Tensor:
        """Both terms."""
        attacked = batch.features(batch.attacked_images)
        total = F.cross_entropy(batch.logits(attacked, batch.class_texts), batch.labels)
        if self.smoothness:
            total = total - self.smoothness * (batch.features(batch.images) * attacked).sum(1).mean()
        return total

    def passes(self) -> tuple[int, int]:
        """The clean pictures' besides TeCoA's, if they count."""
        forward, backward = super().passes()
        return forward + bool(self.smoothness), backward + bool(self.smoothness)


@component
class TIMA(TeCoA):
    """Text-image mutual awareness (Ma et al., 2024) as far as abstracts tell: four parts, each of which may be off.

    CE with margins, z_k + s margin g_yk for k != y, on x'            classes whose texts are alike keep more distance
    + distil_images D(s v_0 t^T, s v t^T)                             answers of clean pictures stay as they were
    + energy mean_{i != j} |t_i - t_j|^-2                             texts part
    + distil_texts D(s v_0 t_0^T, s v_0 t^T)                          and still say the same of the guide's pictures

    v, t unit features of pictures and texts, v_0, t_0 those of the guide, D the divergence averaged over the pictures.
    g grows from 0 to 1 over the cosines of the guide's texts, or falls if `widened` = "distant". Texts learn by one
    linear map that all share, so that those of other classes move, too; without `energy` they stay.
    """

    margin: float = 0.05
    widened: str = "similar"
    distil_images: float = 1.0
    energy: float = 0.1
    distil_texts: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("widened", self.widened, ("similar", "distant"))
        for name in ("margin", "distil_images", "energy", "distil_texts"):
            check_range(name, getattr(self, name), 0)

    def prepare(self, clip: Clip, classes: Classes) -> Clip:
        """Add the map, which leaves texts as they are at first."""
        if self.energy:
            width = clip.text_features(classes.prompts[:1]).shape[1]
            clip.text_transform = LinearMap(torch.eye(width, device=clip.device))
        return clip

    def learns(self, name: str) -> bool:
        """The image tower, and the map."""
        return name.startswith(OF_TEXTS) or super().learns(name)

    def margins(self, texts: Tensor, labels: Tensor) -> Tensor:
        """margin g_yk (n, classes), zero at k = y."""
        cosines = texts @ texts.T
        others = ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)
        low, high = cosines[others].min(), cosines[others].max()
        share = ((cosines - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        share = share if self.widened == "similar" else 1 - share
        return self.margin * (share * others)[labels]

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the parts; one of weight 0 costs nothing."""
        texts, before = batch.class_texts, batch.before.class_texts
        cosines = batch.features(batch.attacked_images) @ texts.T
        if self.margin:
            cosines = cosines + self.margins(before, batch.labels)
        total = F.cross_entropy(batch.scale * cosines, batch.labels)
        if self.distil_images or (self.energy and self.distil_texts):
            with torch.no_grad():
                guide = batch.before.features(batch.images)
        if self.distil_images:
            clean = batch.logits(batch.features(batch.images), texts)
            total = total + self.distil_images * divergence(batch.logits(guide, texts), clean).mean()
        if self.energy:
            total = total + self.energy * energy(texts)
            if self.distil_texts:
                same = divergence(batch.logits(guide, before), batch.logits(guide, texts))
                total = total + self.distil_texts * same.mean()
        return total

    def passes(self) -> tuple[int, int]:
        """The guide's and the clean pictures' besides TeCoA's, as far as they count."""
        forward, backward = super().passes()
        clean, guided = bool(self.distil_images), bool(self.distil_images or (self.energy and self.distil_texts))
        return forward + guided + clean, backward + clean


def energy(texts: Tensor) -> Tensor:
    """mean over i != j of |t_i - t_j|^-2, the hyperspherical energy of unit rows."""
    squares = (2 - 2 * texts @ texts.T).clamp(min=1e-6)
    others = ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    return (1 / squares[others]).mean()
