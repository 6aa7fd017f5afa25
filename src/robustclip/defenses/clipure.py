"""CLIPure (Zhang et al., ICLR 2025): the feature of the image is moved to where features are likely, then classified.

CLIPure       likely means close to a blank text (Cos)
CLIPureDiff   likely means easy to denoise for a diffusion prior over features (Diff)

    DESCRIBED(zero_shot(clip, role("cifar10")))    # by the equation, with its exact derivative
    RELEASED(zero_shot(clip, role("cifar10")))     # as the published code runs
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.resources import as_file, files
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component
from robustclip.defenses.base import Classifier, Defense, features_of, undefended
from robustclip.models import Clip
from robustclip.randomness import normal

Slope = Callable[[Tensor, int], Tensor]  # features (n, d), number of the step -> gradient of their log-likelihood
PHRASE = "a photo of a."
PRIORS = {  # whole names of files, as provenance looks for them
    "tinyworld-clip": "assets/tinyworld-clip/prior.safetensors",
    "photo-clip": "assets/photo-clip/prior.safetensors",
}
TIMES = 1000  # of the diffusion; features are noise alone at the end
FREQUENCIES = 16  # by which a prior is told the time


# --- what both variants share -----------------------------------------------------------------------------------------


@component
class Purification(Defense):
    """Gradient ascent of the unit feature u on a log-likelihood; the answer is s <u_K, z_y> for the texts z_y.

    m_k = momentum m_{k-1} + (1 - momentum) g_k / |g_k|, u_{k+1} = (u_k + step_size m_k) / |u_k + step_size m_k|

    `norm` is the length |g_k| of each "image" by itself, or, as released, of all images of a "batch" together: of those
    that come together, or of every `batch` of them, so that an answer depends on the neighbours. `backward` is "exact",
    or "detached" as released: m_k counts as a constant; who knows that unrolls the steps, or takes the gradient of the
    classifier inside (BPDA). `half` passes the feature, and the gradient that returns to the encoder, through float16.
    """

    steps: int = 10
    step_size: float = 30.0
    momentum: float = 0.0
    norm: str = "image"
    batch: int = 0
    backward: str = "exact"
    half: bool = False

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 0)
        check_range("step_size", self.step_size, 0)
        check_range("momentum", self.momentum, 0, 1)
        check_choice("norm", self.norm, ("image", "batch"))
        check_integer("batch", self.batch, 0)
        check_choice("backward", self.backward, ("exact", "detached"))

    @abstractmethod
    def slope(self, clip: Clip, images: Tensor, draw: int) -> Slope:
        """The gradient that the features of these images climb."""

    def logits(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """Scaled cosines of the moved features to the texts."""
        plain, features = undefended(classifier), features_of(classifier)(images)
        if self.half:
            features = F.normalize(features.half().float(), dim=1)
        moved = self.purified(features, self.slope(plain.clip, images, draw))
        return plain.clip.logit_scale.float() * moved @ plain.text_features.T

    def surrogate(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The classifier inside where steps count as constants, else the answer itself, whose derivative is exact."""
        return classifier(images) if self.backward == "detached" else self.logits(classifier, images, draw)

    def smooth(self, classifier: Classifier, images: Tensor, draw: int) -> Tensor:
        """The answer with its exact derivative, which nothing rounds."""
        return replace(self, backward="exact", half=False).logits(classifier, images, draw)

    @property
    def lacks(self) -> tuple[str, ...]:
        """Where the surrogate is exact, nothing is left to be unrolled."""
        return () if self.backward == "detached" or self.half else ("smooth",)

    def purified(self, features: Tensor, slope: Slope) -> Tensor:
        """Unit features (n, d) after all steps."""
        velocity = torch.zeros_like(features)
        for step in range(self.steps):
            gradient = slope(features if self.backward == "exact" else features.detach(), step)
            velocity = self.momentum * velocity + (1 - self.momentum) * gradient / self._lengths(gradient)
            features = F.normalize(features + self.step_size * velocity, dim=1)
        return features

    def _lengths(self, gradient: Tensor) -> Tensor:
        """The norm (n, 1) by which each row is divided."""
        together = 1 if self.norm == "image" else self.batch or len(gradient)
        groups = torch.arange(len(gradient), device=gradient.device) // max(1, together)
        squares = gradient.square().sum(1)
        squares = torch.zeros_like(squares).index_add(0, groups, squares)[groups]
        return squares.clamp(min=1e-24).sqrt()[:, None]


# --- Cos --------------------------------------------------------------------------------------------------------------


def blank_text(clip: Clip, kind: str = "templates") -> Tensor:
    """The direction t (d,) of a photo of nothing in particular; released code keeps a length, which cancels.

    "templates": the mean of the 80 prompts for ImageNet without a class name, as released; "phrase": one, as printed.
    """
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    texts = [template("") for template in OPENAI_IMAGENET_TEMPLATES] if kind == "templates" else [PHRASE]
    return F.normalize(clip.text_features(texts).mean(0), dim=0)


