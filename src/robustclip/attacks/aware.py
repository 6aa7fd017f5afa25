"""The attacker who knows the defense, and uses all that it declares.

    defended = Counterattack()(zero_shot(clip, role))
    Aware(eps=1 / 255)(defended.for_attack(), images, labels)

Random defenses are attacked on the average over draws that are new at every step (EOT), and what is found is compared
on draws that no step has used. Each aim is a climb of its own; the best image of all of them comes back.

What a defense tells, besides `surrogate` and `gate`, are methods like `logits` that it may have or not:

    smooth    as `surrogate`, with the defense's own steps made smooth and unrolled, for a second derivative
    views     logits (views, n, classes) of the single views from which the answer is made
    guess     logits (n, classes) of the pseudo-label that the defense follows
    gate      how far the gate is open, (n,), in units of its threshold: the defense acts where it is positive

`lacks` names those that some settings of it do not have.
"""

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from robustclip.attacks.ascent import FixedSteps, Objective, Outcome, ascend, best_of
from robustclip.attacks.base import Attack, Classifier
from robustclip.attacks.losses import cross_entropy, fooled, margin
from robustclip.checks import check_choice, check_integer, check_range
from robustclip.component import component
from robustclip.defenses.base import Defended, Defense, redrawn, unwrapped
from robustclip.models import logits_of
from robustclip.randomness import own_noise

# Aim -> the part that a defense must tell for it, its own answer for "plain"; None: there without a defense, too.
AIMS = {
    "plain": "logits",
    "guess": "guess",
    "smooth": "smooth",
    "answer": None,
    "margin": None,
    "views": "views",
    "gate": "gate",
}
JUDGED_FROM = 500_000  # the first draw at which what was found is compared: attacks count from 0, scoring lies above


