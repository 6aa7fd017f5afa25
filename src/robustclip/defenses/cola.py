"""COLA (Zhu et al., 2025): views of the image against texts of each class, in the subspace of the texts, by transport.

No code was to be had; what its paper leaves open is a field here, and so is every part that can be left out.

    COLA()                                            as described
    COLA(projection="off")                            transport alone
    COLA(projection="random")                         a random subspace of the same dimension
    COLA(solver="independent")                        weighted means in place of transport
    COLA(projection="off", solver="independent", view_weights="uniform", text_weights="uniform")   plain means
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component, digest_of
from robustclip.data.describing import LEXICONS, class_texts
from robustclip.defenses.base import Classifier, Defense, undefended
from robustclip.defenses.transport import exact, independent, sinkhorn
from robustclip.defenses.views import Views, entropy
from robustclip.models import ZeroShotClassifier

SOLVERS = ("sinkhorn", "exact", "independent")
TOGETHER = 2**23  # entries of the cost that are held at once


@component
class COLA(Defense):
    """argmin_y d_y with d_y = min_T <T, C_y>, T 1 = a, T^T 1 = b_y, over the views x_n and the texts z_y^m of class y.

    C_y(n, m) = 1 - cos(Pi x_n, z_y^m), Pi = U_C U_C^T from the first `dimensions` left singular vectors of all texts
    (0: half the width of the features; without centring unless `centred`)
    a = softmax(-h / tau) over the views, h the entropy of softmax(s <x_n, mean_m z_y^m>); "printed": softmax(+h)
    b_y = softmax(-h / tau') over the texts, h the entropy when the image's own logit of class y is that of text m

    The logits are -s d_y, s the CLIP's logit scale. `texts` per class come from `data.describing`, in the words of a
    `lexicon`. The plan counts as a constant in the gradient, which by the envelope theorem is right for the cost; what
    the weights contribute through the plan is left out, and `smooth` has it.
    """

    crops: Views = Views(count=5)
    texts: int = 50
    lexicon: str = "wordnet"
    dimensions: int = 0
    projection: str = "texts"
    centred: bool = False
    solver: str = "sinkhorn"
    smoothing: float = 0.1
    sweeps: int = 10
    view_weights: str = "confident"
    view_temperature: float = 1.0
    text_weights: str = "confident"
    text_temperature: float = 0.5
    seed: int = 0
    randomised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer("texts", self.texts, 1)
        check_integer("dimensions", self.dimensions, 0)
        check_integer("sweeps", self.sweeps, 1)
        check_choice("lexicon", self.lexicon, LEXICONS)
        check_choice("projection", self.projection, ("texts", "random", "off"))
        check_choice("solver", self.solver, SOLVERS)
        check_choice("view_weights", self.view_weights, ("confident", "printed", "uniform"))
        check_choice("text_weights", self.text_weights, ("confident", "uniform"))
        for name in ("smoothing", "view_temperature", "text_temperature"):
            check_range(name, getattr(self, name), 1e-6)

    # --- what is made once per set of classes

    def text_features(self, plain: ZeroShotClassifier) -> Tensor:
        """z (classes, texts, d), unit rows: the prompt, its descriptions, and what `data.describing` adds."""
        if not torch.equal(plain.text_features, plain.clip.text_features(plain.prompts)):  # no prompts made them
            return plain.text_features[:, None].expand(-1, self.texts, -1)
        classes, told = plain.classes, plain.classes.descriptions or [()] * len(plain.classes)
        rows = zip(classes.names, classes.prompts, told, strict=True)
        texts = [text for row in rows for text in class_texts(*row[:2], self.texts, row[2], self.lexicon)]
        return plain.clip.text_features(texts).view(len(classes), self.texts, -1)

    def basis(self, plain: ZeroShotClassifier) -> Tensor | None:
        """U_C (d, C) with orthonormal columns; None without a projection."""
        texts = self.text_features(plain).flatten(0, 1)
        kept = self.dimensions or texts.shape[1] // 2
        if self.projection == "off":
            return None
        if self.projection == "random":
            numbers = torch.randn(texts.shape[1], kept, generator=torch.Generator().manual_seed(self.seed))
            return torch.linalg.qr(numbers)[0].to(texts)
        name = ("COLA", kept, self.centred, digest_of(texts))
        return plain.clip.remembered(name, lambda: subspace(texts, kept, self.centred))

    # --- per image

    def features(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """x (n, views, d), unit rows, the image itself first."""
        return self.crops.features(classifier, images, draw).transpose(0, 1)

    def weights_of_views(self, features: Tensor, means: Tensor, scale: Tensor) -> Tensor:
        """a (n, views)."""
        if self.view_weights == "uniform":
            return torch.full_like(features[..., 0], 1 / features.shape[1])
        sign = 1 if self.view_weights == "printed" else -1
        return (sign * entropy((scale * features @ means.T).log_softmax(-1)) / self.view_temperature).softmax(1)

    def weights_of_texts(self, image: Tensor, texts: Tensor, means: Tensor, scale: Tensor, rows: slice) -> Tensor:
        """b (n, classes in `rows`, texts) from the feature (n, d) of the image itself.

        With z the logits of the class means and Z = sum exp z, S = sum z exp z: replacing z_y by l changes both by one
        term, so the entropy log Z' - S' / Z' of all replacements costs no more than looking at each.
        """
        if self.text_weights == "uniform":
            return torch.full((len(image), *texts[rows].shape[:2]), 1 / self.texts).to(image)
        logits = (scale * image @ means.T).double()
        own = (scale * torch.einsum("nd,kmd->nkm", image, texts[rows])).double()
        top = torch.maximum(logits.amax(1), own.amax((1, 2))).detach()
        logits, own = logits - top[:, None], own - top[:, None, None]
        powers = logits.exp()
        total, product = powers.sum(1)[:, None] - powers[:, rows], (powers * logits).sum(1)[:, None]
        product = product - (powers * logits)[:, rows]
        whole = (total.clamp(min=0)[..., None] + own.exp()).clamp(min=1e-300)
        spread = whole.log() - (product[..., None] + own * own.exp()) / whole
        return (-spread / self.text_temperature).softmax(2).float()

    def plan(self, cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """T (n, classes, views, texts) of the solver."""
        if self.solver == "sinkhorn":
            return sinkhorn(cost.detach(), rows.detach(), columns.detach(), self.smoothing, self.sweeps)
        return (exact if self.solver == "exact" else independent)(cost.detach(), rows.detach(), columns.detach())

    def distances(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """d (n, classes)."""
        plain = undefended(classifier)
        texts, basis, scale = self.text_features(plain), self.basis(plain), plain.clip.logit_scale.float()
        features, means = self.features(classifier, images, draw), texts.mean(1)
        a = self.weights_of_views(features, means, scale)
        seen = features if basis is None else F.normalize(features @ basis @ basis.T, dim=2)
        step = max(1, TOGETHER // max(1, len(images) * features.shape[1] * self.texts))
        found = []
        for first in range(0, len(texts), step):
            part = slice(first, first + step)
            b = self.weights_of_texts(features[:, 0], texts, means, scale, part)
            cost = 1 - torch.einsum("nvd,kmd->nkvm", seen, texts[part])
            found.append(self._score(cost, a[:, None], b))
        return torch.cat(found, 1)

    def _score(self, cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """<T, C> (n, classes); of the independent plan with the gradient of its weights."""
        if self.solver == "independent":
            return torch.einsum("nkvm,nkv,nkm->nk", cost, a.expand(-1, cost.shape[1], -1), b)
        return (self.plan(cost, a.expand(-1, cost.shape[1], -1), b) * cost).sum((2, 3))

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """-s d_y."""
        return -undefended(classifier).clip.logit_scale.float() * self.distances(classifier, images, draw)

    def smooth(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The answer of the plan a b^T, through which the weights have a slope."""
        return replace(self, solver="independent").logits(classifier, images, draw)

    @property
    def lacks(self) -> tuple[str, ...]:
        """The independent plan is its own smooth version, and one view is no vote."""
        return ("smooth",) * (self.solver == "independent") + ("views",) * (self.crops.count == 1)

    def views(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits of each view on the mean texts, which is what an attack on all views at once climbs."""
        plain = undefended(classifier)
        means = self.text_features(plain).mean(1)
        return (plain.clip.logit_scale.float() * self.features(classifier, images, draw) @ means.T).transpose(0, 1)

    def passes(self, classes: int) -> tuple[int, int]:
        """One for each view."""
        return self.crops.passes(classes)


def subspace(texts: Tensor, kept: int, centred: bool = False) -> Tensor:
    """The first left singular vectors (d, C) of the texts (m, d) as columns, no more than their rank.

    By the eigenvectors of their d x d product, which is as small for a million texts.
    """
    columns = texts.double()
    columns = columns - columns.mean(0) if centred else columns
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    rank = int((values > values[-1] * 1e-10).sum())
    return vectors.flip(1)[:, : min(kept, rank)].to(texts)
