"""Auto-PGD (Croce and Hein, 2020): gradient ascent with momentum that finds its step size by itself."""

from itertools import pairwise

import torch
from torch import Tensor

from robustclip.attacks.base import NORMS, input_gradient
from robustclip.attacks.gradient import LossAscent, Objective
from robustclip.component import component

MOMENTUM = 0.75  # the share of the new step; the rest goes where the last one went
RISES = 0.75  # no more rising steps than this share, since the last checkpoint, halve the step size
CHECKPOINTS = (22, 41, 57, 70, 80, 87, 93, 99)  # percent of the steps: p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)


@component
class APGD(LossAscent):
    """Auto-PGD; an image's step size starts at 2 eps and is halved, from its best point, when the climb stalls.

    With a = 0.75 and P the projection onto the eps-ball around the image and onto [0, 1]:
    z = P(x_k + step_size * direction(grad_x L(x_k))) and x_{k+1} = P(x_k + a (z - x_k) + (1 - a) (x_k - x_{k-1})).

    APGD(eps=4/255)                          APGD-CE
    APGD(eps=4/255, loss="dlr")              APGD-DLR
    APGD(eps=4/255, loss="dlr", targets=9)   APGD-T
    """

    steps: int = 100

    def climb(self, objective: Objective, images: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One run; broken images leave at once, the last point is only looked at."""
        memory, marks = Memory(images, 2 * self.eps), checkpoints(self.steps)
        rows = torch.arange(len(images), device=images.device)
        current = previous = start
        for step in range(self.steps + 1):
            last = step == self.steps
            current.requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                loss, won = objective(current, rows)
            over = last or won.all()
            gradient = torch.zeros_like(current) if over else input_gradient(loss, current)
            current = current.detach()
            memory.record(rows, current, gradient, loss.detach(), won)
            if over:
                break
            if won.any():
                rows, current, previous, gradient = (part[~won] for part in (rows, current, previous, gradient))
            if step in marks:
                current, gradient = memory.check(rows, current, gradient, marks[step])
            step_size = memory.step_size[rows]
            current, previous = self._next(images[rows], current, previous, gradient, step_size, step == 0), current
        return memory.best, memory.best_loss, memory.broken

    def _next(
        self, images: Tensor, current: Tensor, previous: Tensor, gradient: Tensor, step_size: Tensor, first: bool
    ) -> Tensor:
        """x_{k+1} from x_k and x_{k-1}; the first step has no momentum."""
        ahead = self.project(current + step_size * NORMS[self.norm].ascend(gradient), images)
        if first:
            return ahead
        moved = current + MOMENTUM * (ahead - current) + (1 - MOMENTUM) * (current - previous)
        return self.project(moved, images)


class Memory:
    """What one run remembers of every image: its best point so far, its step size, how the climb goes."""

    def __init__(self, images: Tensor, step_size: float) -> None:
        lowest = images.new_full((len(images),), -torch.inf, dtype=torch.float64)
        self.best, self.best_gradient, self.best_loss = images.clone(), torch.zeros_like(images), lowest
        self.latest, self.marked = -lowest, lowest.clone()  # loss at the last point; best at the last checkpoint
        self.rises = torch.zeros_like(lowest)
        self.step_size = images.new_full((len(images), 1, 1, 1), step_size)
        self.halved = torch.ones_like(lowest, dtype=torch.bool)  # so the first checkpoint asks for rises only
        self.broken = torch.zeros_like(self.halved)

    def record(self, rows: Tensor, points: Tensor, gradient: Tensor, loss: Tensor, won: Tensor) -> None:
        """Note the points of this step."""
        loss = loss.double()
        better = won | (loss > self.best_loss[rows])
        to = rows[better]
        self.best[to], self.best_gradient[to], self.best_loss[to] = points[better], gradient[better], loss[better]
        self.rises[rows] += loss > self.latest[rows]
        self.latest[rows], self.broken[rows] = loss, won

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


def checkpoints(steps: int) -> dict[int, int]:
    """Step -> steps since the checkpoint before, at ceil(p_j steps)."""
    marks = [0, *sorted({-(-percent * steps // 100) for percent in CHECKPOINTS})]
    return {mark: mark - before for before, mark in pairwise(marks)}
