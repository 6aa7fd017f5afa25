"""Recipes with a guide, the CLIP as it was before: what learns is held close to it on the way.

PMGAFT   close in its answers, to attacked and to clean pictures
TGAZSR   close in where the true class's text finds itself in the picture
FARE     close in the features, and nothing else: no labels, no texts
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.checks import check_choice, check_range
from robustclip.component import component
from robustclip.models import Clip
from robustclip.training.batch import Batch
from robustclip.training.inner import InnerAttack
from robustclip.training.parallel import gather
from robustclip.training.recipes import Recipe, TeCoA

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # means and deviations of its colours
TINY = 1e-12


def divergence(target: Tensor, logits: Tensor) -> Tensor:
    """D_KL(softmax(target) || softmax(logits)) of each row, (n,)."""
    return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none", log_target=True).sum(1)


@component
class PMGAFT(TeCoA):
    """Pre-trained model guided adversarial fine-tuning (Wang et al., 2024), z logits, z_0 those of the guide.

    CE(z(x'), y) + general D(z_0(x'), z(x')) + clean D(z(x), z(x')),   D(a, b) = D_KL(softmax a || softmax b)

    `towards` = "guide" is D as said, "tuned" exchanges its arguments, as before the last commit. D is averaged over the
    pictures of a batch, or summed as released, and in D(z(x), .) the clean side is a constant if `detached`. As
    released, cosines have `temperature` 1 and pictures another `normalisation` (which is always the CLIP's own when
    the model is judged).
    """

    general: float = 1.0
    clean: float = 1.0
    towards: str = "guide"
    reduction: str = "mean"
    detached: bool = False
    temperature: float | None = None
    normalisation: str = "clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("general", self.general, 0)
        check_range("clean", self.clean, 0)
        check_choice("towards", self.towards, ("guide", "tuned"))
        check_choice("reduction", self.reduction, ("mean", "sum"))
        check_choice("normalisation", self.normalisation, ("clip", "imagenet"))
        if self.temperature is not None:
            check_range("temperature", self.temperature, 1e-3)

    def shown(self, clip: Clip, images: Tensor) -> Tensor:
        """The pictures, their colours moved so that the CLIP's normalisation makes the other one of them."""
        if self.normalisation == "clip":
            return images
        mean, deviation = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in IMAGENET)
        return (images - mean) / deviation * clip.std + clip.mean

    def loss(self, batch: Batch) -> Tensor:
        """All three terms; one of weight 0 costs nothing."""
        attacked = batch.logits(batch.features(batch.attacked_images), batch.class_texts)
        total = F.cross_entropy(attacked, batch.labels)
        if self.general:
            with torch.no_grad():
                guide = batch.before.logits(batch.before.features(batch.attacked_images), batch.before.class_texts)
            total = total + self.general * self._apart(guide, attacked)
        if self.clean:
            clean = batch.logits(batch.features(batch.images), batch.class_texts)
            total = total + self.clean * self._apart(clean.detach() if self.detached else clean, attacked)
        return total

    def _apart(self, other: Tensor, attacked: Tensor) -> Tensor:
        pair = (other, attacked) if self.towards == "guide" else (attacked, other)
        rows = divergence(*pair)
        return rows.mean() if self.reduction == "mean" else rows.sum()

    def passes(self) -> tuple[int, int]:
        """The guide's and the clean pictures' besides TeCoA's."""
        forward, backward = super().passes()
        clean = bool(self.clean)
        return forward + bool(self.general) + clean, backward + (clean and not self.detached)


