"""AutoAttack (Croce and Hein, 2020): several attacks in turn, each on what the ones before left standing."""

from functools import partial

from torch import Tensor

from robustclip.attacks.apgd import APGD
from robustclip.attacks.ascent import Outcome, best_of
from robustclip.attacks.base import Attack, Classifier
from robustclip.attacks.from_torchattacks import FromTorchattacks
from robustclip.attacks.losses import margin
from robustclip.attacks.square import Square
from robustclip.checks import check_choice
from robustclip.component import component

PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")


@component
class AutoAttack(Attack):
    """A classifier is as robust as its worst case over `parts`, which run in the order given, cheap ones first.

    AutoAttack(eps=4/255)                                           standard
    AutoAttack(eps=4/255, parts=("apgd-ce", "apgd-dlr"))            in the paper of TTC
    AutoAttack(eps=4/255, parts=("apgd-ce", "apgd-t"))              in the paper of CLIPure
    AutoAttack(eps=4/255, parts=("apgd-ce", "apgd-dlr"), draws=20)  for random classifiers

    `steps` is meant for APGD and FAB, `queries` for Square. The targeted attacks take the nine most likely wrong
    classes, or all there are. The DLR loss needs a third logit, towards targets a fourth: the original refuses smaller
    heads; here it divides by z_(1) - z_(3) with three classes and is the plain margin with two. FAB draws nothing, but
    follows the boundary so closely that the rounding of another batch size can change where an image near it ends.
    """

    parts: tuple[str, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")
    steps: int = 100
    queries: int = 5000
    norm: str = "linf"
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise ValueError(f"parts is empty; choose some of: {', '.join(PARTS)}")
        for part in self.parts:
            check_choice("part", part, PARTS)

    def attack(self, part: str) -> Attack:
        """The attack that plays a part."""
        budget = {"eps": self.eps, "seed": self.seed}
        if part == "square":
            return Square(queries=self.queries, norm=self.norm, **budget)
        if part == "fab-t":
            norm = {"linf": "Linf", "l2": "L2"}[self.norm]
            settings = {"multi_targeted": True, "steps": self.steps, "norm": norm}
            return FromTorchattacks(name="FAB", settings=settings, **budget)
        ascent = {"loss": "ce" if part == "apgd-ce" else "dlr", "targets": 9 if part == "apgd-t" else 0}
        return APGD(steps=self.steps, norm=self.norm, draws=self.draws, **ascent, **budget)

    def passes(self, classes: int) -> tuple[int, int]:
        """Those of the parts, each with a look at what it made, and one to see which images stand."""
        forward, backward = zip(*(self.attack(part).passes(classes) for part in self.parts), strict=True)
        return self.draws + sum(forward) + (self.draws - 1) * len(self.parts), sum(backward)

    def look(self, classifier: Classifier, images: Tensor) -> Tensor:
        """Logits, or probabilities averaged over the draws."""
        return self.attack("apgd-ce").look(classifier, images)

    def perturb(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """The first image that fools, else the one of highest margin."""

        def run(part: str, rows: Tensor) -> Outcome:
            found = self.attack(part).perturb(classifier, images[rows], labels[rows])
            scores = self.look(classifier, found)
            return Outcome(found, margin(scores, labels[rows]), self.won(scores, labels[rows]))

        return best_of((partial(run, part) for part in self.parts), images)
