"""PGD against torchattacks' PGD: the same model, images, budget and steps; both scored by the float32 model.

Ours is `Fast(attack=PGD(...))`, with its check of every image in float32 inside the time.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from side_by_side import seconds, side_by_side
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from robustclip import _torchvision, models
from robustclip.attacks import PGD
from robustclip.attacks.fast import Fast
from robustclip.data.roles import role, tinyworld_samples
from robustclip.fast import fast_classifier
from robustclip.models import Clip, ZeroShotClassifier
from robustclip.progress import progress
from robustclip.training import Pictures, TeCoA, train

_torchvision.prepare()
import torchattacks  # noqa: E402  torchvision has to be prepared first

BUILD = Path(__file__).resolve().parent.parent / "_build" / "benchmarks"
EPS = 6 / 255  # of 32 pixels
IMAGES = 512  # of Tinyworld, in one batch
VIT_EPS = 1 / 255  # of 224 pixels
BATCH = 32  # of ViT-B-32 on a CPU
GPU_BATCH = 256
RECIPE = TeCoA(eps=EPS)


def measure(rounds: int = 3) -> list[dict]:
    """One row per case, and on a machine with a GPU its throughput."""
    cases: list[Callable[[int], dict]] = [
        *(partial(embedded, name, trained) for trained in (False, True) for name in ("cifar10", "cifar100")),
        vit_attack,
        vit_gradients,
    ]
    if torch.cuda.is_available():
        cases += [partial(throughput, precision, "cuda", GPU_BATCH) for precision in ("bfloat16", "float32")]
    return [case(rounds=rounds) for case in progress(cases, "image attacks", unit="case")]


# --- the embedded model -----------------------------------------------------------------------------------------------


def embedded(name: str, trained: bool, rounds: int) -> dict:
    """PGD-20 at 6/255 on the embedded model or on its PGD-trained copy."""
    clip = pgd_trained(name) if trained else models.load(device="cpu")
    pixels, labels, _, _ = tinyworld_samples(name, "test", IMAGES)
    title = f"PGD-20, {'PGD-trained' if trained else 'undefended'} {models.EMBEDDED[0]}, {name}"
    return duel(title, models.zero_shot(clip, role(name)), pixels.float() / 255, labels, EPS, 20, rounds)


def pgd_trained(name: str) -> Clip:
    """The embedded model after adversarial fine-tuning on a role, trained once and kept under `_build`."""
    clip = models.load(device="cpu")
    folder = BUILD / f"pgd-{name}-{clip.digest}"
    if not (folder / models.WEIGHTS).is_file():
        models.save(train(RECIPE, clip, Pictures.of(name, n=8000)).clip, folder)
    return models.load(folder, device="cpu")


# --- ViT-B-32 ---------------------------------------------------------------------------------------------------------


def random_vit(device: str = "cpu") -> ZeroShotClassifier:
    """A randomly initialised ViT-B-32 over the ten classes of a role."""
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.create_model("ViT-B-32", load_weights=False)
    clip = Clip(network, open_clip.get_tokenizer("ViT-B-32"), "random ViT-B-32")
    return models.zero_shot(clip.to(device, memory_format=torch.channels_last), role("cifar10"))


def own_predictions(classifier: ZeroShotClassifier, n: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Tinyworld's pictures at 224 px, and what the classifier calls them."""
    pixels, _, _, _ = tinyworld_samples("cifar10", "test", n)
    images = F.interpolate(pixels.float() / 255, size=224, mode="bicubic").clamp(0, 1).to(device)
    with torch.no_grad():
        return images, classifier(images).argmax(1)


def vit_attack(rounds: int) -> dict:
    """PGD-10 end to end, broken images leaving."""
    classifier = random_vit()
    return duel("PGD-10, random ViT-B-32", classifier, *own_predictions(classifier, BATCH), VIT_EPS, 10, rounds)


