"""MTA: the mode of an image's views in feature space, found by mean shift, instead of their mean."""

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.checks import check_integer, check_range
from robustclip.component import component
from robustclip.defenses.base import Classifier, undefended
from robustclip.defenses.views import FromViews


@component
class MTA(FromViews):
    """Mean shift over views (Zanella and Ben Ayed, 2024): answers s m T for the mode m of the views' features f_p.

    Weights y of the views and the mode take turns to maximise, over y on the simplex,

        sum_p y_p K_p(m) + lambda / 2 sum_pq w_pq y_p y_q + lambda_y H(y),   K_p(m) = exp(-|f_p - m|^2 / 2 h_p^2),

    where w_pq is the inner product of the class probabilities of two views. The mode starts at the image, and the width
    h_p is the views' own: h_p^2 is half the mean squared distance of f_p to the `nearest` share of the other views.
    `rounds` counts the turns, and the updates of one kind within a turn. All of it is differentiable.
    """

    agreement: float = 4.0
    spread: float = 0.2
    nearest: float = 0.3
    rounds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("count", self.count, 2)
        check_range("agreement", self.agreement, 0)
        check_range("spread", self.spread, 1e-6)
        check_range("nearest", self.nearest, 0, 1)
        check_integer("rounds", self.rounds, 0)

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What the text features say of the mode."""
        plain = undefended(classifier)
        scale, features = plain.clip.logit_scale.float(), self.features(classifier, images, draw).transpose(0, 1)
        probabilities = (scale * features @ plain.text_features.T).softmax(2)
        return scale * self.mode(features, probabilities @ probabilities.mT) @ plain.text_features.T

    def mode(self, features: Tensor, affinity: Tensor) -> Tensor:
        """The unit mode (n, d) of features (n, views, d) that agree as (n, views, views) says."""
        mode, weights = features[:, 0], torch.full_like(features[..., 0], 1 / self.count)
        width = self.squared_width(features)
        for _ in range(self.rounds):
            near = kernel(features, mode, width)
            for _ in range(self.rounds):
                weights = self.weighed(near, affinity, weights)
            for _ in range(self.rounds):
                mode = shifted_mode(features, weights * kernel(features, mode, width))
        return mode

    def squared_width(self, features: Tensor) -> Tensor:
        """h_p^2 (n, views) of unit features (n, views, d); never zero, also where all views are alike."""
        others = max(1, int(self.nearest * (self.count - 1)))
        itself = torch.eye(self.count, dtype=torch.bool, device=features.device)
        squares = (2 - 2 * features @ features.mT).masked_fill(itself, torch.inf)
        return squares.topk(others, largest=False).values.mean(2).clamp(min=1e-6) / 2

    def weighed(self, near: Tensor, affinity: Tensor, weights: Tensor) -> Tensor:
        """y_p proportional to exp((K_p(m) + lambda sum_q w_pq y_q) / lambda_y)."""
        agreed = (affinity @ weights[..., None])[..., 0]
        return ((near + self.agreement * agreed) / self.spread).softmax(1)


def kernel(features: Tensor, mode: Tensor, squared_width: Tensor) -> Tensor:
    """K_p(m) = exp(-|f_p - m|^2 / 2 h_p^2), (n, views), of features (n, views, d) and a mode (n, d)."""
    return torch.exp((features - mode[:, None]).square().sum(2) / (-2 * squared_width))


def shifted_mode(features: Tensor, weights: Tensor) -> Tensor:
    """m = sum_p y_p K_p f_p / sum_p y_p K_p, brought to unit length, which makes the division needless."""
    return F.normalize((weights[..., None] * features).sum(1), dim=1)
