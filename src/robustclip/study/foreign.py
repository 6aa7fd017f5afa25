"""Somebody's classifier that has nothing to do with this book, on pictures of a folder: is its robustness real?

    classifier = build("my_module:build")                  # its build() returns pixels in [0, 1] -> logits
    samples = pictures("photographs", n=100, size=224)     # parquet files, or one folder of pictures per class
    found = audited(classifier, samples, attack("PGD-20", "4/255"))

What is wrong with any of them is a ValueError or an OSError that names the value and the remedy.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from robustclip.attacks.base import Adversary, Classifier, frozen
from robustclip.audit import Audit, Single, audit
from robustclip.checks import check_integer, check_range
from robustclip.classes import Classes
from robustclip.data import loaders
from robustclip.data.loaders import Table
from robustclip.data.sources import Samples
from robustclip.models import logits_of, modules_of, pick_device
from robustclip.progress import progress
from robustclip.study.entry import named_object
from robustclip.study.named import named_attack
from robustclip.study.scales import parse_eps
from robustclip.study.statistics import Estimate, wilson

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
BATCH = 64


@dataclass(frozen=True)
class Found:
    """What the audit says, and the share of right answers without and with the attack, in percent."""

    audit: Audit
    clean: Estimate
    attacked: Estimate
    n: int
    chance: float  # what a constant guess would reach


# --- the classifier and the attack ------------------------------------------------------------------------------------


def build(text: str, device: str = "auto") -> Classifier:
    """The classifier that "module:name" returns when it is called, or that it is; a module goes to the device."""
    place, (_, found) = pick_device(device), named_object(text, "--classifier")
    if not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"--classifier {text!r}: calling it failed: {said}; it takes no arguments") from error
    if not callable(found):
        raise ValueError(
            f"--classifier {text!r} returns a {type(found).__name__}; return what takes pixels in [0, 1], of shape "
            "(n, 3, height, width), and gives logits (n, classes)"
        )
    return found.to(place) if isinstance(found, nn.Module) else found


def attack(name: str, eps: str | float = "4/255", seed: int = 0) -> Adversary:
    """The attack on images called `name`, with the steps that its name says."""
    found = named_attack(name, check_range("eps", parse_eps(eps), 0, 1), {}, seed)
    if found is None or not found.changes_images or found.changes_texts:
        raise ValueError(f"attack {name!r} is none on images alone, which all that a classifier has are; try PGD-100")
    return found


# --- the pictures -----------------------------------------------------------------------------------------------------


def pictures(folder: Path | str, n: int = 100, size: int = 0) -> Samples:
    """A fair sample of n pictures, all of them where there are fewer, with their labels and the names of the classes.

    A folder holds parquet files as `data.loaders` reads them, or one folder per class with its pictures; classes are
    numbered in the order of their names. With a `size`, the middle square of each is brought to so many pixels a side.
    """
    check_integer("n", n, 1)
    check_integer("size", size, 0, 4096)
    table = _opened(Path(folder).expanduser())
    rows = loaders.shuffled("foreign", len(table))[:n]
    images = table.decode(rows, size, size) if size else _as_they_are(table, rows)
    classes = Classes(table.names, table.names)
    return Samples(images, torch.from_numpy(table.labels[rows]), classes, table.name, table.digest())


def _opened(folder: Path) -> Table:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; give one with test.parquet, or with a folder per class")
    if not [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]:
        return _by_class(folder)
    try:
        table = loaders.open_parquet(folder, "test")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(folder)!r} has parquet files, but {error}; name one so") from error
    if table.captions is not None:
        raise ValueError(f"the pictures of {str(folder)!r} have captions and no classes; give a set with labels")
    return table


def _by_class(folder: Path) -> Table:
    """Pictures in one folder per class."""
    groups = {
        part.name: _pictures_in(part) for part in sorted(folder.iterdir()) if part.is_dir() and part.name[0] != "."
    }
    if empty := [name for name, paths in groups.items() if not paths]:
        raise ValueError(
            f"class {empty[0]!r} in {str(folder)!r} has no picture ({', '.join(SUFFIXES)}); add or remove it"
        )
    if len(groups) < 2:
        raise ValueError(
            f"{str(folder)!r} has {len(groups)} folders and no test.parquet; give a folder with one folder per class, "
            "two or more"
        )
    paths = [path for group in groups.values() for path in group]
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    return Table(
        f"folder:{folder.name}", labels, tuple(groups), lambda rows: [paths[row].read_bytes() for row in rows],
        tuple(str(path.relative_to(folder)) for path in paths), place=lambda row: str(paths[row].relative_to(folder)),
    )  # fmt: skip


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")


def _as_they_are(table: Table, rows: np.ndarray) -> Tensor:
    """The pictures in their own size, which has to be one: float32 (n, 3, height, width) in [0, 1]."""
    found: list[Tensor] = []
    raws = table.fetch(rows)
    for row, raw in progress(zip(rows, raws, strict=True), f"decoding {table.name}", len(rows), "image"):
        with table.image(int(row), raw) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        if found and pixels.shape != found[0].shape:
            first, other = (f"{part.shape[2]} x {part.shape[1]}" for part in (found[0], pixels))
            raise ValueError(
                f"pictures have different sizes, {table.place(int(rows[0]))} has {first} and {table.place(int(row))} "
                f"{other}; bring them to one with --size, such as --size {min(pixels.shape[1:])}"
            )
        found.append(pixels)
    return torch.stack(found).float() / 255


# --- the audit --------------------------------------------------------------------------------------------------------


def audited(classifier: Classifier, samples: Samples, attack: Adversary, seed: int = 0) -> Found:
    """The audit of the attack on the classifier, and how often it is right, before and after.

    Pictures go to where the classifier's weights are, in their type; a model in half precision is attacked in float32.
    """
    weights = [weight for module in modules_of(classifier) for weight in module.parameters()]
    weights = [weight for weight in weights if weight.is_floating_point()]
    images, labels = samples.images, samples.labels
    if weights:
        images, labels = images.to(weights[0].device), labels.to(weights[0].device)
        if weights[0].dtype in (torch.float16, torch.bfloat16):
            classifier = Single(classifier, weights[0].dtype)
        elif len({weight.dtype for weight in weights}) == 1:
            images = images.to(weights[0].dtype)
    _tried(classifier, images, samples)
    clean = _right(classifier, images, labels)
    report = audit(classifier, attack, images, labels, seed=seed, batch_size=BATCH)
    parts = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    attacked = torch.cat([attack(classifier, *part) for part in parts])
    most = 100 * int(labels.bincount().max()) / len(labels)
    return Found(report, clean, _right(classifier, attacked, labels), len(labels), most)


def _tried(classifier: Classifier, images: Tensor, samples: Samples) -> None:
    """Two pictures through the classifier: it has to give one logit per class."""
    shape = " x ".join(map(str, images.shape[1:]))
    try:
        with torch.no_grad(), frozen(classifier):
            logits = logits_of(classifier, images[:2])
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"the classifier fails on pictures of {shape}: {said}; give its size with --size") from error
    if logits.shape[1] != len(samples.classes):
        some = ", ".join(samples.classes[:3]) + ", ..." * (len(samples.classes) > 3)
        raise ValueError(
            f"the classifier gives {logits.shape[1]} logits, and {samples.source} has {len(samples.classes)} classes "
            f"({some}); give the pictures of all classes that it tells apart, in the order of its logits"
        )


def _right(classifier: Classifier, images: Tensor, labels: Tensor) -> Estimate:
    """The share of right answers in percent, with its interval."""
    with torch.no_grad(), frozen(classifier):
        hits = torch.cat([classifier(part).argmax(1) for part in images.split(BATCH)]) == labels
    return wilson(int(hits.sum()), len(hits))
