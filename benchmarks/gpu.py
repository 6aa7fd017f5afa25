"""Prove on a GPU what a CPU cannot, and measure what it is worth: `python benchmarks/gpu.py`, or `make gpu`.

parity       attacks, a defense and one update of a recipe do on the GPU what they do on the CPU
throughput   PGD-10 on a random ViT-B-32: images x steps a second, and their share of the matrix peak beside it
training     pictures a second of TeCoA and MMCoA on the same network
memory       the peak of one gradient, by batch size

Each part is written to `results/gpu.json` as soon as it is done; parts that do not start within `--minutes` are left
out. Exit code 1 if a row did not pass. `--device cpu --tiny --out FILE` runs all of it in seconds, to test the script.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from bench_image import EPS, VIT_EPS, flops, gradient, matrix_peak
from run import FOLDER, circumstances, record
from side_by_side import seconds
from torch import Tensor
from torch.nn import functional as F

from robustclip import models
from robustclip.attacks import APGD, PGD, Square
from robustclip.attacks.fast import Fast
from robustclip.data.roles import role
from robustclip.data.sources import load_samples
from robustclip.defenses.base import SCORING_DRAW
from robustclip.fast import fast_classifier
from robustclip.models import Clip, ZeroShotClassifier
from robustclip.progress import progress
from robustclip.study.named import named_defense
from robustclip.training import Pictures, named_recipe, train

RESULT = FOLDER / "results" / "gpu.json"
SAME = 95.0  # percent of images with one outcome on both: signs of gradients multiply rounding on the way
APART = 5.0  # percent of the way of an update by which two ends may differ
SPREAD = 0.1  # percent of the spread of logits by which they may differ
AIM = 40.0  # percent of the matrix peak
SMALL = {  # in place of ViT-B-32
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    images: int = 64  # of the comparison with the CPU
    queries: int = 300
    steps: int = 10
    batch: int = 256
    rounds: int = 5
    matrix: int = 8192
    updates: int = 10
    pictures: int = 128  # of an update
    batches: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    small: bool = False


TINY = Sizes(
    images=4, queries=5, steps=2, batch=4, rounds=1, matrix=64, updates=2, pictures=4, batches=(2, 4), small=True
)


# --- parity -----------------------------------------------------------------------------------------------------------


def parity(sizes: Sizes, device: str) -> list[dict]:
    """One row per attack, defense and recipe: the embedded CLIP in float32 on the CPU and on the device.

    What an attack makes, wherever that was, is judged by the CPU.
    """
    samples, tf32 = load_samples("cifar10", n=sizes.images), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        clips = [models.load(device=place) for place in ("cpu", device)]
        here, there = (models.zero_shot(clip, role("cifar10")) for clip in clips)
        pairs = (samples.images, samples.labels), (samples.images.to(device), samples.labels.to(device))
        rows = [same_logits(here(pairs[0][0]), there(pairs[1][0]).cpu())]
        for name, attack in progress(attacks(sizes).items(), "parity", unit="attack"):
            found = [attack(one, *pair).cpu() for one, pair in zip((here, there), pairs, strict=True)]
            rows.append(same_outcomes(name, *(here(images).argmax(1) == samples.labels for images in found)))
        defense = named_defense("TTC", EPS / 6, {})
        answers = [defense(one).at(SCORING_DRAW)(found[0].to(one.clip.device)).cpu() for one in (here, there)]
        rows.append(same_outcomes("TTC", *(answer.argmax(1) == samples.labels for answer in answers)))
        return [*rows, same_update(sizes, *clips)]
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


def attacks(sizes: Sizes) -> dict[str, Callable]:
    """What is compared: in float32, and in bfloat16 with its check in float32."""
    pgd = PGD(eps=EPS, steps=sizes.steps)
    return {
        "PGD": pgd,
        "APGD": APGD(eps=EPS, steps=sizes.steps),
        "Square": Square(eps=EPS, queries=sizes.queries),
        "PGD in bfloat16": Fast(attack=pgd),
    }


def same_logits(here: Tensor, there: Tensor) -> dict:
    """How far clean logits lie apart, in percent of their spread."""
    apart = 100 * float((here - there).abs().max() / (here.amax(1) - here.amin(1)).median())
    return {"name": "logits", "apart": apart, "limit": SPREAD, "passed": apart <= SPREAD}


def same_outcomes(name: str, here: Tensor, there: Tensor) -> dict:
    """Accuracies in percent, and how many images end differently."""
    left = {"cpu": 100 * float(here.float().mean()), "device": 100 * float(there.float().mean())}
    apart = 100 * float((here != there).float().mean())
    return {
        "name": name,
        "images": len(here),
        **left,
        "apart": apart,
        "limit": 100 - SAME,
        "passed": apart <= 100 - SAME,
    }


def same_update(sizes: Sizes, here: Clip, there: Clip) -> dict:
    """How far one update of plain descent ends apart, in percent of its way."""
    recipe = named_recipe("TeCoA", eps=EPS, updates=1, batch_size=sizes.pictures, attack_steps=1, optimizer="sgd")
    pictures = Pictures.of("cifar10", n=max(200, sizes.pictures))
    before = here.network.state_dict()
    ends = [train(recipe, clip, pictures).clip.network.state_dict() for clip in (here, there)]
    way, apart = (
        sum(float((one[name].cpu() - other[name].cpu()).float().square().sum()) for name in before) ** 0.5
        for one, other in ((ends[0], before), ends)
    )
    share = 100 * apart / way
    return {"name": "an update of TeCoA", "apart": share, "limit": APART, "passed": share <= APART}


# --- throughput -------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {  # name -> precision, how its image tower is compiled
    "float32, which is tf32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "bfloat16, torch.compile": ("bfloat16", {"dynamic": False}),
    "bfloat16, CUDA graphs": ("bfloat16", {"dynamic": False, "mode": "reduce-overhead"}),
}


def random_classifier(small: bool, device: str) -> ZeroShotClassifier:
    """A randomly initialised ViT-B-32, or a small network, over ten classes."""
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.model.CLIP(32, **SMALL) if small else open_clip.create_model("ViT-B-32", load_weights=False)
    if small:
        network.visual.preprocess_cfg = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "interpolation": "bicubic"}
    clip = Clip(network, open_clip.get_tokenizer("ViT-B-32"), "random ViT-B-32")
    return models.zero_shot(clip.to(device, memory_format=torch.channels_last), role("cifar10"))


def some_images(n: int, classifier: ZeroShotClassifier) -> Tensor:
    """Random pixels of the size that the classifier takes."""
    pixels = torch.rand(n, 3, *classifier.clip.image_size, generator=torch.Generator().manual_seed(0))
    return pixels.to(classifier.clip.device)


def throughput(sizes: Sizes, device: str) -> list[dict]:
    """One row per variant; no image leaves, and the share counts the work of the gradients alone."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        precisions = dict.fromkeys(precision for precision, _ in VARIANTS.values())
        peaks = {name: matrix_peak(models.PRECISIONS[name], device, side=sizes.matrix) for name in precisions}
        turns = progress(VARIANTS.items(), "throughput", unit="variant")
        return [whole(name, partial(variant, sizes, device, peaks[how[0]], *how)) for name, how in turns]
    finally:
        torch.set_float32_matmul_precision(allowed)