def vit_gradients(rounds: int) -> dict:
    """Two gradients of the whole batch: what forward and backward passes alone gain."""
    classifier = random_vit()
    images, labels = own_predictions(classifier, BATCH)
    twin = fast_classifier(classifier)
    timing = side_by_side(
        lambda: [gradient(twin, images, labels) for _ in range(2)],
        lambda: [gradient(classifier, images, labels) for _ in range(2)],
        rounds,
    )
    cosine = F.cosine_similarity(timing.our_result[0].flatten(1), timing.rival_result[0].flatten(1))
    note = f"no image leaves; cosine of the gradients at least {cosine.min():.4f}"
    return timing.row("2 gradients, random ViT-B-32", accuracy_ours=None, accuracy_rival=None, note=note)


def throughput(precision: str, device: str, batch: int, rounds: int) -> dict:
    """PGD-10 steps on ViT-B-32: images x steps per second, and the share of the matrix peak measured beside it."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # float32 means tf32 here
    try:
        classifier = random_vit(device)
        images, labels = own_predictions(classifier, batch, device)
        twin = fast_classifier(classifier, precision)
        work = flops(twin, images, labels)
        timing = side_by_side(
            lambda: [gradient(twin, images, labels) for _ in range(10)],
            lambda: [gradient(classifier, images, labels) for _ in range(10)],
            rounds,
        )
        peak = matrix_peak(models.PRECISIONS[precision], device)
    finally:
        torch.set_float32_matmul_precision(allowed)
    row = timing.row(f"10 gradients, random ViT-B-32, {precision}, batch {batch}, {device}")
    rate = 10 / row["ours_seconds"]
    share = work * rate / peak
    note = f"{batch * rate:.0f} images x steps/s, {share:.0%} of {peak / 1e12:.3g} TFLOP/s, both in tf32 where float32"
    more = {"images_steps_per_second": batch * rate, "share_of_peak": share, "peak_flops": peak}
    return row | {"accuracy_ours": None, "accuracy_rival": None, "note": note} | more


def flops(classifier: nn.Module, images: Tensor, labels: Tensor) -> int:
    """The floating-point operations of one gradient with respect to the pixels."""
    points = images.detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:  # which knows `backward`, but not `autograd.grad`
        F.cross_entropy(classifier(points), labels, reduction="sum").backward()
    return counter.get_total_flops()


def matrix_peak(dtype: torch.dtype, device: str, rounds: int = 5, side: int = 0) -> float:
    """The most FLOP/s that a product of large square matrices reaches; `side` 0 is the device's usual one."""
    side = side or (8192 if device == "cuda" else 2048)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    repeats = 20 if device == "cuda" else 1
    spent = [seconds(lambda: [left @ right for _ in range(repeats)])[0] for _ in range(rounds + 1)]
    return 2 * side**3 * repeats / min(spent[1:])


# --- shared -----------------------------------------------------------------------------------------------------------


def duel(
    name: str, classifier: ZeroShotClassifier, images: Tensor, labels: Tensor, eps: float, steps: int, rounds: int
) -> dict:
    """Ours against torchattacks' PGD, both with steps of eps / 4.

    Accuracies in percent, by the float32 model, are means over all runs, each from another random start.
    """
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    rival = torchattacks.PGD(classifier, eps=eps, alpha=eps / 4, steps=steps, random_start=True)

    def ours() -> None:
        attack = PGD(eps=eps, steps=steps, step_size=eps / 4, seed=len(found[0]))
        found[0].append(Fast(attack=attack)(classifier, images, labels))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        timing = side_by_side(ours, lambda: found[1].append(rival(images, labels)), rounds)
    means = [sum(accuracy(classifier, run, labels) for run in runs) / len(runs) for runs in found]
    note = f"{len(images)} images, {accuracy(classifier, images, labels):.1f} % right before; {len(found[0])} starts"
    return timing.row(name, accuracy_ours=means[0], accuracy_rival=means[1], note=note)


def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of images the classifier gets right."""
    with torch.no_grad():
        return 100 * (classifier(images).argmax(1) == labels).float().mean().item()


def gradient(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the cross-entropy with respect to the pixels."""
    points = images.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(classifier(points), labels, reduction="sum"), points)[0]
