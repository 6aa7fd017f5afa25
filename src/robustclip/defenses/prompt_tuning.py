"""Prompts tuned for each image at test time, by the views of it that are most confident.

TPT     those views are made to agree, and the image is classified with the new prompts (Shu et al., 2022)
RTPT    each of those views is made sure of itself, and views that look like others have the say (Sheng et al., 2025)

What is tuned are the first words of the prompts: a move of their embeddings that all classes share. For each image it
starts at zero, at the classifier's own prompts, whatever their template. The weights of the CLIP stay as they are.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from robustclip.checks import check_integer, check_range
from robustclip.component import component
from robustclip.defenses.base import Classifier, features_of, undefended
from robustclip.defenses.views import FromViews, each_view, entropy
from robustclip.models import Clip, ZeroShotClassifier

TEXTS_AT_ONCE = 128


# --- prompts whose words are moved ------------------------------------------------------------------------------------


def word_embedding(clip: Clip) -> nn.Module:
    """The part of a text tower that embeds words; a ValueError for towers that keep it elsewhere."""
    found = getattr(clip.network, "token_embedding", None)
    if found is None:
        kind = type(clip.network).__name__
        raise ValueError(f"a {kind} has no token_embedding whose words could be tuned; give a plain CLIP, or steps=0")
    return found


def encode_moved(clip: Clip, texts: Sequence[str], moves: Tensor) -> Tensor:
    """Unit features (k, d) of k texts whose embeddings after the start token are moved by (k, vectors, width)."""

    def moved(_: nn.Module, __: tuple, embedded: Tensor) -> Tensor:
        start, words, rest = embedded.tensor_split((1, 1 + moves.shape[1]), 1)
        return torch.cat([start, words + moves.to(embedded), rest], 1)

    with word_embedding(clip).register_forward_hook(moved):
        return clip.encode_texts(texts)


def _parts(prompts: Sequence[str], images: int) -> Iterator[tuple[slice, list[str], Tensor]]:
    """The prompts of one image after the other, few at a time: where they stand, their texts, and whose they are."""
    for places in torch.arange(images * len(prompts)).split(TEXTS_AT_ONCE):
        texts = [prompts[place % len(prompts)] for place in places.tolist()]
        yield slice(places[0], places[-1] + 1), texts, places // len(prompts)


@torch.no_grad()
def moved_features(clip: Clip, prompts: Sequence[str], moves: Tensor) -> Tensor:
    """Unit features (n, classes, d) of all prompts, for each of (n, vectors, width) moves."""
    parts = [encode_moved(clip, texts, moves[owners]) for _, texts, owners in _parts(prompts, len(moves))]
    return torch.cat(parts).unflatten(0, (len(moves), len(prompts)))


def pulled_back(clip: Clip, prompts: Sequence[str], moves: Tensor, slopes: Tensor) -> Tensor:
    """From slopes (n, classes, d) of losses with respect to `moved_features` to slopes with respect to the moves."""
    found, slopes = torch.zeros_like(moves), slopes.flatten(0, 1)
    for rows, texts, owners in _parts(prompts, len(moves)):
        own = moves[owners].detach().requires_grad_()
        with torch.enable_grad():
            features = encode_moved(clip, texts, own)
        found.index_add_(0, owners.to(found.device), torch.autograd.grad(features, own, slopes[rows])[0])
    return found


def first_slopes(clip: Clip, prompts: Sequence[str], vectors: int) -> Tensor:
    """The Jacobian (classes, d, vectors, width) of the prompts' features at no move, kept until a weight changes.

    All images start there, so that the first slope of any of them is a product with this one.
    """

    def slopes(texts: list[str]) -> Tensor:
        shape = (len(texts), vectors, word_embedding(clip).embedding_dim)
        moves = torch.zeros(shape, device=clip.device, requires_grad=True)
        with torch.enable_grad():
            axes = encode_moved(clip, texts, moves).sum(0).unbind()
        return torch.stack([torch.autograd.grad(axis, moves, retain_graph=True)[0] for axis in axes], 1)

    check_integer("vectors", vectors, 1, clip.tokenizer.context_length - 1)
    key = ("first slopes", tuple(prompts), vectors)
    return clip.remembered(key, lambda: torch.cat([slopes(texts) for _, texts, _ in _parts(prompts, 1)]))


# --- the defenses -----------------------------------------------------------------------------------------------------


@component
class PromptTuning(FromViews):
    """What TPT and RTPT share: the tuning of prompts by `steps` of AdamW down a loss of the most confident views.

    The `confident` share of the views are those of lowest entropy under the first prompts. The moves of `vectors` words
    are one parameter of an image, with AdamW's defaults but for the step size. One step from zero is +-`step_size` in
    each coordinate, with the sign of its slope, so that its derivative is nothing: gradients hold the prompts constant.
    """

    vectors: int = 4
    steps: int = 1
    step_size: float = 5e-3
    confident: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("count", self.count, 2)
        check_integer("vectors", self.vectors, 1)
        check_integer("steps", self.steps, 0)
        check_range("step_size", self.step_size, 0)
        check_range("confident", self.confident, 0, 1)

    @abstractmethod
    def loss(self, logits: Tensor) -> Tensor:
        """What is minimised, (n,), of the logits (kept, n, classes) of the confident views."""

    def confident_views(self, plain: ZeroShotClassifier, features: Tensor) -> Tensor:
        """The features (kept, n, d) of the views (views, n, d) that are surest of themselves, one view at least."""
        logits = plain.clip.logit_scale.float() * features @ plain.text_features.T
        kept = max(1, int(self.confident * self.count))
        chosen = entropy(logits.double().log_softmax(2)).topk(kept, dim=0, largest=False).indices
        return features.gather(0, chosen[..., None].expand(-1, -1, features.shape[2]))

    def tuned(self, plain: ZeroShotClassifier, features: Tensor) -> Tensor:
        """Text features (n, classes, d) of the prompts tuned for each image, without a graph.

        Text features that no prompts have, such as the axes of feature space, are left as they are.
        """
        clip, prompts, texts = plain.clip, plain.prompts, plain.text_features.expand(features.shape[1], -1, -1)
        if not self.steps or not torch.equal(plain.text_features, clip.text_features(prompts)):
            return texts
        kept = self.confident_views(plain, features.detach())
        jacobian = first_slopes(clip, prompts, self.vectors)
        moves = jacobian.new_zeros(len(texts), *jacobian.shape[2:])
        optimizer = torch.optim.AdamW([moves], lr=self.step_size)
        for step in range(self.steps):
            slopes = self._slopes(clip, kept, texts)
            first = torch.einsum("nkd,kdvw->nvw", slopes, jacobian) if step == 0 else None
            moves.grad = pulled_back(clip, prompts, moves, slopes) if first is None else first
            optimizer.step()
            texts = moved_features(clip, prompts, moves)
        return texts

    def _slopes(self, clip: Clip, kept: Tensor, texts: Tensor) -> Tensor:
        """Slopes of the losses with respect to the text features (n, classes, d) of each image."""
        with torch.enable_grad():
            texts = texts.detach().requires_grad_()
            loss = self.loss(answers(clip, kept, texts).double()).sum()
        return torch.autograd.grad(loss, texts)[0]


def answers(clip: Clip, features: Tensor, texts: Tensor) -> Tensor:
    """Logits (views, n, classes) of views (views, n, d), with text features (n, classes, d) of each image."""
    return clip.logit_scale.float() * torch.einsum("vnd,nkd->vnk", features, texts)


@component
class TPT(PromptTuning):
    """Test-time prompt tuning: minimise H(1/|S| sum_{i in S} p_i) for the confident views S; answer the image itself.

    It was made for images that are hard, not for attacked ones.
    """

    def loss(self, logits: Tensor) -> Tensor:
        """The entropy of the mean probabilities."""
        return entropy(logits.log_softmax(2).logsumexp(0) - math.log(len(logits)))

    def features(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Unit features (views, n, d): gradients pass through those of the image, as others only choose the prompts."""
        encode, (image, *crops) = features_of(classifier), self.seen(images, draw)
        with torch.no_grad():
            others = each_view(encode, crops)
        return torch.cat([encode(image)[None], others])

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """What the tuned prompts say of the image."""
        plain, features = undefended(classifier), self.features(classifier, images, draw)
        return answers(plain.clip, features[:1], self.tuned(plain, features))[0]


