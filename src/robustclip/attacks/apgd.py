"""Auto-PGD (Croce and Hein, 2020): gradient ascent with momentum that finds its step size by itself."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from robustclip.attacks.ascent import Climb, Here, Stepper
from robustclip.attacks.gradient import LossAscent
from robustclip.component import component

MOMENTUM = 0.75  # the share of the new step; the rest goes where the last one went
RISES = 0.75  # no more rising steps than this share, since the last checkpoint, halve the step size
CHECKPOINTS = (22, 41, 57, 70, 80, 87, 93, 99)  # percent of the steps: p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)


class AutoSteps:
    """Steps of length 2 eps that are halved, from the best point, where the climb stalls.

    z = P(x_k + step_size v_k), v_k = direction(grad_x L(x_k)), and x_{k+1} = P(x_k + a (z - x_k) + (1 - a) (x_k -
    x_{k-1})) with a = 0.75; the first step has no momentum.
    """

    def begin(self, climb: Climb) -> Callable[[int, Here], Tensor]:
        """A climb with these steps."""
        return AutoClimb(climb).move


class AutoClimb:
    """The state of these steps: the gradient at the best point, the step size and how the climb goes."""

    def __init__(self, climb: Climb) -> None:
        images, self.climb, self.marks = climb.images, climb, checkpoints(climb.steps)
        self.best_gradient, self.previous = torch.zeros_like(images), images.clone()
        self.marked = climb.highest.clone()  # the best loss at the last checkpoint
        self.latest = -self.marked  # the loss at the last point
        self.rises = torch.zeros_like(self.latest)
        self.step_size = images.new_full((len(images), 1, 1, 1), 2 * climb.eps)
        self.halved = torch.ones_like(climb.won)  # so the first checkpoint asks for rises only

    def move(self, step: int, here: Here) -> Tensor:
        """x_{k+1} from x_k and x_{k-1}, before its projection."""
        self.note(here)
        rows, points, gradient, climb = here.rows, here.points, here.gradient, self.climb
        if since := self.marks.get(step):
            points, gradient = self.check(here, since)
        ahead = points + self.step_size[rows] * climb.norm.ascend(gradient)
        if step:
            moved = climb.project(ahead, rows) - points
            ahead = points + MOMENTUM * moved + (1 - MOMENTUM) * (points - self.previous[rows])
        self.previous[rows] = points
        return ahead

    def note(self, here: Here) -> None:
        """Whether the loss rose, and the gradient where it is the best so far."""
        self.best_gradient[here.rows[here.better]] = here.gradient[here.better]
        self.rises[here.rows] += here.loss.double() > self.latest[here.rows]
        self.latest[here.rows] = here.loss.double()

    def check(self, here: Here, steps: int) -> tuple[Tensor, Tensor]:
        """At a checkpoint, `steps` after the last one: halve step sizes and go back to the best point where

        1. the loss rose in no more than 0.75 of these steps, or
        2. neither the step size nor the best loss changed since the last checkpoint.
        """
        rows, best = here.rows, self.climb.highest[here.rows]
        stuck = self.rises[rows] <= RISES * steps
        stuck |= ~self.halved[rows] & (best <= self.marked[rows])
        self.step_size[rows[stuck]] /= 2
        self.halved[rows], self.marked[rows], self.rises[rows] = stuck, best, 0.0
        back = stuck.view(-1, 1, 1, 1)
        best_points, best_gradient = self.climb.best[rows], self.best_gradient[rows]
        return torch.where(back, best_points, here.points), torch.where(back, best_gradient, here.gradient)


@component
class APGD(LossAscent):
    """Auto-PGD: an image's step size starts at 2 eps and is halved, from its best point, when the climb stalls.

    APGD(eps=4/255)                          APGD-CE
    APGD(eps=4/255, loss="dlr")              APGD-DLR
    APGD(eps=4/255, loss="dlr", targets=9)   APGD-T
    """

    steps: int = 100

    def stepper(self) -> Stepper:
        """Momentum, and step sizes that find themselves."""
        return AutoSteps()


@cache
def checkpoints(steps: int) -> dict[int, int]:
    """Step -> steps since the checkpoint before, at ceil(p_j steps)."""
    marks = [0, *sorted({-(-percent * steps // 100) for percent in CHECKPOINTS})]
    return {mark: mark - before for before, mark in pairwise(marks)}
