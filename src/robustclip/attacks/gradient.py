"""Attacks that follow the gradient: FGSM, PGD and the label-free feature attack; uniform noise is their control."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.base import MAX_SEED, NORMS, Attack, Classifier, input_gradient, own_noise
from robustclip.attacks.losses import LOSSES, fooled, runner_up
from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component

# Points (m, 3, h, w) and the rows of the batch they belong to -> loss (m,) with its graph, and which points have won.
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@component
class UniformNoise(Attack):
    """The control: uniform noise in the l_inf ball of radius eps, without looking at the classifier."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed, 0, MAX_SEED)

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


@component
class Ascent(Attack):
    """What PGD, APGD and the feature attack share: a norm, steps, restarts, and the best point of all runs.

    Broken images leave the batch at once, so the adversarial image returned is the first that fools; those that never
    break return with the highest loss seen. Only images that still stand see the next run.
    """

    steps: int = 20
    norm: str = "linf"
    random_start: bool = True
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        super().__post_init__()
        check_integer("steps", self.steps, 1)
        check_integer("restarts", self.restarts, 1)
        check_integer("seed", self.seed, 0, MAX_SEED)

    @abstractmethod
    def climb(self, objective: Objective, images: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One run: the best image found, its loss, and whether it wins, for every image."""

    def objectives(self, classifier: Classifier, images: Tensor, labels: Tensor) -> list[Callable[[Tensor], Objective]]:
        """What to maximise, one entry per run of a restart: rows of the batch -> objective on these rows."""
        raise NotImplementedError

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Run all restarts; keep the first winning image, else the one of highest loss in the last kind of run."""
        return self.maximise(self.objectives(classifier, images, labels), images)

    def maximise(self, objectives: list[Callable[[Tensor], Objective]], images: Tensor) -> Tensor:
        """The best points in the eps-balls around `images`."""
        best, best_loss = images.clone(), images.new_full((len(images),), -torch.inf, dtype=torch.float64)
        standing = torch.arange(len(images), device=images.device)
        for restart in range(self.restarts):
            for objective in objectives:
                start = self.start(images[standing], restart)
                found, loss, broken = self.climb(objective(standing), images[standing], start)
                better = broken | (loss > best_loss[standing])
                best[standing[better]], best_loss[standing[better]] = found[better], loss[better].double()
                standing = standing[~broken]
                if not len(standing):
                    return best
        return best

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
        check_integer("draws", self.draws, 1)
        if self.target_class is not None:
            check_integer("target_class", self.target_class, 0)
            if self.targets:
                raise ValueError(f"targets={self.targets!r} is not allowed with target_class; give one of the two")

    def look(self, classifier: Classifier, images: Tensor) -> Tensor:
        """Logits, or probabilities averaged over the draws."""
        scores = super().look(classifier, images)
        if self.target_class is not None and self.target_class >= scores.shape[1]:
            raise ValueError(f"target_class={self.target_class} is out of range; there are {scores.shape[1]} classes")
        if self.draws == 1:
            return scores
        return sum((super(LossAscent, self).look(classifier, images).softmax(1) for _ in range(self.draws - 1)),
                   scores.softmax(1))  # fmt: skip

    def won(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Any other class first; with a target class, that one first or nothing to do because it is the true one."""
        if self.target_class is None:
            return fooled(scores, labels)
        return (scores.argmax(1) == self.target_class) | (labels == self.target_class)

    def objectives(self, classifier: Classifier, images: Tensor, labels: Tensor) -> list[Callable[[Tensor], Objective]]:
        """One untargeted objective, or one per target."""
        if self.target_class is not None:
            goals = [torch.full_like(labels, self.target_class)]
        elif self.targets:
            scores = self.look(classifier, images)
            goals = [runner_up(scores, labels, rank) for rank in range(min(self.targets, scores.shape[1] - 1))]
        else:
            goals = [None]

        def on(goal: Tensor | None) -> Callable[[Tensor], Objective]:
            return lambda rows: self._objective(classifier, labels[rows], goal if goal is None else goal[rows])

        return [on(goal) for goal in goals]

    def _objective(self, classifier: Classifier, labels: Tensor, goal: Tensor | None) -> Objective:
        def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits = [classifier(points) for _ in range(self.draws)]
            aims = None if goal is None else goal[rows]
            losses = [LOSSES[self.loss](one, labels[rows], aims) for one in logits]
            scores = logits[0] if self.draws == 1 else sum(one.detach().softmax(1) for one in logits)
            return sum(losses) / self.draws, self.won(scores, labels[rows])

        return objective


@component
class Steps(Ascent):
    """The climb of plain projected gradient ascent.

    x_{k+1} = P(x_k + step_size * direction(grad_x L(x_k))), where P projects onto the eps-ball around the image and
    onto [0, 1]. `step_size` defaults to 2.5 eps / steps, capped at eps.
    """

    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None:
            check_range("step_size", self.step_size, 0)

    def climb(self, objective: Objective, images: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take all steps; the last point is looked at, too."""
        step_size = min(self.eps, 2.5 * self.eps / self.steps) if self.step_size is None else self.step_size
        best, best_loss = images.clone(), images.new_full((len(images),), -torch.inf, dtype=torch.float64)
        broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        rows, current = torch.arange(len(images), device=images.device), start
        for step in range(self.steps + 1):
            current.requires_grad_(step < self.steps)
            with torch.set_grad_enabled(step < self.steps):
                loss, now = objective(current, rows)
            better = now | (loss.detach() > best_loss[rows])
            best[rows[better]], best_loss[rows[better]] = current.detach()[better], loss.detach()[better].double()
            broken[rows[now]] = True
            if step == self.steps or now.all():
                break
            gradient, stay = input_gradient(loss, current), ~now
            rows, moved = rows[stay], current.detach()[stay] + step_size * NORMS[self.norm].ascend(gradient[stay])
            current = self.project(moved, images[rows])
        return best, best_loss, broken


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

    def objectives(self, classifier: Classifier, images: Tensor, labels: Tensor) -> list[Callable[[Tensor], Objective]]:
        """1 - cos to the clean features."""
        encode = classifier.clip.encode_images if hasattr(classifier, "clip") else classifier
        with torch.no_grad():
            clean = F.normalize(encode(images), dim=1)

        def on(rows: Tensor) -> Objective:
            return lambda points, part: feature_distance(encode(points), clean[rows[part]])

        return [on]


def feature_distance(features: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine for each row, and that none of them has won."""
    return 1 - (F.normalize(features, dim=1) * clean).sum(1), features.new_zeros(len(features), dtype=torch.bool)
