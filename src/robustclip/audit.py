"""Can this robust accuracy be believed? An audit of a (classifier, attack, images) triple.

Each check looks for one known way in which an attack fails and a classifier looks robust without being so. A flag is a
reason to doubt, and no flag proves nothing; but each image that a check breaks after the attack failed on it is proof.

    report = audit(classifier, PGD(eps=2 / 255), images, labels)
    report.flags      # ("more-steps",)
    report.frame()    # one row per check, with the numbers in words

A check that does not apply (noise has no steps) is neither flagged nor passed: `flagged` is None, `text` says why.

Of an attack on images and texts the half that changes images is audited: the image attack of a SepAttack as it is, that
of Co-Attack on the classifier with the prompts that it attacked. SGA scores each image with a text of its own, which no
rival faces: there the checks of the classifier remain.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustclip.attacks.ascent import NORMS
from robustclip.attacks.base import MAX_SEED, Adversary, Classifier, Target, frozen
from robustclip.attacks.gradient import PGD
from robustclip.attacks.losses import LOSSES, margin
from robustclip.attacks.square import Square
from robustclip.checks import check_choice, check_images, check_integer, check_labels
from robustclip.defenses.base import rebuilt, redrawn, undefended
from robustclip.fast import fast_classifier
from robustclip.models import Clip, ZeroShotClassifier, logits_of
from robustclip.progress import progress

AnyAttack = Callable[[Classifier, Tensor, Tensor], Tensor]
Seen = tuple[float, float, str]  # what a check returns: a value, flagged above its limit, and the numbers in words

# More than half a point is the size that matters in a table. No test of significance is needed: outcomes are paired,
# and only images that stood are attacked again, so each one that falls lowers the very number that was to be reported.
POINTS = 0.5
GRADIENTS = 5.0  # percent of images without a usable gradient: a few dead ones happen, more is masking
FALLING = 25.0  # percent of followed images whose loss does not rise: a wrong gradient makes it half of them or more
FOLLOWED = 8  # images followed alone along the attack's path
SAME = 1e-4  # of the spread of logits, between two equal passes: float32 kernels that race differ by 1e-6
COMPANY = 0.02  # of the spread of logits, alone or in a batch: bfloat16 kernels for other batch sizes come near 0.01
ROUNDING = 0.04  # of the spread of logits: two logits that bfloat16 moves by up to 0.016 each cannot change places
SLACK = 1e-5  # pixels out of range, and changes out of the budget, by rounding
ALONE = 16  # images looked at alone
DRAWS = 10  # of uniform noise
SHORT = 4  # passes, forward and backward, of an attack with one step
STEPS, RESTARTS = 4, 4  # four times the steps, four more restarts
LARGE = 0.5  # the budget in which every image can become mid-gray, so that no classifier can beat a constant guess
QUERIES, NEAREST = 500, 32  # of Square, spent on the standing images nearest to the decision boundary
DEVIATION = 0.05  # by which the weights of a copy are perturbed, relative to their own deviation


@dataclass(frozen=True)
class Finding:
    """What one check saw: flagged if `value` exceeds `limit`; None if the check does not apply, and `text` says why."""

    check: str
    flagged: bool | None
    value: float
    limit: float
    text: str


@dataclass(frozen=True)
class Audit:
    """All findings, in the order of the checks."""

    findings: tuple[Finding, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the flagged checks."""
        return tuple(finding.check for finding in self.findings if finding.flagged)

    def frame(self) -> pd.DataFrame:
        """One row per check: check, flagged, value, limit, text."""
        return pd.DataFrame([vars(finding) for finding in self.findings], columns=[one.name for one in fields(Finding)])


class DoesNotApply(Exception):
    """Ends a check, with the reason why it has nothing to say."""


def require(condition: bool, otherwise: str) -> None:
    """End the check unless the condition holds."""
    if not condition:
        raise DoesNotApply(otherwise)


# --- what the checks look at ------------------------------------------------------------------------------------------


