"""Attacks that follow the gradient: FGSM, PGD and the label-free feature attack; uniform noise is their control."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.ascent import (
    STARTS,
    Climb,
    FixedSteps,
    Objective,
    Outcome,
    Stepper,
    ascend,
    best_of,
    input_gradient,
)
from robustclip.attacks.base import Attack, Classifier
from robustclip.attacks.losses import LOSSES, fooled, runner_up
from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component
from robustclip.defenses.base import features_of, redrawn
from robustclip.randomness import own_noise


@component
class UniformNoise(Attack):
    """The control: uniform noise in the l_inf ball of radius eps, without looking at the classifier."""

    seed: int = 0

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Add the noise and clip to the pixel range."""
        return (images + self.eps * own_noise(images, self.seed)).clamp(0, 1)

    def passes(self, classes: int) -> tuple[int, int]:
        """One, to see which images stand."""
        return 1, 0


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
    break return with the highest loss seen. Only images that still stand see the next run. The `start` is "random" in
    the ball, "one-sided" at or above the image, or the "image" itself; later restarts are random.
    """

    steps: int = 20
    norm: str = "linf"
    start: str = "random"
    keep: str = "best"
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("start", self.start, STARTS)
        check_choice("keep", self.keep, ("best", "last"))
        if self.keep == "last" and self.runs(2) > 1:
            raise ValueError("keep='last' is not allowed with several runs, of which the best counts; give keep='best'")

    def objectives(self, classifier: Classifier, images: Tensor, labels: Tensor) -> list[Objective]:
        """What to maximise, one entry per run of a restart."""
        raise NotImplementedError

    def stepper(self) -> Stepper:
        """How it goes on from a point."""
        return FixedSteps()

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Run all restarts; keep the first winning image, else the one of highest loss."""
        return self.maximise(self.objectives(classifier, images, labels), images)

    def maximise(self, objectives: Sequence[Objective], images: Tensor) -> Tensor:
        """The best points in the eps-balls around the images."""
        turns = product(range(self.restarts), objectives)
        return best_of((partial(self._run, images, *turn) for turn in turns), images) if self.eps else images.clone()

    def _run(self, images: Tensor, restart: int, objective: Objective, standing: Tensor) -> Outcome:
        start = "random" if restart and self.start == "image" else self.start
        return ascend(
            lambda points, rows: objective(points, standing[rows]), images[standing], eps=self.eps, steps=self.steps,
            stepper=self.stepper(), norm=self.norm, start=start, keep=self.keep, stop=self.stop,
            noise=None if start == "image" else self._noise(images[standing], restart),
        )  # fmt: skip

    def _noise(self, images: Tensor, restart: int = 0) -> Tensor:
        return own_noise(images, self.seed + 7919 * restart)

    def first_points(self, images: Tensor) -> Tensor:
        """Where the first run starts."""
        return Climb(images, self.eps, self.norm, self.steps).begin(self.start, self._noise(images))

    def runs(self, classes: int) -> int:
        """How many climbs there are on a head of so many classes."""
        return self.restarts

    def passes(self, classes: int) -> tuple[int, int]:
        """One to see which images stand, and those of each run; the last point is only looked at."""
        runs = self.runs(classes)
        return 1 + runs * (self.steps + (self.keep == "best")), runs * self.steps