def closed_form(features: Tensor, blank: Tensor, step_size: float, steps: int) -> Tensor:
    """What CLIPure makes of unit features (n, d) without momentum, each with a norm of its own: turns in a plane.

    u_k = (sin(theta - phi_k) u_0 + sin(phi_k) t) / sin(theta), theta the angle from u_0 to the blank text t, phi_0 = 0,
    phi_{k+1} = phi_k + arctan(step_size) sign(theta - phi_k).
    """
    blank = F.normalize(blank, dim=0)
    theta = (features @ blank).arccos()
    phi = torch.zeros_like(theta)
    for _ in range(steps):
        phi = phi + math.atan(step_size) * (theta - phi).sign()
    own, common = ((theta - phi).sin() / theta.sin())[:, None], (phi.sin() / theta.sin())[:, None]
    return own * features + common * blank


@component
class CLIPure(Purification):
    """CLIPure-Cos: log p(u) = cos(u, t), t a `blank` text, whose gradient on the sphere is t - <u, t> u.

    So logits are a <u_0, z_y> + b <t, z_y> with two numbers per image: nothing about its class can be gained.
    """

    blank: str = "templates"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("blank", self.blank, ("templates", "phrase"))

    def slope(self, clip: Clip, images: Tensor, draw: int) -> Slope:
        """The direction to the blank text along the sphere."""
        toward = blank_text(clip, self.blank)
        return lambda features, step: toward - (features @ toward)[:, None] * features


RELEASED = CLIPure(norm="batch", batch=2, backward="detached", half=True)
DESCRIBED = CLIPure(step_size=0.1)  # printed without a number; 0.03 is as plausible


# --- Diff -------------------------------------------------------------------------------------------------------------


class Prior(nn.Module):
    """A small diffusion prior over features x_0 = sqrt(d) u, u of unit length: it guesses x_0 from a noisy x_t.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, a_t = cos^2(pi/2 (t / TIMES + 0.008) / 1.008), t = 0 ... TIMES - 1.
    """

    def __init__(self, size: int, width: int = 192) -> None:
        super().__init__()
        self.size = size
        self.enter, self.leave = nn.Linear(size + 2 * FREQUENCIES, width), nn.Linear(width, size)
        self.middle = nn.Linear(width, width)

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        """Noisy features (n, d) at times (n,) to clean ones."""
        angles = times[:, None] * torch.logspace(0, -4, FREQUENCIES, device=noisy.device)
        hidden = F.silu(self.enter(torch.cat([noisy, angles.sin(), angles.cos()], 1)))
        return self.leave(hidden + F.silu(self.middle(hidden)))

    def loss(self, features: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """|guess - x_0|^2 / d, (n,), of unit features (n, d) at times (n,) with normal noise (n, d)."""
        if features.shape[1] != self.size:
            raise ValueError(f"features of {features.shape[1]} numbers do not fit a prior of {self.size}; give another")
        kept = ((times / TIMES + 0.008) / 1.008 * (math.pi / 2)).cos().square()[:, None]
        clean = math.sqrt(self.size) * features
        return (self(kept.sqrt() * clean + (1 - kept).sqrt() * noise, times) - clean).square().mean(1)


def load_prior(name: str, device: torch.device | str = "cpu") -> Prior:
    """The prior that was trained on features of the embedded CLIP `name`."""
    if name not in PRIORS:
        raise ValueError(
            f"the CLIP {name!r} has no diffusion prior; those of {' and '.join(PRIORS)} come from "
            f"`python tools/prior.py {' '.join(PRIORS)}`: give prior=... with the name of one it was fine-tuned from"
        )
    return _read(name, str(device))


@cache
def _read(name: str, device: str) -> Prior:
    from safetensors.torch import load_file

    with as_file(files("robustclip").joinpath(PRIORS[name])) as path:
        weights = load_file(path, device)
    prior = Prior(len(weights["leave.bias"]), len(weights["leave.weight"].T)).to(device)
    prior.load_state_dict(weights)
    return prior.requires_grad_(False)


@component
class CLIPureDiff(Purification):
    """CLIPure-Diff: log p(u) = - the loss of a diffusion prior on u, at one random time of `times`, both ends included.

    Every step takes fresh noise; it belongs to the image and the draw, as does the time. `prior` names the embedded
    CLIP whose prior it is, "" the classifier's own.
    """

    times: tuple[int, int] = (900, 999)
    prior: str = ""
    seed: int = 0
    randomised: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "times", tuple(self.times))
        low, high = self.times
        check_integer("times", low, 0, TIMES - 1)
        check_integer("times", high, low, TIMES - 1)

    def slope(self, clip: Clip, images: Tensor, draw: int) -> Slope:
        """The gradient of minus the diffusion loss, with a graph if the features have one."""
        prior = load_prior(self.prior or clip.name, clip.device)
        low, high = self.times
        share = (self.noise(images, draw, "time", ()) + 1) / 2
        times = low + (share * (high - low + 1)).floor().clamp(max=high - low)
        noise = normal(self.noise(images, draw, "noise", (self.steps, prior.size)))

        def gradient(features: Tensor, step: int) -> Tensor:
            unrolled = features.requires_grad
            with torch.enable_grad():
                points = features if unrolled else features.detach().requires_grad_()
                loss = prior.loss(points, times, noise[:, step]).sum()
                return -torch.autograd.grad(loss, points, create_graph=unrolled)[0]

        return gradient
