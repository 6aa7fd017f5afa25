"""AutoAttack against torchattacks' AutoAttack, and what attacks cost as images, steps, classes and budgets grow.

Ours is `Fast(attack=AutoAttack(...))`, with its check of every image in float32 inside the time. torchattacks runs ten
steps of APGD and FAB and 5,000 queries of Square; so does ours here. Both leave broken images out of later parts.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_image import EPS, accuracy, pgd_trained
from resnet import trained_resnet
from side_by_side import seconds, side_by_side
from torch import Tensor

from robustclip import _torchvision, models
from robustclip.attacks import APGD, PGD, AutoAttack, Fast
from robustclip.data.roles import role, tinyworld_samples
from robustclip.progress import progress

_torchvision.prepare()
import torchattacks  # noqa: E402  torchvision has to be prepared first

IMAGES = {False: 200, True: 64}  # undefended, PGD-trained: there most images meet all 5,000 queries
STEPS, QUERIES = 10, 5000  # what torchattacks has fixed
RESNET_EPS, RESNET_IMAGES, RESNET_QUERIES = 1 / 255, 200, 1000
WEAK = 1 / 255  # a budget at which most images stand
BATCH = 32  # images attacked at once where their number grows


def measure(rounds: int = 3) -> list[dict]:
    """One row for the undefended embedded model, one for the PGD-trained one, one for a ResNet-20 of one's own."""
    cases = [partial(duel, False), partial(duel, True), on_resnet]
    return [case(rounds=rounds) for case in progress(cases, "AutoAttack", unit="case")]


def duel(trained: bool, rounds: int) -> dict:
    """Standard AutoAttack at 6/255 on both sides; accuracies in percent, in float32."""
    clip = pgd_trained("cifar10") if trained else models.load(device="cpu")
    classifier, (images, labels) = models.zero_shot(clip, role("cifar10")), pictures(IMAGES[trained])
    ours = Fast(attack=AutoAttack(eps=EPS, steps=STEPS, queries=QUERIES))
    rival = torchattacks.AutoAttack(classifier, eps=EPS, version="standard", seed=0)
    APGD(eps=EPS, steps=2)(classifier, images, labels)  # warm up: a whole round takes long
    with torch.random.fork_rng():
        timing = side_by_side(
            lambda: ours(classifier, images, labels), lambda: rival(images, labels), rounds, warm_up=False
        )
    return timing.row(
        f"AutoAttack (standard), {'PGD-trained' if trained else 'undefended'} {models.EMBEDDED[0]}, cifar10",
        accuracy_ours=accuracy(classifier, timing.our_result, labels),
        accuracy_rival=accuracy(classifier, timing.rival_result, labels),
        note=f"{IMAGES[trained]} images, {STEPS} steps, {QUERIES:,} queries, eps {EPS * 255:g}/255",
    )


def on_resnet(rounds: int, images: int = RESNET_IMAGES, queries: int = RESNET_QUERIES) -> dict:
    """Three parts of AutoAttack on a plain `nn.Module`; theirs, too, run on what the ones before left standing."""
    network, (pixels, labels) = trained_resnet(), pictures(images)
    ours = Fast(attack=AutoAttack(eps=RESNET_EPS, steps=STEPS, queries=queries, parts=("apgd-ce", "apgd-t", "square")))
    parts = [
        torchattacks.APGD(network, eps=RESNET_EPS, steps=STEPS, loss="ce"),
        torchattacks.APGDT(network, eps=RESNET_EPS, steps=STEPS, n_classes=10),
        torchattacks.Square(network, eps=RESNET_EPS, n_queries=queries),
    ]
    rival = torchattacks.MultiAttack(parts)
    with torch.random.fork_rng():
        timing = side_by_side(
            lambda: ours(network, pixels, labels), lambda: rival(pixels, labels), rounds, warm_up=False
        )
    return timing.row(
        "APGD-CE, APGD-T and Square, own ResNet-20, cifar10",
        accuracy_ours=accuracy(network, timing.our_result, labels),
        accuracy_rival=accuracy(network, timing.rival_result, labels),
        note=f"{images} images, {STEPS} steps, {queries:,} queries, eps {RESNET_EPS * 255:g}/255",
    )


