"""A move towards, and past, the mean feature of noisy copies: what is told of AOM (Tong et al., 2025).

The paper's text was not available: what is here is rebuilt from descriptions, and goes by a name of its own.
"""

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component
from robustclip.defenses.base import Classifier, Defense, features_of, undefended
from robustclip.defenses.views import each_view
from robustclip.randomness import normal


@component
class NoiseAnchor(Defense):
    """One step of the unit feature z towards an anchor a, the mean feature of `copies` noisy images.

    z = n(f(x)), a = n(mean_b n(f(x + deviation xi_b))), xi_b standard normal, n(v) = v / ||v||
    straight   z' = n(z + step (a - z));   sphere   z' = cos(step t) z + sin(step t) e, t the angle, e the tangent to a

    A step of 1 is plain averaging over noise, above 1 it goes past the anchor, away from the image's own feature.
    """

    deviation: float = 8 / 255
    copies: int = 16
    step: float = 2.0
    path: str = "straight"
    clamp: bool = True
    seed: int = 0
    randomised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("deviation", self.deviation, 0, 1)
        check_integer("copies", self.copies, 1)
        check_range("step", self.step, 0)
        check_choice("path", self.path, ("straight", "sphere"))

    def place_and_anchor(self, classifier: Classifier, images: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        """z and a, (n, d) each."""
        encode = features_of(classifier)
        noise = normal(self.noise(images, draw, "copies", (self.copies, *images.shape[1:]))).transpose(0, 1)
        noisy = images + self.deviation * noise
        noisy = noisy.clamp(0, 1) if self.clamp else noisy
        features = each_view(encode, [images, *noisy])
        return features[0], F.normalize(features[1:].mean(0), dim=1)

    def moved(self, place: Tensor, anchor: Tensor) -> Tensor:
        """z' (n, d)."""
        if self.path == "straight":
            return F.normalize(place + self.step * (anchor - place), dim=1)
        cosine = (place * anchor).sum(1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6)
        tangent, turn = F.normalize(anchor - cosine * place, dim=1), self.step * cosine.arccos()
        return F.normalize(turn.cos() * place + turn.sin() * tangent, dim=1)

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Scaled cosines of the moved features to the class prompts."""
        plain = undefended(classifier)
        features = self.moved(*self.place_and_anchor(classifier, images, draw))
        return plain.clip.logit_scale.float() * features @ plain.text_features.T

    def passes(self, classes: int) -> tuple[int, int]:
        """The image and its noisy copies."""
        return 1 + self.copies, 0