@component
class LossAscent(Ascent):
    """An ascent on a loss of the logits.

    `loss` is "ce", "margin" (Carlini and Wagner's) or "dlr". `targets` = k makes one run towards each of the k most
    likely wrong classes; any misclassification counts. `target_class` wants that class and no other. `draws` averages
    the loss, and the probabilities by which success is judged, over k draws of a random classifier (EOT). Without
    `stop` all images are climbed to the end, also those that were wrong before: of the points that fool, if any, the
    one of highest loss comes back. That carries over better to other models and prompts.
    """

    loss: str = "ce"
    targets: int = 0
    target_class: int | None = None
    draws: int = 1
    stop: bool = True

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        check_integer("targets", self.targets, 0)
        if self.target_class is not None:
            check_integer("target_class", self.target_class, 0)
            if self.targets:
                raise ValueError(f"targets={self.targets!r} is not allowed with target_class; give one of the two")
        super().__post_init__()

    def unstopped(self) -> "LossAscent":
        """Every image to the end."""
        return replace(self, stop=False)

    def runs(self, classes: int) -> int:
        """One per restart and target."""
        return self.restarts * max(1, min(self.targets, classes - 1))

    def passes(self, classes: int) -> tuple[int, int]:
        """Once more for each draw, and to rank the targets."""
        forward, backward = super().passes(classes)
        return self.draws * (forward + bool(self.targets)), self.draws * backward

    def look(self, classifier: Classifier, images: Tensor) -> Tensor:
        """Logits, or probabilities averaged over the draws."""
        if self.draws == 1:
            scores = super().look(classifier, images)
        else:
            draws = (super(LossAscent, self).look(each, images) for each in self.drawn(classifier))
            scores = sum(one.softmax(1) for one in draws)
        if self.target_class is not None and self.target_class >= scores.shape[1]:
            raise ValueError(f"target_class={self.target_class} is out of range; there are {scores.shape[1]} classes")
        return scores

    def drawn(self, classifier: Classifier) -> list[Classifier]:
        """The classifier with its randomness drawn anew, as often as the attack wants."""
        return [classifier] if self.draws == 1 else [redrawn(classifier, draw) for draw in range(self.draws)]

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
        return [partial(self._objective, self.drawn(classifier), labels, goal) for goal in goals]

    def _objective(
        self, drawn: list[Classifier], labels: Tensor, goal: Tensor | None, points: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = [classifier(points) for classifier in drawn]
        aims = None if goal is None else goal[rows]
        losses = [LOSSES[self.loss](one, labels[rows], aims) for one in logits]
        scores = logits[0] if len(logits) == 1 else sum(one.detach().softmax(1) for one in logits)
        return sum(losses) / len(losses), self.won(scores, labels[rows])


@component
class FixedLength(Ascent):
    """Plain projected gradient ascent; `step_size` defaults to 2.5 eps / steps, capped at eps.

    x_{k+1} = P(x_k + step_size * direction(grad_x L(x_k))), P the projection onto the eps-ball around the image and
    onto [0, 1]. With `momentum` the direction is that of the gradients of all steps, the older the less they count.
    """

    step_size: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("momentum", self.momentum, 0, 1)
        if self.step_size is not None:
            check_range("step_size", self.step_size, 0)

    def stepper(self) -> Stepper:
        """Steps of one length."""
        return FixedSteps(self.step_size, self.momentum)


@component
class PGD(FixedLength, LossAscent):
    """Projected gradient descent: steps of fixed length up the loss of the logits.

    PGD(eps=4/255)                             cross-entropy, 20 steps, random start
    PGD(eps=4/255, loss="margin", steps=100)   the "CW" of most test-time papers
    PGD(eps=4/255, targets=9, restarts=2)      nine runs, one towards each likely wrong class, from two starts
    PGD(eps=4/255, step_size=4/255, keep="last", stop=False)   as the code of MMCoA tests: the last point, come what may
    """


@component
class FeaturePGD(FixedLength):
    """The label-free attack: turn the image's unit feature away from where it was, max 1 - cos(e(x'), e(x)).

    It needs an encoder: the CLIP of a zero-shot classifier, through its defense if there is one, else the classifier's
    outputs serve as features. No image leaves the batch, as the attacker cannot know whether it fools.
    """

    stop = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "image":
            raise ValueError("start='image' is not allowed; the feature distance has no slope at the image itself")

    def objectives(self, classifier: Classifier, images: Tensor, labels: Tensor) -> list[Objective]:
        """1 - cos to the clean features, which nobody has won."""
        has_features = hasattr(classifier, "clip") or hasattr(classifier, "at")
        encode = features_of(classifier) if has_features else classifier
        with torch.no_grad():
            clean = F.normalize(encode(images), dim=1)

        def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            return 1 - (F.normalize(encode(points), dim=1) * clean[rows]).sum(1), None

        return [objective]

    def passes(self, classes: int) -> tuple[int, int]:
        """One more for the clean features."""
        forward, backward = super().passes(classes)
        return forward + 1, backward
