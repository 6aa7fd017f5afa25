"""Attacks that follow the gradient: FGSM, PGD and the label-free feature attack; uniform noise is their control."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.base import NORMS, Attack, Classifier, Outcome, best_of, input_gradient, own_noise
from robustclip.attacks.losses import LOSSES, fooled, runner_up
from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component

# Points (m, 3, h, w) and the rows of the batch they belong to -> loss (m,) with its graph, and which points have won.
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@component
class UniformNoise(Attack):
    """The control: uniform noise in the l_inf ball of radius eps, without looking at the classifier."""

    seed: int = 0

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Add the noise and clip to the pixel range."""
        return (images + self.eps * own_noise(images, self.seed)).clamp(0, 1)


@component
class FGSM(Attack):
    """The fast gradient sign method: one l_inf step of length eps from the image itself."""

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """x + eps sign(grad_x CE(f(x), y)), clipped to the pixel range."""
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            loss = LOSSES["ce"](classifier(images), labels, None)
        gradient = input_gradient(loss, images)
        return (images.detach() + self.eps * gradient.sign()).clamp(0, 1)


class Memory:
    """What one run remembers of every image: its best point so far, the loss there, and whether it won."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.images, self.best = images, images.clone()
        self.best_loss = images.new_full((len(images),), -torch.inf, dtype=torch.float64)
        self.broken = torch.zeros_like(self.best_loss, dtype=torch.bool)

    def record(self, rows: Tensor, points: Tensor, gradient: Tensor, loss: Tensor, won: Tensor) -> Tensor:
        """Note the points of this step; returns which are the best so far."""
        better = won | (loss > self.best_loss[rows])
        self.best[rows[better]], self.best_loss[rows[better]] = points[better], loss[better].double()
        self.broken[rows] = won
        return better


@component
class Ascent(Attack):
    """What PGD, APGD and the feature attack share: a norm, steps, restarts, and the best point of all runs.

    Broken images leave the batch at once, so the adversarial image returned is the first that fools; those that never
    break return with the highest loss seen. Only images that still stand see the next run.
    """

    memory: ClassVar[type[Memory]] = Memory
    steps: int = 20
    norm: str = "linf"
    random_start: bool = True
    restarts: int = 1
    seed: int = 0

    def objectives(self, classifier: Classifier, images: Tensor, labels: Tensor) -> list[Objective]:
        """What to maximise, one entry per run of a restart."""
        raise NotImplementedError

    @abstractmethod
    def move(self, memory: Memory, step: int, rows: Tensor, points: Tensor, gradient: Tensor) -> Tensor:
        """The next points of the images `rows`."""

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Run all restarts; keep the first winning image, else the one of highest loss."""
        return self.maximise(self.objectives(classifier, images, labels), images)

    def maximise(self, objectives: Sequence[Objective], images: Tensor) -> Tensor:
        """The best points in the eps-balls around `images`."""
        turns = product(range(self.restarts), objectives)
        return best_of((partial(self._climb, images, *turn) for turn in turns), images)

    def _climb(self, images: Tensor, restart: int, objective: Objective, standing: Tensor) -> Outcome:
        """One run on the images `standing`; those that win leave at once, the last point is only looked at."""
        memory, rows = self.memory(images[standing], self.eps), torch.arange(len(standing), device=images.device)
        points = self.start(memory.images, restart)
        for step in range(self.steps + 1):
            last = step == self.steps
            points.requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                loss, won = objective(points, standing[rows])
            over = last or won.all()
            gradient = torch.zeros_like(points) if over else input_gradient(loss, points)
            points = points.detach()
            memory.record(rows, points, gradient, loss.detach(), won)
            if over:
                break
            rows, points, gradient = rows[~won], points[~won], gradient[~won]
            points = self.move(memory, step, rows, points, gradient)
        return memory.best, memory.best_loss, memory.broken

    def start(self, images: Tensor, restart: int) -> Tensor:
        """First iterate: random in the ball (always for later restarts), or the image itself."""
        if not self.random_start and restart == 0:
            return images.clone()
        noise = own_noise(images, self.seed + 7919 * restart)
        return (images + NORMS[self.norm].random(noise, self.eps)).clamp(0, 1)

    def project(self, points: Tensor, images: Tensor) -> Tensor:
        """The points, brought back into the ball around the images and into [0, 1]."""
        return (images + NORMS[self.norm].project(points - images, self.eps)).clamp(0, 1)