def whole(name: str, measure: Callable[[], dict]) -> dict:
    """The row of a measurement, or of how it failed."""
    try:
        return {"name": name, **measure()}
    except Exception as error:  # whatever a compiler or the memory of the card has to say
        return {
            "name": name,
            "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            "passed": False,
        }


def variant(sizes: Sizes, device: str, peak: float, precision: str, compiled: dict[str, Any] | None) -> dict:
    """Throughput of one way to run the same attack."""
    classifier = random_classifier(sizes.small, device)
    images = some_images(sizes.batch, classifier)
    twin = fast_classifier(classifier, precision)
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    work = sizes.steps * flops(twin, images, labels)
    if compiled is not None:
        twin.clip.network.visual.compile(**{"backend": "eager", "dynamic": False} if sizes.small else compiled)
    attack = PGD(eps=VIT_EPS, steps=sizes.steps, keep="last", stop=False)
    run = partial(attack, twin, images, labels)
    first = seconds(run)[0]
    spent = median(seconds(run)[0] for _ in range(sizes.rounds))
    pair = (gradient(one, images, labels).flatten(1) for one in (classifier, twin))
    return {
        "batch": sizes.batch,
        "steps": sizes.steps,
        "images_steps_per_second": sizes.batch * sizes.steps / spent,
        "share_of_peak": 100 * work / spent / peak,
        "aim": AIM,
        "peak_flops": peak,
        "first_seconds": first,
        "cosine": float(F.cosine_similarity(*pair).min()),
    }