class Single(nn.Module):
    """A model in half precision as one over float32 pixels: those of half precision are too coarse for a budget."""

    def __init__(self, model: Classifier, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype, self.training = model, dtype, getattr(model, "training", False)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, h, w) pixels in [0, 1] to (n, classes) logits."""
        return self.model(images.to(self.dtype)).float()


@dataclass(frozen=True)
class ImageHalf:
    """The images that an attack on images and texts makes when it faces `target`."""

    attack: Adversary
    target: Target

    @property
    def inner(self) -> Adversary:
        """The attack, which has the settings."""
        return self.attack

    def __call__(self, classifier: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images; the classifier is what they are judged by."""
        return self.attack.pairs(self.target, images, labels)[-1].images


@dataclass
class Case:
    """The triple under audit, and what the attack did to it: every check starts from here."""

    classifier: Classifier
    attack: AnyAttack | Adversary
    images: Tensor
    labels: Tensor
    seed: int
    batch_size: int
    surrogate: Classifier | None
    unmatched: str = ""  # why no rival can stand in for the attack

    def __post_init__(self) -> None:
        images = self.images = self.images.detach().clone(memory_format=torch.contiguous_format)
        self.clean = self.look(images)
        check_labels(self.labels, self.clean.shape[1], len(images))
        self.labels = self.labels.to(images.device, torch.int64, copy=True)
        self._take_image_half()
        if not self.clean.isfinite().all():
            raise ValueError("the classifier gives infinite logits; restore or retrain its checkpoint")
        self.spread = max(float((self.clean.amax(1) - self.clean.amin(1)).median()), 1e-12)  # of a typical image
        self.correct = (self.clean.argmax(1) == self.labels).nonzero()[:, 0]
        self.returned, self.stopped = images, ""
        everything = torch.arange(len(images), device=images.device)
        try:
            self.returned = self.run(self.attack, everything)
        except DoesNotApply as reason:
            self.stopped = str(reason)
        self.attacked = self.usable(self.returned, everything)
        self.scores = self.look(self.attacked)
        self.standing = (~self.broken(self.scores, self.labels)).nonzero()[:, 0]

    def _take_image_half(self) -> None:
        """Of an attack on images and texts take what changes images, and the classifier with the prompts attacked."""
        if not getattr(self.attack, "changes_images", True):
            raise ValueError(f"attack={self.attack!r} changes no images; audit one that does, or read its texts")
        if callable(self.attack) or callable(self.attack.inner):
            self.attack = self.attack if callable(self.attack) else self.attack.inner
            return
        given, plain = self.classifier, undefended(self.classifier)
        target = Target(plain.clip, plain.classes, None if given is plain else partial(rebuilt, given))
        pair = self.attack.pairs(target, self.images[:1], self.labels[:1])[-1]
        self.unmatched = "each image is scored with a text of its own, which no rival faces" if pair.own else ""
        self.attack = ImageHalf(self.attack, target)
        self.classifier = rebuilt(given, ZeroShotClassifier(plain.clip, pair.classes))
        self.clean = self.look(self.images)

    def look(self, images: Tensor, size: int | None = None, classifier: Classifier | None = None) -> Tensor:
        """Logits (n, classes), batch by batch."""
        asked = self.classifier if classifier is None else classifier
        with torch.no_grad():
            return torch.cat([logits_of(asked, part) for part in images.split(size or self.batch_size)])

    def run(self, attack: AnyAttack, rows: Tensor) -> Tensor:
        """What an attack makes of some rows, batch by batch; without gradients there is nothing to run."""
        parts = zip(self.images[rows].split(self.batch_size), self.labels[rows].split(self.batch_size), strict=True)
        found = []
        for images, labels in parts:
            try:
                found.append(attack(self.classifier, images, labels))
            except (ValueError, RuntimeError) as error:
                if "grad" not in str(error):
                    raise
                raise DoesNotApply(f"the attack stopped because {error}") from error
            got = tuple(found[-1].shape) if isinstance(found[-1], Tensor) else f"a {type(found[-1]).__name__}"
            if got != tuple(images.shape):
                raise ValueError(f"the attack returned {got} for images of shape {tuple(images.shape)}; repair it")
        return torch.cat(found).detach().to(self.images)

    def usable(self, found: Tensor, rows: Tensor) -> Tensor:
        """What was returned, as images: those with NaN or infinity as they were before, all within [0, 1]."""
        finite = found.isfinite().flatten(1).all(1)
        return torch.where(finite[:, None, None, None], found, self.images[rows]).clamp(0, 1)

    def broken(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Where the attack has what it wants: another class, or its target class."""
        target, guess = self.setting("target_class"), logits.argmax(1)
        return guess != labels if target is None else guess == target

    def apart(self, first: Tensor, second: Tensor) -> float:
        """The largest difference between two tables of logits, as a share of the spread."""
        return float((first - second).abs().max()) / self.spread

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the attack, if it has it."""
        return getattr(inside(self.attack), name, default)

    def ball(self) -> dict[str, Any]:
        """Budget and norm, which a rival has to keep; only for attacks that want any wrong class."""
        eps, norm = self.setting("eps", math.inf), self.setting("norm", "linf")
        require(math.isfinite(eps) and norm in NORMS, "the attack has no budget 'eps' that a rival could keep")
        require(not self.unmatched, self.unmatched)
        require(self.setting("target_class") is None, "the attack wants one target class, its rival any wrong one")
        return {"eps": eps, "norm": norm}

    def seeds(self, count: int) -> list[int]:
        """Seeds far from those that the attack uses."""
        first = self.setting("seed", 0) + 15485863 * (self.seed + 1)
        return [(first + 104729 * turn) % MAX_SEED for turn in range(count)]

    def rival(self, name: str, attacks: Sequence[AnyAttack], rows: Tensor | None = None) -> Seen:
        """How many of the images that stood, or of some rows of them, fall to any of the attacks."""
        require(not self.unmatched, self.unmatched)
        tried, of = (self.standing, len(self.labels)) if rows is None else (rows, max(1, len(rows)))
        left = tried
        for attack in attacks:
            if len(left):
                found = self.usable(self.run(attack, left), left)
                left = left[~self.broken(self.look(found), self.labels[left])]
        fallen, whole = len(tried) - len(left), f"; {of} images in all" if rows is None else ""
        text = f"{name} broke {fallen} of {len(tried)} images on which the attack had failed{whole}."
        return 100 * fallen / of, POINTS, text


def inside(attack: AnyAttack | Adversary) -> Any:
    """The attack inside those that only run another one, which has the settings."""
    return getattr(attack, "inner", attack)


def _changed(attack: AnyAttack, needed: str, **settings: Any) -> AnyAttack:
    """The attack with other settings, as far as it has them; it must have the one called `needed`."""
    if inside(attack) is not attack:
        return replace(attack, attack=_changed(attack.attack, needed, **settings))
    known = {one.name for one in fields(attack) if one.init} if is_dataclass(attack) else set()
    require(needed in known, f"the attack has no setting {needed!r}")
    return replace(attack, **{name: value for name, value in settings.items() if name in known})


# --- checks of the classifier -----------------------------------------------------------------------------------------


def random_output(case: Case) -> Seen:
    """Two passes over the same images must agree, of a defense that draws lots at two draws."""
    first, second = case.look(case.images), case.look(case.images, classifier=redrawn(case.classifier, 1))
    share, turned = case.apart(first, second), int((first.argmax(1) != second.argmax(1)).sum())
    text = f"Two passes over the same images differ by {share:.2g} of the spread of logits; {turned} decisions turn."
    return share, SAME, text


class _GradientWatch(TorchFunctionMode):
    """Counts the operations that run with gradients switched on."""

    seen = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen += torch.is_grad_enabled()
        return func(*args, **(kwargs or {}))


def inference_work(case: Case) -> Seen:
    """A forward pass must leave gradients off where its caller has them off; else it may optimise at test time."""
    with torch.no_grad(), _GradientWatch() as watch:
        case.classifier(case.images[: case.batch_size])
    text = f"{watch.seen} operations of a forward pass ran with gradients on, although its caller had them off."
    return float(watch.seen), 0.0, text


def precision(case: Case) -> Seen:
    """Clear decisions on attacked images must be the same in bfloat16: on a CLIP's fast twin, or by autocast."""
    require(not isinstance(case.classifier, Single), "the classifier computes in half precision anyway")
    require(random_output(case)[0] <= SAME, "two passes over the same images differ anyway")
    plain = isinstance(case.classifier, ZeroShotClassifier) and isinstance(case.classifier.clip, Clip)
    twin = fast_classifier(case.classifier) if plain else case.classifier
    with torch.autocast(case.images.device.type, torch.bfloat16, enabled=not plain):
        fast = case.look(case.attacked, classifier=twin).float()
    flips = fast.argmax(1) != case.scores.argmax(1)
    gap = case.scores.amax(1) - case.scores.gather(1, fast.argmax(1)[:, None])[:, 0]
    clear, stand = int((flips & (gap > ROUNDING * case.spread)).sum()), int((~case.broken(fast, case.labels)).sum())
    text = f"In bfloat16 {int(flips.sum())} of {len(flips)} decisions on attacked images turn, {clear} of them clear; "
    return 100 * clear / len(flips), POINTS, f"{text}{stand} images stand instead of {len(case.standing)}."


def gradients(case: Case) -> Seen:
    """Cross-entropy and margin must have a finite input gradient that is not all zero, on correct images."""
    if case.stopped:
        return 100.0, GRADIENTS, f"There is no gradient to follow: {case.stopped}."
    require(len(case.correct) > 0, "no image is classified correctly")
    n, parts = len(case.correct), case.correct.split(case.batch_size)
    entropy, other = (sum(_dead(case, rows, loss) for rows in parts) for loss in ("ce", "margin"))
    why = ": the softmax saturates" if entropy > other else ""
    text = f"Cross-entropy has no usable gradient on {entropy} of {n} images, the margin of the logits on {other}{why}."
    return 100 * max(entropy, other) / n, GRADIENTS, text


def _dead(case: Case, rows: Tensor, loss: str) -> int:
    """On how many images the gradient of the loss is zero, missing or not finite."""
    images = case.images[rows].clone().requires_grad_()
    with torch.enable_grad():
        total = LOSSES[loss](case.classifier(images), case.labels[rows], None).sum()
    if not total.requires_grad:
        return len(rows)
    (slope,) = torch.autograd.grad(total, images, materialize_grads=True)
    size = slope.flatten(1).abs().amax(1)
    return int((~(size.isfinite() & (size > 0))).sum())


def neighbours(case: Case) -> Seen:
    """Logits of clean and attacked images must be the same alone, and in another order and batch size."""
    require(random_output(case)[0] <= SAME, "two passes over the same images differ anyway")
    moves = []
    for images, logits in ((case.images, case.clean), (case.attacked, case.scores)):
        moves.append(case.apart(logits[:ALONE], case.look(images[:ALONE], size=1)))
        moves.append(case.apart(logits, case.look(images.flip(0), size=max(2, case.batch_size // 3)).flip(0)))
    text = f"Logits move by up to {max(moves):.2g} of their spread when an image is alone or in other company."
    return max(moves), COMPANY, text


# --- checks of the attack ---------------------------------------------------------------------------------------------


def budget(case: Case) -> Seen:
    """What the attack returns must be images: numbers in [0, 1], no farther from the clean ones than its budget."""
    require(not case.stopped, case.stopped)
    returned, eps, norm = case.returned, case.setting("eps", math.inf), case.setting("norm", "linf")
    numbers = returned.isfinite().flatten(1).all(1)
    outside = numbers & ((returned < -SLACK) | (returned > 1 + SLACK)).flatten(1).any(1)
    far = torch.zeros_like(outside)
    if norm in NORMS and eps < math.inf:
        change = returned - case.images
        far = numbers & ((change - NORMS[norm].project(change, eps)).flatten(1).abs().amax(1) > SLACK + SLACK * eps)
    wrong = int((~numbers | outside | far).sum())
    text = f"{int((~numbers).sum())} returned images hold NaN or infinity, {int(outside.sum())} leave [0, 1], "
    return 100 * wrong / len(returned), 0.0, f"{text}{int(far.sum())} leave the budget."


def noise(case: Case) -> Seen:
    """Uniform noise must not break what the attack could not."""
    starts = [PGD(**case.ball(), seed=seed).first_points for seed in case.seeds(DRAWS)]
    draws = [lambda classifier, images, labels, start=start: start(images) for start in starts]
    return case.rival(f"{DRAWS} draws of uniform noise", draws)


def single_step(case: Case) -> Seen:
    """One step of length eps must not break what the iterative attack could not."""
    passes = case.setting("passes", lambda classes: (math.inf, 0))(case.clean.shape[1])
    several = sum(passes) > SHORT and case.setting("steps") != 1
    require(several, "the attack does not take several steps itself")
    step = PGD(**case.ball(), steps=1, step_size=case.setting("eps"), start="image")
    return case.rival("A single gradient step", [step])


def loss_path(case: Case) -> Seen:
    """The loss must rise along an ascent, from its first point to the last quarter of its points."""
    climbs = case.setting("loss") is not None and case.setting("steps") is not None
    require(climbs, "the attack does not climb a loss step by step as PGD does")
    require(len(case.correct) > 0, "no image is classified correctly")
    stood = torch.isin(case.correct, case.standing)
    rows = torch.cat([case.correct[stood], case.correct[~stood]])[:FOLLOWED]
    level = sum(not _rises(case, row) for row in rows[:, None])
    text = f"On {level} of {len(rows)} images followed along the attack's path the loss did not rise."
    return 100 * level / len(rows), FALLING, text


def _rises(case: Case, row: Tensor) -> bool:
    """Whether the attack breaks the image of this row (1,), or ends at a higher loss than it started from."""
    image, label, losses = case.images[row], case.labels[row], []

    def followed(images: Tensor) -> Tensor:
        logits = case.classifier(images)
        if not torch.equal(images.detach(), image):  # the attack has moved it
            losses.append(float(LOSSES["ce"](logits.detach(), label, None)))
        return logits

    if case.broken(case.look(case.run(lambda _, *pair: case.attack(followed, *pair), row)), label):
        return True
    require(len(losses) > 2, "the attack asks the classifier at fewer than three points of an image that withstood it")
    last = losses[-math.ceil(len(losses) / 4) :]
    return sum(last) / len(last) > losses[0]


def large_budget(case: Case) -> Seen:
    """Where every image may become mid-gray, the same attack must reach what a constant guess reaches."""
    ball, n, step = case.ball(), len(case.labels), case.setting("step_size")
    eps = max(ball["eps"], LARGE if ball["norm"] == "linf" else LARGE * math.sqrt(case.images[0].numel()))
    strong = _changed(case.attack, "eps", eps=eps, step_size=step and step * eps / max(ball["eps"], 1e-12))
    fallen, _, text = case.rival(f"With eps={eps:.3g} the attack", [strong])
    left = 100 * len(case.standing) / n - fallen
    chance = 100 * max(1 / case.clean.shape[1], int(case.labels.bincount().max()) / n)
    text += f" {left:.1f} % of all images stand, and a constant guess would be right on {chance:.1f} %."
    return left, chance + 1e-9, text


def transfer(case: Case) -> Seen:
    """Adversarial images of another classifier must not break what the attack could not.

    They do not stop at the first success: what just fools one classifier seldom fools another.
    """
    attack, (other, name) = PGD(**case.ball(), seed=case.seed, stop=False), _surrogate(case)
    return case.rival(f"Adversarial images made on {name}", [lambda _, *pair: attack(other, *pair)])


def _surrogate(case: Case) -> tuple[Classifier, str]:
    """The classifier given; else the zero-shot classifier inside a defense; else a copy with perturbed weights."""
    if case.surrogate is not None:
        return case.surrogate, "another classifier"
    require(isinstance(case.classifier, nn.Module), "there is no other classifier: give one as surrogate=")
    for module in case.classifier.modules():
        if isinstance(module, ZeroShotClassifier) and module is not case.classifier:
            return module, "the undefended classifier"
    twin, generator = copy.deepcopy(case.classifier), torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for weight in twin.parameters():
            weight += DEVIATION * weight.std(correction=0) * torch.randn(weight.shape, generator=generator).to(weight)
    return twin, "a copy with perturbed weights"


def more_steps(case: Case) -> Seen:
    """Four times the steps must not break more."""
    longer = _changed(case.attack, "steps", steps=STEPS * case.setting("steps", 1))
    return case.rival(f"{STEPS} times the steps", [longer])


def more_restarts(case: Case) -> Seen:
    """Four more runs from other random points must not break more."""
    seeds = case.seeds(RESTARTS)
    start = "random" if case.setting("start") == "image" else case.setting("start")
    attacks = [_changed(case.attack, "seed", seed=seed, restarts=1, start=start) for seed in seeds]
    return case.rival(f"{RESTARTS} more random starts", attacks)


def square(case: Case) -> Seen:
    """A random search without gradients must not break what the attack could not."""
    attack = Square(**case.ball(), queries=QUERIES, seed=case.seed)
    nearest = margin(case.scores, case.labels)[case.standing].argsort(descending=True, stable=True)[:NEAREST]
    text = f"Square with {QUERIES} queries, on the images nearest to the decision boundary,"
    return case.rival(text, [attack], case.standing[nearest])


# --- the audit --------------------------------------------------------------------------------------------------------

_CHEAP = (random_output, inference_work, precision, gradients, neighbours, budget, noise, single_step, loss_path)
_DEAR = (large_budget, transfer, more_steps, more_restarts, square)
CHECKS: dict[str, Callable[[Case], Seen]] = {check.__name__.replace("_", "-"): check for check in _CHEAP + _DEAR}


def audit(
    classifier: Classifier,
    attack: AnyAttack,
    images: Tensor,
    labels: Tensor,
    *,
    checks: Sequence[str] = tuple(CHECKS),
    seed: int = 0,
    surrogate: Classifier | None = None,
    batch_size: int = 64,
) -> Audit:
    """Run the checks on (n, 3, h, w) pixels in [0, 1] and (n,) labels; 50 to 200 images are enough.

    The classifier is any module or function over pixels. Images in half precision, for a model that computes in it, are
    attacked in float32. `surrogate` is the other classifier on which "transfer" makes its images, such as the one
    without the defense.
    """
    for name in checks:
        check_choice("check", name, CHECKS)
    check_integer("seed", seed, 0, MAX_SEED)
    check_integer("batch_size", batch_size, 1)
    if not len(check_images(images)):
        raise ValueError("images is empty; give at least one image, better 50 or more")
    if images.dtype in (torch.float16, torch.bfloat16):
        classifier, images = Single(classifier, images.dtype), images.float()
    # Random classifiers draw from the global states: they are seeded, and given back as they were.
    with frozen(classifier), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        case = Case(classifier, attack, images, labels, seed, batch_size, surrogate)
        return Audit(tuple(_find(name, case) for name in progress(checks, "audit", unit="check")))


def _find(name: str, case: Case) -> Finding:
    """Run one check, always from the same random state."""
    torch.manual_seed(case.seed)
    try:
        value, limit, text = CHECKS[name](case)
    except DoesNotApply as reason:
        return Finding(name, None, math.nan, math.nan, f"Not run: {reason}.")
    return Finding(name, not value <= limit, value, limit, text)  # NaN is flagged