@component
class Aware(Attack):
    """Projected gradient ascent through a defense, once for each aim that the defense leaves open.

    plain    the cross-entropy of the classifier that nothing defends, to the end: what a blind attacker does
    guess    the answer and the pseudo-label together: once that is wrong, the defense works for the attacker
    smooth   the answer of a smooth version of the defense whose own steps are unrolled
    answer   the cross-entropy of the defended answer: the exact gradient, or that of the declared surrogate (BPDA)
    margin   the same with the margin of the best wrong class
    views    the mean cross-entropy of the single views, so that no vote saturates
    gate     the answer, minus `gate_weight` max(0, g + slack): an image that the defense leaves alone

    `aims` = () means all of them. `draws` answers are averaged at each step, `judged` others decide which image is
    best. Images that are broken at all of these leave; without randomness, images leave as soon as they are broken.
    """

    aims: tuple[str, ...] = ()
    steps: int = 50
    step_size: float | None = None
    draws: int = 2
    judged: int = 5
    gate_weight: float = 10.0
    slack: float = 0.1
    seed: int = 0
    stop: ClassVar[bool] = False  # `perturb` says who is left alone: a mean over draws does not

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "aims", tuple(self.aims))
        for aim in self.aims:
            check_choice("aim", aim, AIMS)
        check_integer("judged", self.judged, 1)
        check_range("gate_weight", self.gate_weight, 0)
        check_range("slack", self.slack, 0)
        if self.step_size is not None:
            check_range("step_size", self.step_size, 0)

    def look(self, classifier: Classifier, images: Tensor) -> Tensor:
        """Probabilities averaged over the draws that compare, logits where there is one draw only."""
        return self._answers(classifier, images).mean(0)

    def _answers(self, classifier: Classifier, images: Tensor) -> Tensor:
        """Probabilities (judged, n, classes) of a random defense; logits (1, n, classes) where nothing is random."""
        with torch.no_grad():
            if not is_random(classifier):
                return logits_of(classifier, images)[None]
            draws = range(JUDGED_FROM, JUDGED_FROM + self.judged)
            return torch.stack([logits_of(redrawn(classifier, draw), images).softmax(1) for draw in draws])

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """The image that most draws get wrong, over all aims; of equals the one of the highest margin."""
        aims, found = list(aims_against(classifier, self.aims)), images.clone()
        if not aims:
            raise ValueError(
                f"aims={self.aims!r} are not open here: the defense tells nothing of them; give others, or ()"
            )
        rows = (~self._wrong(classifier, images, labels).all(0)).nonzero()[:, 0]
        if len(rows):  # some networks do not look at no images
            climbs = [partial(self._climb, classifier, images[rows], labels[rows], *aim) for aim in enumerate(aims)]
            found[rows] = best_of(climbs, images[rows])
        return found

    def _wrong(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Which of the draws that compare get which images wrong, (judged, n)."""
        return torch.stack([fooled(one, labels) for one in self._answers(classifier, images)])

    def _climb(
        self, classifier: Classifier, images: Tensor, labels: Tensor, turn: int, aim: str, rows: Tensor
    ) -> Outcome:
        """One climb of the images that still stand, judged at draws of its own."""
        mine, true, to_the_end = images[rows], labels[rows], aim == "plain" or is_random(classifier)
        found = ascend(
            self._objective(classifier, true, aim), mine, eps=self.eps, steps=self.steps,
            stepper=FixedSteps(self.step_size), noise=own_noise(mine, self.seed + 7919 * turn),
            keep="last" if to_the_end else "best", stop=not to_the_end,
        ).images  # fmt: skip
        answers = self._answers(classifier, found)
        wrong = torch.stack([fooled(one, true) for one in answers]).double()
        return Outcome(found, wrong.sum(0) + 0.5 * margin(answers.mean(0), true).sigmoid(), wrong.all(0))

    def _objective(self, classifier: Classifier, labels: Tensor, aim: str) -> Objective:
        """What an aim maximises; every call takes new draws. Where nothing is random, it says who has won."""
        steps, plain = count(1000 * self.seed), unwrapped(classifier)  # so that seeds share no draw

        def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
            if aim == "plain":
                return cross_entropy(plain(points), labels[rows]), None
            if not is_random(classifier):
                loss, logits = self._loss(classifier, points, labels[rows], aim)
                return loss, fooled(self.look(classifier, points) if logits is None else logits, labels[rows])
            first = next(steps) * self.draws % JUDGED_FROM
            drawn = (redrawn(classifier, first + turn) for turn in range(self.draws))
            return sum(self._loss(one, points, labels[rows], aim)[0] for one in drawn) / self.draws, None

        return objective

    def _loss(self, classifier: Classifier, points: Tensor, labels: Tensor, aim: str) -> tuple[Tensor, Tensor | None]:
        """Loss (n,) of one draw, and the logits of the answer if they are there."""
        if aim == "views":
            parts = told(classifier, "views", points)
            return sum(cross_entropy(part, labels) for part in parts) / len(parts), None
        if aim == "smooth":
            with sdpa_kernel(SDPBackend.MATH):  # the only kernel of attention that has a second derivative
                return cross_entropy(told(classifier, "smooth", points), labels), None
        # Of a random defense nobody asks for the answer's value, so that its surrogate is enough.
        logits = told(classifier, "surrogate", points) if is_random(classifier) else classifier(points)
        loss = margin(logits, labels) if aim == "margin" else cross_entropy(logits, labels)
        if aim == "guess":
            loss = loss + cross_entropy(told(classifier, "guess", points), labels)
        if aim == "gate":
            loss = loss - self.gate_weight * (told(classifier, "gate", points) + self.slack).clamp(min=0)
        return loss, logits

    def passes(self, classes: int) -> tuple[int, int]:
        """Of the aims named, or else of three: what a defense declares is not known here."""
        climbs = len(self.aims) or 3
        return 2 * self.judged + climbs * (self.steps * self.draws + self.judged), climbs * self.steps * self.draws


def aims_against(classifier: Classifier, wanted: tuple[str, ...] = ()) -> Iterator[str]:
    """The aims that a defended classifier leaves open, of those wanted if some are named."""
    defended = outermost(classifier)
    for aim, part in AIMS.items():
        is_open = part is None or (bool(defended) and tells(defended.defense, part))
        if is_open and (not wanted or aim in wanted):
            yield aim


def outermost(classifier: Classifier) -> Defended | None:
    """The defended classifier that an attacker faces; None where nothing defends it."""
    inside = getattr(classifier, "defended", classifier)
    return inside if isinstance(inside, Defended) else None


def tells(defense: Defense, part: str) -> bool:
    """Whether a defense tells this part, "smooth", "views", "guess", "gate" or its answer; its `lacks` says no."""
    own = getattr(type(defense), part, None)
    return own is not None and own is not getattr(Defense, part, None) and part not in getattr(defense, "lacks", ())


def told(classifier: Classifier, part: str, images: Tensor) -> Tensor:
    """What the outermost defense tells of these images."""
    defended = outermost(classifier)
    inside = defended.classifier.for_attack() if isinstance(defended.classifier, Defended) else defended.classifier
    return getattr(defended.defense, part)(inside, images, defended.draw)


def is_random(classifier: Classifier) -> bool:
    """Whether another draw of a defended classifier may answer otherwise."""
    defended = outermost(classifier)
    return defended is not None and (defended.defense.randomised or is_random(defended.classifier))
