"""Can this robust accuracy be believed? An audit of a (classifier, attack, images) triple.

Each check looks for one known way in which an attack fails and a classifier looks robust without being so. A flag is a
reason to doubt, and no flag proves nothing; but each image that a check breaks after the attack failed on it is proof.

    report = audit(classifier, PGD(eps=2 / 255), images, labels)
    report.flags      # ("more-steps",)
    report.frame()    # one row per check, with the numbers in words

A check that does not apply (noise has no steps) is neither flagged nor passed: `flagged` is None, `text` says why.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustclip.attacks.base import MAX_SEED, NORMS, Classifier, frozen, own_noise
from robustclip.attacks.gradient import FGSM, PGD, Ascent, UniformNoise
from robustclip.attacks.losses import LOSSES, margin
from robustclip.attacks.square import Square
from robustclip.checks import check_choice, check_images, check_integer, check_labels
from robustclip.component import component
from robustclip.fast import fast_classifier
from robustclip.models import Clip, ZeroShotClassifier
from robustclip.progress import progress

# More than half a point is the size that matters in a table. No test of significance is needed: outcomes are paired,
# and only images that stood are attacked again, so each one that falls lowers the very number that was to be reported.
POINTS = 0.5
GRADIENTS = 5.0  # percent of images without a usable gradient: a few dead ones happen, more is masking
FALLING = 25.0  # percent of followed images whose loss does not rise: a wrong gradient makes it half of them or more
FOLLOWED = 8  # images followed alone along the attack's path
SAME = 1e-4  # of the spread of logits, between two equal passes: float32 kernels that race differ by 1e-6
COMPANY = 0.02  # of the spread of logits, alone or in a batch: bfloat16 kernels for other batch sizes come near 0.01
ROUNDING = 0.04  # of the spread of logits: two logits that bfloat16 moves by up to 0.016 each cannot change places
ALONE = 16  # images looked at alone
DRAWS = 10  # of uniform noise
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


# --- what the checks look at ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The triple under audit, and what the attack did to it; everything is computed once."""

    classifier: Classifier
    attack: Callable[[Classifier, Tensor, Tensor], Tensor]
    images: Tensor
    labels: Tensor
    seed: int
    batch_size: int
    surrogate: Classifier | None

    def look(self, images: Tensor, size: int | None = None) -> Tensor:
        """Logits (n, classes), batch by batch."""
        with torch.no_grad():
            return torch.cat([self.classifier(part) for part in images.split(size or self.batch_size)])

    def run(self, attack: Callable, rows: Tensor, classifier: Classifier | None = None) -> Tensor:
        """Adversarial images for some rows, batch by batch; without gradients there is nothing to run."""
        parts = zip(self.images[rows].split(self.batch_size), self.labels[rows].split(self.batch_size), strict=True)
        try:
            return torch.cat([attack(classifier or self.classifier, *part) for part in parts])
        except (ValueError, RuntimeError) as error:
            if "grad" not in str(error):
                raise
            raise DoesNotApply(f"the attack stopped because {error}") from error

    @cached_property
    def clean(self) -> Tensor:
        """Logits of the images."""
        return self.look(self.images)

    @cached_property
    def correct(self) -> Tensor:
        """Rows that are classified correctly."""
        return (self.clean.argmax(1) == self.labels).nonzero()[:, 0]

    @cached_property
    def attempt(self) -> tuple[Tensor, str]:
        """Adversarial images; or the images themselves, and why the attack cannot run."""
        try:
            return self.run(self.attack, torch.arange(len(self.images), device=self.images.device)), ""
        except DoesNotApply as reason:
            return self.images, str(reason)

    @cached_property
    def scores(self) -> Tensor:
        """Logits of the adversarial images."""
        return self.look(self.attempt[0])

    @cached_property
    def standing(self) -> Tensor:
        """Rows that the attack did not break."""
        return (~self.broken(self.scores, self.labels)).nonzero()[:, 0]

    def broken(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Where the attack has what it wants: another class, or its target class."""
        target, guess = self.setting("target_class"), logits.argmax(1)
        return guess != labels if target is None else guess == target

    @cached_property
    def spread(self) -> float:
        """Largest minus smallest logit of a typical image, the yardstick for differences of logits."""
        return max(float((self.clean.amax(1) - self.clean.amin(1)).median()), 1e-12)

    def apart(self, first: Tensor, second: Tensor) -> float:
        """The largest difference between two tables of logits, as a share of the spread."""
        return float((first - second).abs().max()) / self.spread

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the attack, if it has it."""
        return getattr(_inner(self.attack), name, default)

    def changed(self, needed: str, **settings: Any) -> Callable:
        """The attack with other settings, as far as it has them; it must have the one called `needed`."""
        own = _inner(self.attack)
        known = [one.name for one in fields(own) if one.init] if is_dataclass(own) else []
        if needed not in known:
            raise DoesNotApply(f"the attack has no setting {needed!r}")
        return _with_inner(self.attack, replace(own, **{name: settings[name] for name in known if name in settings}))

    def ball(self) -> dict[str, Any]:
        """Budget and norm, which a rival has to keep; only for attacks that want any wrong class."""
        eps, norm = self.setting("eps", math.inf), self.setting("norm", "linf")
        if not math.isfinite(eps) or norm not in NORMS:
            raise DoesNotApply("the attack has no budget 'eps' that a rival could keep")
        if self.setting("target_class") is not None:
            raise DoesNotApply("the attack wants one target class, its rival any wrong one")
        return {"eps": eps, "norm": norm}

    def steady(self) -> None:
        """End the check if the classifier is random, as each pass is another classifier then."""
        if random_output(self).flagged:
            raise DoesNotApply("two passes over the same images differ anyway")

    def rival(self, name: str, tries: Iterable[Callable[[Tensor], Tensor]], rows: Tensor | None = None) -> Finding:
        """How many images that stood fall to any of the tries (rows -> images), one after the other."""
        tried, of = (self.standing, len(self.labels)) if rows is None else (rows, max(1, len(rows)))
        left = tried
        for attempt in tries:
            if len(left):
                left = left[~self.broken(self.look(attempt(left)), self.labels[left])]
        fallen = len(tried) - len(left)
        whole = f"; {of} images in all" if rows is None else ""
        text = f"{name} broke {fallen} of {len(tried)} images on which the attack had failed{whole}."
        return finding(100 * fallen / of, POINTS, text)


def _inner(attack: Any) -> Any:
    """The attack inside those that only run another one, such as `Fast`."""
    own = getattr(attack, "attack", None)
    return _inner(own) if is_dataclass(own) else attack


def _with_inner(attack: Any, inner: Any) -> Any:
    """The same around another inner attack."""
    return inner if _inner(attack) is attack else replace(attack, attack=_with_inner(attack.attack, inner))


def finding(value: float, limit: float, text: str) -> Finding:
    """A finding that is flagged above its limit; `audit` adds the name of the check."""
    return Finding("", not value <= limit, value, limit, text)  # NaN is flagged


# --- checks of the classifier -----------------------------------------------------------------------------------------


def random_output(case: Case) -> Finding:
    """Two passes over the same images must agree."""
    first, second = case.look(case.images), case.look(case.images)
    share, turned = case.apart(first, second), int((first.argmax(1) != second.argmax(1)).sum())
    text = f"Two passes over the same images differ by {share:.2g} of the spread of logits; {turned} decisions turn."
    return finding(share, SAME, text)


class _GradientWatch(TorchFunctionMode):
    """Counts the operations that run with gradients switched on."""

    seen = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.seen += torch.is_grad_enabled()
        return func(*args, **(kwargs or {}))


def inference_work(case: Case) -> Finding:
    """A forward pass must leave gradients off where its caller has them off; else it may optimise at test time."""
    with torch.no_grad(), _GradientWatch() as watch:
        case.classifier(case.images[: case.batch_size])
    text = f"{watch.seen} operations of a forward pass ran with gradients on, although its caller had them off."
    return finding(float(watch.seen), 0.0, text)


def neighbours(case: Case) -> Finding:
    """Logits of clean and attacked images must be the same alone, and in another order and batch size."""
    case.steady()
    moves = []
    for images, logits in ((case.images, case.clean), (case.attempt[0], case.scores)):
        moves.append(case.apart(logits[:ALONE], case.look(images[:ALONE], size=1)))
        moves.append(case.apart(logits, case.look(images.flip(0), size=max(2, case.batch_size // 3)).flip(0)))
    text = f"Logits move by up to {max(moves):.2g} of their spread when an image is alone or in other company."
    return finding(max(moves), COMPANY, text)


def precision(case: Case) -> Finding:
    """Clear decisions on attacked images must be the same in bfloat16."""
    case.steady()
    fast = _fast_scores(case)
    flips = fast.argmax(1) != case.scores.argmax(1)
    gap = case.scores.amax(1) - case.scores.gather(1, fast.argmax(1)[:, None])[:, 0]
    clear, stand = int((flips & (gap > ROUNDING * case.spread)).sum()), ~case.broken(fast, case.labels)
    text = (
        f"In bfloat16 {int(flips.sum())} of {len(flips)} decisions on attacked images turn, {clear} of them clear; "
        f"{int(stand.sum())} images stand instead of {len(case.standing)}."
    )
    return finding(100 * clear / len(flips), POINTS, text)


def _fast_scores(case: Case) -> Tensor:
    """Logits of the attacked images in bfloat16: from the fast twin of a CLIP, elsewhere by autocast."""
    if isinstance(case.classifier, ZeroShotClassifier) and isinstance(case.classifier.clip, Clip):
        return replace(case, classifier=fast_classifier(case.classifier)).look(case.attempt[0])
    with torch.autocast(case.images.device.type, torch.bfloat16):
        return case.look(case.attempt[0]).float()


def gradients(case: Case) -> Finding:
    """Cross-entropy and margin must have a finite input gradient that is not all zero, on correct images."""
    if case.attempt[1]:
        return finding(100.0, GRADIENTS, f"There is no gradient to follow: {case.attempt[1]}.")
    if not len(case.correct):
        raise DoesNotApply("no image is classified correctly")
    parts = [_dead(case, rows) for rows in case.correct.split(case.batch_size)]
    entropy, other, n = (*torch.stack(parts).sum(0).tolist(), len(case.correct))
    why = ": the softmax saturates" if entropy > other else ""
    text = f"Cross-entropy has no usable gradient on {entropy} of {n} images, the margin of the logits on {other}{why}."
    return finding(100 * max(entropy, other) / n, GRADIENTS, text)


def _dead(case: Case, rows: Tensor) -> Tensor:
    """On how many images the gradient of cross-entropy, and of the margin, is zero, missing or not finite."""
    images, dead = case.images[rows].clone().requires_grad_(), []
    with torch.enable_grad():
        logits = case.classifier(images)
    for name in ("ce", "margin"):
        loss, size = LOSSES[name](logits, case.labels[rows], None).sum(), images.new_zeros(len(rows))
        if loss.requires_grad:
            (slope,) = torch.autograd.grad(loss, images, retain_graph=True, materialize_grads=True)
            size = slope.flatten(1).abs().amax(1)
        dead.append((~(size.isfinite() & (size > 0))).sum())
    return torch.stack(dead)


# --- checks of the attack ---------------------------------------------------------------------------------------------


def noise(case: Case) -> Finding:
    """Uniform noise must not break what the attack could not."""
    ball = case.ball()

    def draw(seed: int, rows: Tensor) -> Tensor:
        images = case.images[rows]
        return (images + NORMS[ball["norm"]].random(own_noise(images, seed), ball["eps"])).clamp(0, 1)

    return case.rival(f"{DRAWS} draws of uniform noise", [partial(draw, seed) for seed in _seeds(case, DRAWS)])


def _seeds(case: Case, count: int) -> list[int]:
    """Seeds far from those that the attack uses."""
    first = case.setting("seed", 0) + 15485863 * (case.seed + 1)
    return [(first + 104729 * turn) % MAX_SEED for turn in range(count)]


def single_step(case: Case) -> Finding:
    """One step of length eps must not break what the iterative attack could not."""
    if isinstance(_inner(case.attack), FGSM | UniformNoise) or case.setting("steps") == 1:
        raise DoesNotApply("the attack does not take several steps itself")
    step = PGD(**case.ball(), steps=1, step_size=case.setting("eps"), random_start=False)
    return case.rival("A single gradient step", [partial(case.run, step)])


class _Follower(nn.Module):
    """The classifier, noting the loss of the one image that an attack moves."""

    def __init__(self, classifier: Classifier, image: Tensor, label: Tensor) -> None:
        super().__init__()
        self.inner, self.image, self.label, self.losses, self.training = classifier, image, label, [], False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, images: Tensor) -> Tensor:
        """Logits as ever; where the image has moved, its loss is noted."""
        logits = self.inner(images)
        if images.shape != self.image.shape or not torch.equal(images.detach(), self.image):
            self.losses.append(float(LOSSES["ce"](logits.detach(), self.label.expand(len(logits)), None).mean()))
        return logits


def loss_path(case: Case) -> Finding:
    """The loss must rise along an ascent, from its first point to the last quarter of its points."""
    if not isinstance(_inner(case.attack), Ascent):
        raise DoesNotApply("the attack does not climb a loss step by step as PGD does")
    stood = torch.isin(case.correct, case.standing)
    rows = torch.cat([case.correct[stood], case.correct[~stood]])[:FOLLOWED]
    if not len(rows):
        raise DoesNotApply("no image is classified correctly")
    level = sum(not _rises(case, row) for row in rows)
    text = f"On {level} of {len(rows)} images followed along the attack's path the loss did not rise."
    return finding(100 * level / len(rows), FALLING, text)


def _rises(case: Case, row: Tensor) -> bool:
    """Whether the attack breaks this image or ends at a higher loss than it started from."""
    follower = _Follower(case.classifier, case.images[row, None], case.labels[row, None])
    attacked = case.run(case.attack, row[None], follower)
    if case.broken(case.look(attacked), case.labels[row, None]).all():
        return True
    if len(follower.losses) < 3:
        raise DoesNotApply("the attack asks the classifier at fewer than three points of an image that withstood it")
    last = follower.losses[-math.ceil(len(follower.losses) / 4) :]
    return sum(last) / len(last) > follower.losses[0]


def large_budget(case: Case) -> Finding:
    """Where every image may become mid-gray, the same attack must reach what a constant guess reaches."""
    ball, n, step = case.ball(), len(case.labels), case.setting("step_size")
    eps = max(ball["eps"], LARGE if ball["norm"] == "linf" else LARGE * math.sqrt(case.images[0].numel()))
    strong = case.changed("eps", eps=eps, step_size=step and step * eps / max(ball["eps"], 1e-12))
    fallen = case.rival(f"With eps={eps:.3g} the attack", [partial(case.run, strong)])
    left = 100 * len(case.standing) / n - fallen.value
    chance = 100 * max(1 / case.clean.shape[1], int(case.labels.bincount().max()) / n)
    text = f"{left:.1f} % of all images stand, and a constant guess would be right on {chance:.1f} %."
    return finding(left, chance + 1e-9, f"{fallen.text} {text}")


def more_steps(case: Case) -> Finding:
    """Four times the steps must not break more."""
    longer = case.changed("steps", steps=STEPS * case.setting("steps", 1))
    return case.rival(f"{STEPS} times the steps", [partial(case.run, longer)])


def more_restarts(case: Case) -> Finding:
    """Four more runs from other random points must not break more."""
    attacks = [case.changed("seed", seed=seed, restarts=1, random_start=True) for seed in _seeds(case, RESTARTS)]
    return case.rival(f"{RESTARTS} more random starts", [partial(case.run, attack) for attack in attacks])


# --- rival attacks ----------------------------------------------------------------------------------------------------


@component
class _Persistent(PGD):
    """PGD that never stops at the first success: what just fools one classifier seldom fools another."""

    def won(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Never."""
        return torch.zeros(len(scores), dtype=torch.bool, device=scores.device)


def transfer(case: Case) -> Finding:
    """Adversarial images of another classifier must not break what the attack could not."""
    attack = _Persistent(**case.ball(), seed=case.seed)
    other, name = _surrogate(case)
    return case.rival(f"Adversarial images made on {name}", [partial(case.run, attack, classifier=other)])


def _surrogate(case: Case) -> tuple[Classifier, str]:
    """The classifier given; else the zero-shot classifier inside a defense; else a copy with perturbed weights."""
    if case.surrogate is not None:
        return case.surrogate, "another classifier"
    if not isinstance(case.classifier, nn.Module):
        raise DoesNotApply("there is no other classifier: give one as surrogate=")
    for module in case.classifier.modules():
        if isinstance(module, ZeroShotClassifier) and module is not case.classifier:
            return module, "the undefended classifier"
    twin, generator = copy.deepcopy(case.classifier), torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for weight in twin.parameters():
            change = torch.randn(weight.shape, generator=generator).to(weight)
            weight += DEVIATION * weight.std(correction=0) * change
    return twin, "a copy with perturbed weights"


def square(case: Case) -> Finding:
    """A random search without gradients must not break what the attack could not."""
    attack = Square(**case.ball(), queries=QUERIES, seed=case.seed)
    nearest = margin(case.scores, case.labels)[case.standing].argsort(descending=True, stable=True)[:NEAREST]
    text = f"Square with {QUERIES} queries, on the images nearest to the decision boundary,"
    return case.rival(text, [partial(case.run, attack)], case.standing[nearest])


# --- the audit --------------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[[Case], Finding]] = {
    "random-output": random_output,
    "inference-work": inference_work,
    "precision": precision,
    "gradients": gradients,
    "neighbours": neighbours,
    "noise": noise,
    "single-step": single_step,
    "loss-path": loss_path,
    "large-budget": large_budget,
    "transfer": transfer,
    "more-steps": more_steps,
    "more-restarts": more_restarts,
    "square": square,
}  # cheap ones first


def audit(
    classifier: Classifier,
    attack: Callable[[Classifier, Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    checks: Sequence[str] = tuple(CHECKS),
    seed: int = 0,
    surrogate: Classifier | None = None,
    batch_size: int = 64,
) -> Audit:
    """Run the checks on (n, 3, h, w) pixels in [0, 1] and (n,) labels; 50 to 200 images are enough.

    `surrogate` is the other classifier on which "transfer" makes its images, such as the one without the defense.
    """
    for name in checks:
        check_choice("check", name, CHECKS)
    check_integer("seed", seed, 0, MAX_SEED)
    check_integer("batch_size", batch_size, 1)
    if not len(check_images(images)):
        raise ValueError("images is empty; give at least one image, better 50 or more")
    case = Case(classifier, attack, images.detach(), labels.to(images.device).long(), seed, batch_size, surrogate)
    with frozen(classifier):
        with _seeded(case):
            check_labels(labels, case.clean.shape[1], len(images))
            if not case.clean.isfinite().all():
                raise ValueError("the classifier gives NaN or infinite logits; restore or retrain its checkpoint")
            case.standing  # noqa: B018  the attack runs here, so that no check depends on those before it
        return Audit(tuple(_find(name, case) for name in progress(checks, "audit", unit="check")))


def _find(name: str, case: Case) -> Finding:
    """Run one check, always from the same random state."""
    with _seeded(case):
        try:
            return replace(CHECKS[name](case), check=name)
        except DoesNotApply as reason:
            return Finding(name, None, math.nan, math.nan, f"Not run: {reason}.")


@contextmanager
def _seeded(case: Case) -> Iterator[None]:
    """Random classifiers draw from the global state: seed it here, and give it back as it was."""
    device = case.images.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(case.seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(case.seed)
        yield