def pictures(n: int) -> tuple[Tensor, Tensor]:
    """Tinyworld's test images of ten classes, and their labels."""
    pixels, labels, _, _ = tinyworld_samples("cifar10", "test", n)
    return pixels.float() / 255, labels


# --- growth -----------------------------------------------------------------------------------------------------------


def scaling() -> list[dict]:
    """Seconds and peak memory of attacks on the undefended embedded model, one quantity growing at a time.

    The budget is small, so most images stand and no work goes away; only the sweep over budgets reaches 8/255.
    """
    cases = [
        *((by_images, attack, n) for attack in (PGD, APGD) for n in (32, 64, 128, 256)),
        *((by_steps, attack, steps) for attack in (PGD, APGD) for steps in (5, 10, 20, 40)),
        *((by_classes, PGD, classes) for classes in (10, 100, 1000)),
        *((case, PGD, count) for case in (by_budgets, by_budgets_apart) for count in (1, 2, 4, 8)),
    ]
    rows, works = [], []
    for case, attack, value in progress(cases, "seconds", unit="case"):
        works.append(case(attack, value))
        rows.append({"grows": case.__name__.removeprefix("by_"), "value": value, "attack": attack.__name__})
        rows[-1]["seconds"] = best_time(works[-1])
    ctypes.CDLL("libc.so.6").mallopt(-3, 2**16)  # large blocks come from the system and go back at once, but slower
    for row, work in zip(rows, progress(works, "memory", unit="case"), strict=True):
        row["peak_megabytes"] = peak_memory(work)
    return rows


Work = Callable[[], object]


def by_images(kind: type[PGD], n: int) -> Work:
    """Ten steps on n images, `BATCH` at a time."""
    classifier, (images, labels) = undefended(), pictures(n)
    attack, batches = kind(eps=WEAK, steps=10), list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    return lambda: [accuracy(classifier, attack(classifier, *batch), batch[1]) for batch in batches]


def by_steps(kind: type[PGD], steps: int) -> Work:
    """So many steps on one batch."""
    return partial(kind(eps=WEAK, steps=steps), undefended(), *pictures(BATCH))


def by_classes(kind: type[PGD], classes: int) -> Work:
    """Ten steps on one batch, on a head of so many classes."""
    classifier = models.ZeroShotClassifier(models.load(device="cpu"), role("imagenet").prompts[:classes])
    images, _ = pictures(BATCH)
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    return partial(kind(eps=WEAK, steps=10), classifier, images, labels)


def by_budgets(kind: type[PGD], count: int) -> Work:
    """So many budgets up to 8/255 in one call of `sweep`."""
    return partial(kind(eps=WEAK, steps=10).sweep, undefended(), *pictures(BATCH), budgets(count))


def by_budgets_apart(kind: type[PGD], count: int) -> Work:
    """The same budgets, each in a call of its own."""
    classifier, batch = undefended(), pictures(BATCH)
    return lambda: [kind(eps=eps, steps=10)(classifier, *batch) for eps in budgets(count)]


def budgets(count: int) -> list[float]:
    """Evenly spaced up to 8/255."""
    return [8 / 255 * (place + 1) / count for place in range(count)]


def undefended() -> models.ZeroShotClassifier:
    """The embedded model on ten classes."""
    return models.zero_shot(models.load(device="cpu"), role("cifar10"))


def best_time(work: Work, rounds: int = 2) -> float:
    """Seconds of the fastest round."""
    work()
    return min(seconds(work)[0] for _ in range(rounds))


def peak_memory(work: Work) -> float:
    """How far this process's memory rises above what was held before, in MB. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(entry: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{entry}:"))
    return int(line.split()[1]) / 1024
