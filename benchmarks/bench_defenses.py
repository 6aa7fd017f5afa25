"""Defenses at test time against the bare passes of the image tower that they declare, and COLA's transport against POT.

A ratio of 1 says that a defense costs what its passes cost; transport is solved for all classes of a set of 200, a
batch of 100 images, five views and fifty texts, by us in one call and by POT problem after problem.
"""

from functools import partial

import ot
import torch
from side_by_side import Timing, side_by_side
from torch import Tensor

from robustclip import models, study
from robustclip.data.roles import role, tinyworld_samples
from robustclip.defenses.base import Defended, Defense
from robustclip.defenses.cola import COLA
from robustclip.defenses.transport import sinkhorn
from robustclip.models import ZeroShotClassifier, count_passes
from robustclip.progress import progress
from robustclip.study.named import DEFENSES

IMAGES = 100
DEAR = ("Ensemble", "TPT", "R-TPT", "MTA")  # 64 views: on fewer images
EVERY = 50  # POT solves the problems of one image in so many
SMOOTHING, SWEEPS = 0.1, 100  # of POT, which stops when it has converged


def measure(rounds: int = 3) -> list[dict]:
    """One row per defense, and two on transport."""
    scale = study.scale("quick")
    classifier = models.zero_shot(models.load(device="cpu"), role("cifar10"))
    rows = [duel(name, scale.defense(name), classifier, rounds) for name in progress(DEFENSES, "defenses", unit="case")]
    return [*rows, transport(rounds), share(rounds)]


def pictures(n: int) -> Tensor:
    """Pictures of role `cifar10`."""
    return tinyworld_samples("cifar10", "test", n)[0].float() / 255


def duel(name: str, defense: Defense, classifier: ZeroShotClassifier, rounds: int) -> dict:
    """A defense's answers against as many passes forward, and backward, of the bare tower on the same pictures."""
    images = pictures(IMAGES // 10 if name in DEAR else IMAGES)
    ours = partial(answer, defense(classifier), images)
    with count_passes() as passes:
        ours()
    timing = side_by_side(ours, partial(bare, classifier, images, passes.forward, passes.backward), rounds)
    counted = f"{passes.forward / len(images):.1f} passes forward, {passes.backward / len(images):.1f} backward each"
    return timing.row(f"{name}, against its bare passes", note=f"{len(images)} pictures; {counted}")


@torch.no_grad()
def answer(defended: Defended, images: Tensor) -> Tensor:
    """What a defended classifier says."""
    return defended(images)


def bare(classifier: ZeroShotClassifier, images: Tensor, forward: int, backward: int) -> None:
    """So many images through the tower: `backward` of them there and back, the rest forward only."""
    encode = classifier.clip.encode_images
    for turn in range(round(backward / len(images))):
        points = (images + turn * 1e-6).requires_grad_()
        torch.autograd.grad(encode(points).sum(), points)
    with torch.no_grad():
        for _ in range(round((forward - backward) / len(images))):
            encode(images)


def problems() -> tuple[Tensor, Tensor, Tensor]:
    """Cost (100, 200, 5, 50) and marginals like those of COLA."""
    generator = torch.Generator().manual_seed(0)
    cost = 0.6 + 0.4 * torch.rand(IMAGES, 200, 5, 50, generator=generator)
    rows, columns = (torch.rand(IMAGES, 200, side, generator=generator).softmax(-1) for side in (5, 50))
    return cost, rows, columns


def transport(rounds: int) -> dict:
    """All problems of a batch, against a loop over POT's solver on those of a few images."""
    cost, rows, columns = problems()
    few = [part[::EVERY].double().flatten(0, 1).numpy() for part in (cost, rows, columns)]

    def theirs() -> list:
        return [ot.sinkhorn(a / a.sum(), b / b.sum(), one, SMOOTHING, numItermax=SWEEPS)
                for one, a, b in zip(*few, strict=True)]  # fmt: skip

    ours = partial(sinkhorn, cost, rows, columns, SMOOTHING, COLA().sweeps)
    timing = side_by_side(ours, theirs, rounds)
    plans = torch.tensor(timing.rival_result).float().view(-1, 200, 5, 50)
    apart = float((plans - timing.our_result[::EVERY]).abs().max())
    whole = Timing(timing.ours, [EVERY * spent for spent in timing.rival], None, None)
    return whole.row(
        "COLA's transport, 200 classes, batch of 100, against a loop over POT",
        note=f"rival: {len(plans)} images times {EVERY} (linear); plans differ by {apart:.1e} at most",
    )


def share(rounds: int) -> dict:
    """The whole of COLA on a set of 200 classes, against its transport alone: the ratio's inverse is its share."""
    classifier = models.zero_shot(models.load(device="cpu"), role("tinyimagenet"))
    whole = partial(answer, COLA()(classifier), pictures(IMAGES))
    timing = side_by_side(partial(sinkhorn, *problems(), SMOOTHING, COLA().sweeps), whole, rounds)
    return timing.row(
        "COLA's transport, against all of COLA", note="200 classes, batch of 100: all takes so many times"
    )