# --- training and memory ----------------------------------------------------------------------------------------------


def training(sizes: Sizes, device: str) -> list[dict]:
    """One row per recipe and precision of its inner attack; what comes before the first update does not count."""
    classifier, pictures = random_classifier(sizes.small, device), Pictures.of("cifar10", n=max(200, sizes.pictures))
    kinds = [(name, precision) for name in ("TeCoA", "MMCoA") for precision in ("float32", "bfloat16")]
    return [
        whole(f"{name}, attack in {precision}", partial(updates, sizes, name, precision, classifier.clip, pictures))
        for name, precision in progress(kinds, "training", unit="recipe")
    ]


def updates(sizes: Sizes, name: str, precision: str, clip: Clip, pictures: Pictures) -> dict:
    """Pictures a second of some updates."""
    settings = {"updates": sizes.updates, "batch_size": sizes.pictures, "precision": precision}
    recipe = named_recipe(name, eps=VIT_EPS, **settings)
    train(recipe, clip, pictures, first=1)
    spent = sum(train(recipe, clip, pictures).spent.values())
    return {"pictures_per_second": sizes.updates * sizes.pictures / spent, "batch": sizes.pictures}


def memory(sizes: Sizes, device: str) -> list[dict]:
    """One row per batch size, until the card is full; only a GPU says what its peak was."""
    classifier = random_classifier(sizes.small, device)
    twin, rows = fast_classifier(classifier), []
    for n in sizes.batches:
        images = some_images(n, classifier)
        rows.append(
            whole(f"batch {n}", partial(peak_of, lambda images=images: gradient(twin, images, labels_of(images))))
        )
        if rows[-1].get("failed"):
            break
    return rows


def labels_of(images: Tensor) -> Tensor:
    """The first class for all."""
    return torch.zeros(len(images), dtype=torch.long, device=images.device)


def peak_of(work: Callable[[], Any]) -> dict:
    """Megabytes on the card above what was there before."""
    if not torch.cuda.is_available():
        work()
        return {"peak_megabytes": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return {"peak_megabytes": (torch.cuda.max_memory_allocated() - before) / 1e6}


# --- all of it --------------------------------------------------------------------------------------------------------

PARTS = {"parity": parity, "throughput": throughput, "training": training, "memory": memory}


def measure(sizes: Sizes, device: str, out: Path, minutes: float) -> bool:
    """Run the parts one after the other and write each; whether all that ran passed."""
    begin, good = perf_counter(), True
    for name, part in PARTS.items():
        if perf_counter() - begin > 60 * minutes:
            print(f"{name}: not reached within {minutes:g} minutes", flush=True)
            continue
        print(f"{name} ...", flush=True)
        spent, rows = seconds(partial(part, sizes, device))
        record(out, name, circumstances(torch.get_num_threads()) | {"device": device, "seconds": spent, "rows": rows})
        print(pd.DataFrame(rows).to_string(index=False, na_rep="", float_format="{:.4g}".format), flush=True)
        good = good and passed(rows)
    return good


def passed(rows: Iterable[dict]) -> bool:
    """Whether no row says that it did not pass."""
    return all(row.get("passed", True) for row in rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure on a GPU, or say in one line that there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where to measure (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="a small network and hardly any work, to test this script")
    parser.add_argument("--minutes", type=float, default=8, help="start no part after so many minutes (default: 8)")
    parser.add_argument("--out", type=Path, help="file to write (default: results/gpu.json, of a GPU only)")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"No GPU here: torch {torch.__version__} sees none, so that nothing was measured; it takes an NVIDIA GPU "
              "and a torch built for CUDA.")  # fmt: skip
        return
    if not options.out and (options.tiny or not options.device.startswith("cuda")):
        parser.error("results/gpu.json is for whole runs on a GPU; give another file, --out FILE")
    if not measure(TINY if options.tiny else Sizes(), options.device, options.out or RESULT, options.minutes):
        sys.exit("a row above did not pass")


if __name__ == "__main__":
    main()
