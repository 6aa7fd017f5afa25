"""One loop up a loss, inside the ball around each image: what PGD, APGD and the attacks on features configure.

    found = ascend(objective, images, eps=4 / 255, steps=10, noise=own_noise(images, 0))

The norms that measure the ball are here, and how the best of several climbs is found.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Points (m, 3, h, w), the rows of the batch they belong to -> loss (m,) with its graph, and who has won; None: nobody.
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
FOOLING = 1e6  # more than any loss: without a stop, a point that fools is better than all that do not


@dataclass(frozen=True)
class Norm:
    """What an attack has to know of the norm that measures its budget; changes are (n, 3, h, w)."""

    random: Callable[[Tensor, float], Tensor]  # (noise uniform in [-1, 1], eps) -> a point of the ball
    ascend: Callable[[Tensor], Tensor]  # gradient -> direction of steepest ascent, of unit length
    project: Callable[[Tensor, float], Tensor]  # (change, eps) -> nearest point of the ball


def _length(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=1e-12)


def _random_l2(noise: Tensor, eps: float) -> Tensor:
    """A random direction at a radius uniform in [0, eps], taken from the first entry of the noise."""
    return eps * noise.flatten(1)[:, 0].abs().view(-1, 1, 1, 1) * (noise / _length(noise))


NORMS = {
    "linf": Norm(lambda noise, eps: eps * noise, torch.sign, lambda delta, eps: delta.clamp(-eps, eps)),
    "l2": Norm(
        _random_l2, lambda delta: delta / _length(delta), lambda delta, eps: delta * (eps / _length(delta)).clamp(max=1)
    ),
}
STARTS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "random": lambda noise: noise,
    "one-sided": torch.abs,
    "image": None,
}


def check_gradient(logits: Tensor) -> Tensor:
    """Return what a classifier computed if gradients can flow back through it, else raise ValueError."""
    if not logits.requires_grad:
        raise ValueError("the classifier's logits carry no gradient; remove no_grad or detach from its forward pass")
    return logits


def input_gradient(outputs: Tensor, images: Tensor, upper: Tensor | None = None) -> Tensor:
    """Gradient of the sum of `outputs`, or of their product with `upper`, with respect to the images.

    One that is missing or not a number would fake robustness, so it is an error.
    """
    upper = torch.ones_like(outputs) if upper is None else upper
    (gradient,) = torch.autograd.grad(check_gradient(outputs), images, upper, retain_graph=upper.ndim > 1)
    if gradient.isnan().any():
        raise ValueError("the classifier's gradient contains NaN; look for square roots or divisions at zero in it")
    return gradient


# --- the loop ---------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a climb found: images, what it maximised there in float64, and which of them have won."""

    images: Tensor
    values: Tensor
    won: Tensor


class Here(NamedTuple):
    """Where the images that still climb are in a step."""

    rows: Tensor
    points: Tensor
    gradient: Tensor
    loss: Tensor
    better: Tensor  # the best point so far?


class Climb:
    """One climb of a batch: its ball, and of each image the best point so far."""

    def __init__(self, images: Tensor, eps: float, norm: str, steps: int) -> None:
        self.images, self.eps, self.norm, self.steps = images, eps, NORMS[norm], steps
        self.best, self.won = images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.highest = images.new_full((len(images),), -torch.inf, dtype=torch.float64)

    def begin(self, start: str, noise: Tensor | None) -> Tensor:
        """The first points: random in the ball, random on one side of the images, or the images themselves."""
        if (side := STARTS[start]) is None:
            return self.images.clone()
        return (self.images + self.norm.random(side(noise), self.eps)).clamp(0, 1)

    def project(self, points: Tensor, rows: Tensor | None = None) -> Tensor:
        """The points, brought back into the ball around their images and into [0, 1]."""
        images = self.images if rows is None else self.images[rows]
        return (images + self.norm.project(points - images, self.eps)).clamp(0, 1)

    def record(self, rows: Tensor, points: Tensor, loss: Tensor, won: Tensor) -> Tensor:
        """Note the points of this step; returns which are the best so far."""
        better = won | (loss > self.highest[rows])
        self.best[rows[better]], self.highest[rows[better]] = points[better], loss[better].double()
        self.won[rows] = won
        return better