@component
class LossAscent(Ascent):
    """An ascent on a loss of the logits.

    `loss` is "ce", "margin" (Carlini and Wagner's) or "dlr". `targets` = k makes one run towards each of the k most
    likely wrong classes; any misclassification counts. `target_class` wants that class and no other. `draws` averages
    the loss, and the probabilities by which success is judged, over k passes of a random classifier (EOT).
    """

    loss: str = "ce"
    targets: int = 0
    target_class: int | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, LOSSES)
        check_integer("targets", self.targets, 0)
        if self.target_class is not None:
            check_integer("target_class", self.target_class, 0)
            if self.targets:
                raise ValueError(f"targets={self.targets!r} is not allowed with target_class; give one of the two")

    def look(self, classifier: Classifier, images: Tensor) -> Tensor:
        """Logits, or probabilities averaged over the draws."""
        scores, once_more = super().look(classifier, images), super().look
        if self.target_class is not None and self.target_class >= scores.shape[1]:
            raise ValueError(f"target_class={self.target_class} is out of range; there are {scores.shape[1]} classes")
        others = (once_more(classifier, images).softmax(1) for _ in range(self.draws - 1))
        return sum(others, scores.softmax(1)) if self.draws > 1 else scores

    def won(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Any other class first; with a target class, that one first or nothing to do because it is the true one."""
        if self.target_class is None:
            return fooled(scores, labels)
        return (scores.argmax(1) == self.target_class) | (labels == self.target_class)

    def objectives(self, classifier: Classifier, images: Tensor, labels: Tensor) -> list[Objective]:
        """One untargeted objective, or one per target."""
        goals = [None]
        if self.target_class is not None:
            goals = [torch.full_like(labels, self.target_class)]
        elif self.targets:
            scores = self.look(classifier, images)
            goals = [runner_up(scores, labels, rank) for rank in range(min(self.targets, scores.shape[1] - 1))]
        return [partial(self._objective, classifier, labels, goal) for goal in goals]

    def _objective(
        self, classifier: Classifier, labels: Tensor, goal: Tensor | None, points: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = [classifier(points) for _ in range(self.draws)]
        aims = None if goal is None else goal[rows]
        losses = [LOSSES[self.loss](one, labels[rows], aims) for one in logits]
        scores = logits[0] if self.draws == 1 else sum(one.detach().softmax(1) for one in logits)
        return sum(losses) / self.draws, self.won(scores, labels[rows])


@component
class Steps(Ascent):
    """Plain projected gradient ascent; `step_size` defaults to 2.5 eps / steps, capped at eps.

    x_{k+1} = P(x_k + step_size * direction(grad_x L(x_k))), P the projection onto the eps-ball around the image and
    onto [0, 1].
    """

    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None:
            check_range("step_size", self.step_size, 0)

    def move(self, memory: Memory, step: int, rows: Tensor, points: Tensor, gradient: Tensor) -> Tensor:
        """One step of fixed length."""
        step_size = min(self.eps, 2.5 * self.eps / self.steps) if self.step_size is None else self.step_size
        return self.project(points + step_size * NORMS[self.norm].ascend(gradient), memory.images[rows])


@component
class PGD(Steps, LossAscent):
    """Projected gradient descent: steps of fixed length up the loss of the logits.

    PGD(eps=4/255)                             cross-entropy, 20 steps, random start
    PGD(eps=4/255, loss="margin", steps=100)   the "CW" of most test-time papers
    PGD(eps=4/255, targets=9, restarts=2)      nine runs, one towards each likely wrong class, from two starts
    """


@component
class FeaturePGD(Steps):
    """The label-free attack: turn the image's unit feature away from where it was, max 1 - cos(e(x'), e(x)).

    It needs an encoder: the CLIP of a zero-shot classifier, else the classifier's outputs serve as features. No image
    leaves the batch, as the attacker cannot know whether it fools.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.random_start:
            raise ValueError("random_start=False is not allowed; the feature distance has no slope at the image itself")

    def won(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Never: labels are not looked at."""
        return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)

    def objectives(self, classifier: Classifier, images: Tensor, labels: Tensor) -> list[Objective]:
        """1 - cos to the clean features, which nobody has won."""
        encode = classifier.clip.encode_images if hasattr(classifier, "clip") else classifier
        with torch.no_grad():
            clean = F.normalize(encode(images), dim=1)

        def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            features = F.normalize(encode(points), dim=1)
            return 1 - (features * clean[rows]).sum(1), self.won(features, rows)

        return [objective]
