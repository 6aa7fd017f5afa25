"""Auto-PGD (Croce and Hein, 2020): gradient ascent with momentum that finds its step size by itself."""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from robustclip.attacks.base import NORMS
from robustclip.attacks.gradient import LossAscent, Memory
from robustclip.component import component

MOMENTUM = 0.75  # the share of the new step; the rest goes where the last one went
RISES = 0.75  # no more rising steps than this share, since the last checkpoint, halve the step size
CHECKPOINTS = (22, 41, 57, 70, 80, 87, 93, 99)  # percent of the steps: p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)


class ClimbMemory(Memory):
    """It also remembers the gradient at the best point, the step size and how the climb goes."""

    def __init__(self, images: Tensor, eps: float) -> None:
        super().__init__(images, eps)
        self.best_gradient, self.previous = torch.zeros_like(images), images.clone()
        self.latest, self.marked = -self.best_loss, self.best_loss.clone()  # loss at the last point; best at last check
        self.rises = torch.zeros_like(self.latest)
        self.step_size = images.new_full((len(images), 1, 1, 1), 2 * eps)
        self.halved = torch.ones_like(self.broken)  # so the first checkpoint asks for rises only

    def record(self, rows: Tensor, points: Tensor, gradient: Tensor, loss: Tensor, won: Tensor) -> Tensor:
        """Note the points of this step; returns which are the best so far."""
        better = super().record(rows, points, gradient, loss, won)
        self.best_gradient[rows[better]] = gradient[better]
        self.rises[rows] += loss.double() > self.latest[rows]
        self.latest[rows] = loss.double()
        return better

    def check(self, rows: Tensor, points: Tensor, gradient: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """At a checkpoint, `steps` after the last one: halve step sizes and go back to the best point where

        1. the loss rose in no more than 0.75 of these steps, or
        2. neither the step size nor the best loss changed since the last checkpoint.
        """
        best = self.best_loss[rows]
        stuck = self.rises[rows] <= RISES * steps
        stuck |= ~self.halved[rows] & (best <= self.marked[rows])
        self.step_size[rows[stuck]] /= 2
        self.halved[rows], self.marked[rows], self.rises[rows] = stuck, best, 0.0
        back = stuck.view(-1, 1, 1, 1)
        return torch.where(back, self.best[rows], points), torch.where(back, self.best_gradient[rows], gradient)


@component
class APGD(LossAscent):
    """Auto-PGD; an image's step size starts at 2 eps and is halved, from its best point, when the climb stalls.

    With a = 0.75 and P the projection onto the eps-ball around the image and onto [0, 1]:
    z = P(x_k + step_size * direction(grad_x L(x_k))) and x_{k+1} = P(x_k + a (z - x_k) + (1 - a) (x_k - x_{k-1})).

    APGD(eps=4/255)                          APGD-CE
    APGD(eps=4/255, loss="dlr")              APGD-DLR
    APGD(eps=4/255, loss="dlr", targets=9)   APGD-T
    """

    memory = ClimbMemory
    steps: int = 100

    def move(self, memory: ClimbMemory, step: int, rows: Tensor, points: Tensor, gradient: Tensor) -> Tensor:
        """x_{k+1} from x_k and x_{k-1}; the first step has no momentum."""
        if since := checkpoints(self.steps).get(step):
            points, gradient = memory.check(rows, points, gradient, since)
        images = memory.images[rows]
        ahead = self.project(points + memory.step_size[rows] * NORMS[self.norm].ascend(gradient), images)
        if step:
            moved = points + MOMENTUM * (ahead - points) + (1 - MOMENTUM) * (points - memory.previous[rows])
            ahead = self.project(moved, images)
        memory.previous[rows] = points
        return ahead


@cache
def checkpoints(steps: int) -> dict[int, int]:
    """Step -> steps since the checkpoint before, at ceil(p_j steps)."""
    marks = [0, *sorted({-(-percent * steps // 100) for percent in CHECKPOINTS})]
    return {mark: mark - before for before, mark in pairwise(marks)}
