"""Randomised smoothing (Cohen, Rosenfeld and Kolter, 2019): the class that most noisy copies get, and what is proved.

g(x) = argmax_c P(f(x + sigma xi) = c), xi standard normal

chosen = votes(classifier, images, sigma, 100, part="select"), votes(classifier, images, sigma, 1000)
classes, radii = certify(*chosen, sigma)       # within its radius, in L2 over pixels, g is the same
Smoothing(deviation=sigma)(classifier)         # what a few copies say of g, as a defense; nothing is proved of it
"""

import math
import zlib
from typing import ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from robustclip.checks import check_integer, check_pixels, check_range
from robustclip.component import component
from robustclip.defenses.base import Classifier, Defense
from robustclip.defenses.views import TOGETHER, each_view
from robustclip.randomness import draw_seed, normal

ABSTAINS = -1  # in the place of a class


@component
class Smoothing(Defense):
    """The vote of `copies` noisy copies, noise of standard `deviation` in pixels; ties go to the likelier class.

    v_c = #{b : argmax f(x + deviation xi_b) = c}, log p_c = log mean_b softmax f(x + deviation xi_b)_c
    logits = log((v_c + p_c) / (copies + 1)): the share of votes, after one more that p splits

    Copies are not cut to [0, 1]: a cut would be a part of f.
    """

    deviation: float = 8 / 255
    copies: int = 32
    seed: int = 0
    randomised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_range("deviation", self.deviation, 0, 1)
        check_integer("copies", self.copies, 1)

    def views(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Logits (copies, n, classes) of the noisy copies."""
        noise = normal(self.noise(images, draw, "copies", (self.copies, *images.shape[1:]))).transpose(0, 1)
        return each_view(classifier, [*(images + self.deviation * noise)])

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Log of the smoothed share of votes."""
        seen = self.views(classifier, images, draw)
        cast = F.one_hot(seen.argmax(2), seen.shape[2]).sum(0).to(seen)
        return torch.logaddexp(cast.log(), _mean_probability(seen)) - math.log(self.copies + 1)

    def surrogate(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """log p, which has a slope where votes have none (Salman et al., 2019)."""
        return _mean_probability(self.views(classifier, images, draw))

    def passes(self, classes: int) -> tuple[int, int]:
        """One for each copy."""
        return self.copies, 0


def _mean_probability(seen: Tensor) -> Tensor:
    """log mean_b softmax, (n, classes), of logits (copies, n, classes)."""
    return seen.log_softmax(2).logsumexp(0) - math.log(len(seen))


@torch.no_grad()
def votes(
    classifier: Classifier, images: Tensor, deviation: float, copies: int, seed: int = 0, part: str = "estimate"
) -> np.ndarray:
    """How many noisy copies of each image get each class, (n, classes); each seed and part has noise of its own."""
    check_range("deviation", deviation, 0, 1)
    check_integer("copies", copies, 1)
    return np.stack([_cast(classifier, image, deviation, copies, seed, part) for image in check_pixels(images)])


def _cast(classifier: Classifier, image: Tensor, deviation: float, copies: int, *parts: int | str) -> np.ndarray:
    """The votes (classes,) on one image, some copies at a time."""
    own = zlib.crc32(image.detach().float().cpu().contiguous().numpy().tobytes())
    random, total = torch.Generator().manual_seed(draw_seed(own, *parts)), 0
    for first in range(0, copies, TOGETHER):
        noise = torch.randn(min(TOGETHER, copies - first), *image.shape, generator=random)
        answers = classifier(image + deviation * noise.to(image))
        total = total + torch.bincount(answers.argmax(1), minlength=answers.shape[1])
    return total.cpu().numpy()


def lower_bound(successes: np.ndarray, trials: np.ndarray, alpha: float = 0.001) -> np.ndarray:
    """Clopper and Pearson: the p with P(Binomial(trials, p) >= successes) = alpha, and 0 without any success."""
    check_range("alpha", alpha, 0, 0.5)
    found = stats.beta.ppf(alpha, np.maximum(successes, 1), np.subtract(trials, successes) + 1)
    return np.where(np.equal(successes, 0), 0.0, found)


def certify(
    counts_select: np.ndarray, counts_estimate: np.ndarray, deviation: float, alpha: float = 0.001
) -> tuple[np.ndarray, np.ndarray]:
    """The class of g at each image, or ABSTAINS, and the L2 radius in which it stays, from votes (n, classes).

    c = argmax of the first votes, p = lower bound of its share of the second, radius = deviation Phi^-1(p) if p > 1/2.
    Each image's statement is wrong with a probability of alpha at most.
    """
    check_range("deviation", deviation, 0, 1)
    first, second = np.asarray(counts_select), np.asarray(counts_estimate)
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(f"counts must be (n, classes) twice, got {first.shape} and {second.shape}; ask `votes`")
    chosen = first.argmax(1)
    share = lower_bound(second[np.arange(len(second)), chosen], second.sum(1), alpha)
    radii = deviation * stats.norm.ppf(np.maximum(share, 0.5))
    return np.where(share > 0.5, chosen, ABSTAINS), radii


def decide(counts: np.ndarray, alpha: float = 0.001) -> np.ndarray:
    """The class of g at each image without a radius, or ABSTAINS, from votes (n, classes): Cohen's PREDICT.

    The class of most votes a, if they would hardly win over the next b by chance: P(Binomial(a + b, 1/2) as far from
    (a + b) / 2) <= alpha. It is another class than g's with a probability of alpha at most.
    """
    check_range("alpha", alpha, 0, 0.5)
    after, most = np.sort(counts, 1)[:, -2:].T
    chance = 2 * stats.binom.sf(most - 1, most + after, 0.5)  # above 1 for a tie
    return np.where(chance <= alpha, np.argmax(counts, 1), ABSTAINS)