class Stepper(Protocol):
    """How a climb goes on: `begin` makes what says, for each step, where it would go."""

    def begin(self, climb: Climb) -> Callable[[int, Here], Tensor]:
        """(step, where it is) -> the next points, which are then projected."""


@dataclass(frozen=True)
class FixedSteps:
    """Steps of one length, by default 2.5 eps / steps and at most eps, up the gradient.

    x_{k+1} = P(x_k + step_size v_k), v_k = direction(grad_x L(x_k)); with momentum m, of that and m v_{k-1} together.
    """

    step_size: float | None = None
    momentum: float = 0.0

    def begin(self, climb: Climb) -> Callable[[int, Here], Tensor]:
        """A climb with these steps."""
        size = min(climb.eps, 2.5 * climb.eps / max(1, climb.steps)) if self.step_size is None else self.step_size
        return partial(self._move, climb.norm.ascend, size, torch.zeros_like(climb.images) if self.momentum else None)

    def _move(self, direction: Callable, size: float, velocity: Tensor | None, step: int, here: Here) -> Tensor:
        ahead = direction(here.gradient)
        if velocity is not None:
            ahead = velocity[here.rows] = direction(self.momentum * velocity[here.rows] + ahead)
        return here.points + size * ahead


@torch.no_grad()
def ascend(
    objective: Objective, images: Tensor, *, eps: float, steps: int, stepper: Stepper = FixedSteps(),
    norm: str = "linf", start: str = "random", noise: Tensor | None = None, keep: str = "best", stop: bool = False,
    slope: Callable[[Tensor, Tensor], Tensor] = input_gradient,
) -> Outcome:  # fmt: skip
    """Climb up `objective` in the eps-balls around (n, 3, h, w) images.

    `start` is "random" or "one-sided", from `noise` (n, 3, h, w) uniform in [-1, 1], or "image". With `stop`, an image
    leaves with the first point that has won; without, a point that has won beats all that have not. What comes back
    is the "best" point seen or the "last", which is then not looked at. `slope(loss, points)` is the gradient.
    """
    climb, rows = Climb(images, eps, norm, steps), torch.arange(len(images), device=images.device)
    points, move = climb.begin(start, noise), stepper.begin(climb)
    for step in range(steps + (keep == "best")):
        last = step == steps
        loss, won, gradient = _look(objective, rows, points, stop, None if last else slope)
        better = climb.record(rows, points, loss, won)
        if last or won.all():
            break
        here = _standing(Here(rows, points.detach(), gradient, loss, better), ~won)
        rows, points = here.rows, climb.project(move(step, here), here.rows)
    else:
        climb.best[rows] = points
    return Outcome(climb.best, climb.highest, climb.won)


def _look(objective: Objective, rows: Tensor, points: Tensor, stop: bool, slope: Callable | None) -> tuple:
    """Loss, who has won, and the gradient if there is a `slope` and somebody left to use it."""
    points.requires_grad_(slope is not None)
    with torch.set_grad_enabled(slope is not None):
        loss, won = objective(points, rows)
        if won is None or not stop:
            loss = loss if won is None else loss.double() + FOOLING * won
            won = torch.zeros_like(rows, dtype=torch.bool)
        gradient = None if slope is None or won.all() else slope(loss, points)
    return loss.detach(), won, gradient


def _standing(here: Here, stands: Tensor) -> Here:
    return here if stands.all() else Here(*(part[stands] for part in here))


def best_of(runs: Iterable[Callable[[Tensor], Outcome]], images: Tensor) -> Tensor:
    """The first image of any run that wins, else the one of highest value; a run gets the rows that still stand."""
    best, highest = images.clone(), images.new_full((len(images),), -torch.inf, dtype=torch.float64)
    standing = torch.arange(len(images), device=images.device)
    for run in runs:
        found, values, won = run(standing)
        better = won | (values > highest[standing])
        best[standing[better]], highest[standing[better]] = found[better], values[better].double()
        standing = standing[~won]
        if not len(standing):
            break
    return best
