"""Views of an image: what a defense looks at besides the image itself, differentiable down to the pixels.

Also here are the defenses that average views and do nothing else.
"""

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.checks import check_choice, check_integer, check_pixels, check_range
from robustclip.component import component
from robustclip.defenses.base import Classifier, Defense, features_of, undefended

RATIOS = (3 / 4, 4 / 3)  # of width to height of a random crop
TOGETHER = 128  # images in one pass: between its layers more of them do not fit the cache of a processor


def flipped(images: Tensor) -> Tensor:
    """Mirror images, left and right exchanged."""
    return images.flip(-1)


def resized_crops(images: Tensor, numbers: Tensor, area: tuple[float, float], flip: bool = True) -> Tensor:
    """One random part of each image, of a share of its area in `area`, brought back to the image's size.

    `numbers` (n, 5), uniform in [-1, 1], say how large, how wide, where, and whether mirrored. Sampling is bicubic,
    without antialiasing: a product with one matrix for the rows and one for the columns, so that it is fast and exact
    in its gradient.
    """
    share, shape, across, down, mirror = ((numbers.float() + 1) / 2).unbind(1)
    low, high = (math.log(ratio) for ratio in RATIOS)
    ratio = torch.exp(low + (high - low) * shape)
    part = area[0] + (area[1] - area[0]) * share
    width, height = (part * ratio).sqrt().clamp(max=1), (part / ratio).sqrt().clamp(max=1)
    rows = cubic_weights((1 - height) * down, height, images.shape[-2])
    columns = cubic_weights((1 - width) * across, width, images.shape[-1])
    if flip:
        columns = torch.where(mirror.to(columns)[:, None, None] < 0.5, columns.flip(1), columns)
    return resampled(images, rows, columns).clamp(0, 1)


def cubic_weights(first: Tensor, length: Tensor, side: int) -> Tensor:
    """(n, side, side) weights that stretch the part [first, first + length) of a line of `side` pixels to all of it.

    Output i takes the place p_i = side (first + length (i + 1/2) / side) - 1/2 by Keys' cubic kernel with a = -3/4,
    from the four pixels around it; beyond the ends the last pixel goes on.
    """
    places = side * first[:, None] + length[:, None] * (torch.arange(side, device=first.device) + 0.5) - 0.5
    below = places.floor()
    distances = (places - below)[..., None] + torch.tensor([1, 0, -1, -2], device=first.device)
    near, far = distances.abs()[..., 1:3], distances.abs()[..., ::3]
    near = (1.25 * near - 2.25) * near**2 + 1
    far = ((-0.75 * far + 3.75) * far - 6) * far + 3
    taps = torch.stack([far[..., 0], near[..., 0], near[..., 1], far[..., 1]], 2)
    pixels = (below[..., None].long() + torch.arange(-1, 3, device=first.device)).clamp(0, side - 1)
    return torch.zeros(*places.shape, side, device=first.device).scatter_add_(2, pixels, taps)


def shifted(images: Tensor, numbers: Tensor, pad: int) -> Tensor:
    """Each image moved by up to `pad` pixels, as a crop of the image in a frame of zeros; `numbers` (n, 2)."""
    moves = ((numbers.float() + 1) / 2 * (2 * pad + 1)).floor().clamp(max=2 * pad) - pad
    weights = []
    for move, side in zip(moves.unbind(1), images.shape[-2:], strict=True):
        steps = torch.arange(side, device=images.device)
        weights.append((steps[:, None] + move.to(images.device)[:, None, None] == steps).float())
    return resampled(images, *weights)


def resampled(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows X columns^T for each channel, weights (n, h, h) and (n, w, w)."""
    n, channels, height, width = images.shape
    wide = torch.bmm(images.reshape(n, channels * height, width), columns.to(images).mT).view(images.shape)
    tall = torch.bmm(rows.to(images), wide.transpose(1, 2).reshape(n, height, channels * width))
    return tall.view(n, height, channels, width).transpose(1, 2)


def each_view(see: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> Tensor:
    """What `see` makes of several views of n images, (views, n, ...); a processor sees some of them at a time."""
    together = torch.cat(tuple(views))
    size = TOGETHER if together.device.type == "cpu" else max(1, len(together))
    return torch.cat([see(part) for part in together.split(size)]).unflatten(0, (len(views), -1))


def entropy(logs: Tensor) -> Tensor:
    """H = -sum_c p_c log p_c over the last axis, from log probabilities."""
    return -(logs.exp() * logs).sum(-1)


@component
class FromViews(Defense):
    """A defense that looks at the image and at `count` - 1 random crops of it, of a share of its area in `area`."""

    count: int = 64
    area: tuple[float, float] = (0.08, 1.0)
    seed: int = 0
    randomised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", tuple(self.area))
        check_integer("count", self.count, 1)
        for end in self.area:
            check_range("area", end, 0, 1)
        if len(self.area) != 2 or self.area[0] > self.area[1]:
            raise ValueError(
                f"area={self.area!r} is not allowed; give the smallest and the largest share, like (0.08, 1)"
            )

    def seen(self, images: Tensor, draw: int) -> list[Tensor]:
        """The views, the image first."""
        numbers = self.noise(check_pixels(images), draw, "views", (self.count - 1, 5))
        return [images, *(resized_crops(images, numbers[:, turn], self.area) for turn in range(self.count - 1))]

    def features(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Unit features (views, n, d), differentiable down to the pixels."""
        return each_view(features_of(classifier), self.seen(images, draw))

    def views(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits of each view."""
        return each_view(classifier, self.seen(images, draw))

    def passes(self, classes: int) -> tuple[int, int]:
        """One for each view."""
        return self.count, 0


@component
class Views(FromViews):
    """The mean over views: of their logits, their probabilities or, of zero-shot classifiers, their unit features."""

    average: str = "logits"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("average", self.average, ("logits", "probabilities", "features"))

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The mean over the views."""
        if self.average == "features":
            plain = undefended(classifier)
            mean = F.normalize(self.features(classifier, images, draw).mean(0), dim=-1)
            return plain.clip.logit_scale.float() * mean @ plain.text_features.T
        found = self.views(classifier, images, draw)
        return found.mean(0) if self.average == "logits" else found.log_softmax(2).logsumexp(0) - math.log(len(found))


@component
class TTE(Views):
    """Test-time transformation ensembling (Perez et al., 2021): an image, crops of it in a frame, mirror images of all.

    s(x) + s(flip x) + sum_c s(c x) + sum_c s(flip c x), divided by their number; a crop is moved by up to `pad` of the
    side. `released` repeats a slip of the published code: all crops are the last one.
    """

    count: int = 4
    pad: float = 1 / 8
    released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("pad", self.pad, 0, 1)

    def seen(self, images: Tensor, draw: int) -> list[Tensor]:
        """The image, its crops, and the mirror images of all."""
        numbers = self.noise(images, draw, "crops", (self.count, 2))
        turns = [self.count - 1] * self.count if self.released else range(self.count)
        crops = [shifted(images, numbers[:, turn], round(self.pad * images.shape[-1])) for turn in turns]
        return [images, flipped(images), *crops, *map(flipped, crops)]

    def passes(self, classes: int) -> tuple[int, int]:
        """One for each view."""
        return 2 + 2 * self.count, 0


@component
class Mirrored(Views):
    """The mean over the image and its mirror image: two passes, nothing random."""

    count: int = 2
    randomised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("count", self.count, 2, 2)

    def seen(self, images: Tensor, draw: int) -> list[Tensor]:
        """The image and its mirror image."""
        return [images, flipped(images)]