@component
class TGAZSR(TeCoA):
    """Text-guided attention (Yu et al., 2024): A(x) = f_places(x) g(t_y), how far each place fits the true text.

    CE(x', y) + attacked |A(x') - A_0(x)|_2 + clean |A(x) - A_0(x)|_2, means over the pictures, A_0 of the guide

    Maps are brought to [0, 1] picture by picture and resized to `side` x `side`, on which the size of the terms
    depends. The features of places have unit length over their "channels", or over the "places" as released.
    `distance` = "l1" is the mean absolute difference, "cosine" one minus the cosine.
    """

    attacked: float = 0.08
    clean: float = 0.05
    distance: str = "l2"
    unit: str = "channels"
    side: int = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("attacked", self.attacked, 0)
        check_range("clean", self.clean, 0)
        check_choice("distance", self.distance, ("l2", "l1", "cosine"))
        check_choice("unit", self.unit, ("channels", "places"))

    def attention(self, clip: Clip, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features (n, d), and the maps (n, side * side) of one text (n, d) per picture."""
        raw, places = map(gather, places_of(clip, images))
        maps = (F.normalize(places, dim=2 if self.unit == "channels" else 1) @ texts[:, :, None])[..., 0]
        low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
        maps = (maps - low) / (high - low).clamp(min=TINY)
        across = round(maps.shape[1] ** 0.5)
        whole = F.interpolate(maps.view(-1, 1, across, across), size=(self.side,) * 2, mode="bilinear")
        return F.normalize(raw, dim=1), whole.flatten(1)

    def apart(self, one: Tensor, two: Tensor) -> Tensor:
        """The distance of two sets of maps, averaged over the pictures."""
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(one, two, dim=1).mean()
        return (one - two).norm(dim=1).mean() if self.distance == "l2" else (one - two).abs().mean()

    def loss(self, batch: Batch) -> Tensor:
        """All three terms."""
        texts = batch.class_texts[batch.labels]
        features, attacked = self.attention(batch.clip, batch.attacked_images, texts)
        total = F.cross_entropy(batch.logits(features, batch.class_texts), batch.labels)
        with torch.no_grad():
            guide = self.attention(batch.original, batch.images, texts)[1]
        total = total + self.attacked * self.apart(attacked, guide)
        if self.clean:
            total = total + self.clean * self.apart(self.attention(batch.clip, batch.images, texts)[1], guide)
        return total

    def passes(self) -> tuple[int, int]:
        """The guide's and the clean pictures' besides TeCoA's."""
        forward, backward = super().passes()
        return forward + 1 + bool(self.clean), backward + bool(self.clean)


def places_of(clip: Clip, images: Tensor) -> tuple[Tensor, Tensor]:
    """Raw features (n, d), and those of the places of each picture (n, places, d), in the same space.

    Small residual towers end in a single place. Then the last stage runs again without its stride, so that each place
    that reaches it has a feature.
    """
    visual, seen = clip.network.visual, []
    if not hasattr(visual, "layer4"):
        return clip.raw_and_tokens(images)
    with visual.layer4.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        raw, places = clip.raw_and_tokens(images)
    if places.shape[1] > 1:
        return raw, places
    for block in visual.layer4:
        seen.append(_without_stride(block, seen[-1]))
    pool = visual.attnpool
    return raw, pool.c_proj(pool.v_proj(seen[-1].flatten(2).mT + pool.positional_embedding[1:])).float()


def _without_stride(block: nn.Module, points: Tensor) -> Tensor:
    """A bottleneck of open_clip's residual towers without its pooling."""
    found = block.act1(block.bn1(block.conv1(points)))
    found = block.act2(block.bn2(block.conv2(found)))
    shortcut = points if block.downsample is None else block.downsample[1:](points)
    return block.act3(block.bn3(block.conv3(found)) + shortcut)


@component
class FARE(Recipe):
    """Unsupervised (Schlarmann et al., 2024): min over theta of max over x' of |phi(x') - phi_0(x)|_2^2.

    phi are features before they are scaled to unit length. `distance` = "l1" is the sum of absolute differences, which
    its ablation found to be as good; the attack climbs the square in both cases. `clean` weighs the same for x.
    """

    attack: InnerAttack = InnerAttack(objective="embeddings", momentum=0.9)
    distance: str = "l2"
    clean: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("distance", self.distance, ("l2", "l1"))
        check_range("clean", self.clean, 0)

    def apart(self, one: Tensor, two: Tensor) -> Tensor:
        """The distance of two sets of features, averaged over the pictures."""
        power = 2 if self.distance == "l2" else 1
        return (one - two).abs().pow(power).sum(1).mean()

    def loss(self, batch: Batch) -> Tensor:
        """The distance of attacked pictures, and of clean ones if they count."""
        with torch.no_grad():
            goal = batch.before.raw(batch.images)
        total = self.apart(batch.raw(batch.attacked_images), goal)
        return total + self.clean * self.apart(batch.raw(batch.images), goal) if self.clean else total

    def passes(self) -> tuple[int, int]:
        """The guide's, and the clean pictures' if they count."""
        forward, backward = super().passes()
        return forward + 1 + bool(self.clean), backward + bool(self.clean)