@component
class RTPT(PromptTuning):
    """R-TPT: minimise 1/|S| sum_{i in S} H(p_i) for the confident views S; answer sum_i w_i s_i over all views.

    w = softmax(r / temperature), r_i the mean of the `neighbours` largest cosines of view i to other views. With
    `truncate` the image is first cut to 8 bits, downwards, as the released code does before it makes the views: that
    takes up to 1/255 from an attack. Gradients pass as if it had not been.
    """

    neighbours: int = 20
    temperature: float = 0.01
    truncate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("neighbours", self.neighbours, 1)
        check_range("temperature", self.temperature, 1e-6)

    def loss(self, logits: Tensor) -> Tensor:
        """The mean of the entropies."""
        return entropy(logits.log_softmax(2)).mean(0)

    def seen(self, images: Tensor, draw: int) -> list[Tensor]:
        """The views, the image first."""
        return super().seen(truncated(images) if self.truncate else images, draw)

    def reliability(self, features: Tensor) -> Tensor:
        """w (views, n) of features (views, n, d): the more, the closer other views are."""
        features = features.transpose(0, 1)
        itself = torch.eye(self.count, dtype=torch.bool, device=features.device)
        cosines = (features @ features.mT).masked_fill(itself, -torch.inf)
        closest = cosines.topk(min(self.neighbours, self.count - 1)).values.mean(2)
        return (closest / self.temperature).softmax(1).T

    def views(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits of each view under the tuned prompts."""
        return self._answer(classifier, images, draw)[0]

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The views' logits under the tuned prompts, weighted by their reliability."""
        logits, features = self._answer(classifier, images, draw)
        return (self.reliability(features)[..., None] * logits).sum(0)

    def _answer(self, classifier: Classifier, images: Tensor, draw: int) -> tuple[Tensor, Tensor]:
        plain, features = undefended(classifier), self.features(classifier, images, draw)
        return answers(plain.clip, features, self.tuned(plain, features)), features


def truncated(images: Tensor) -> Tensor:
    """Images cut to 8 bits, downwards; their gradient is that of the images."""
    return (images.detach() * 255).floor() / 255 + (images - images.detach())
