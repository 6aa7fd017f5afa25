"""Input checks shared by the whole package: each error names the value, the allowed range and the remedy."""

import math
import os
import shutil
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor


def check_images(images: Tensor) -> Tensor:
    """Return `images` if they are a float batch (n, 3, height, width) in [0, 1], else raise ValueError."""
    return check_pixels(images, 0, 1)


def check_pixels(images: Tensor, low: float = -8, high: float = 9) -> Tensor:
    """As `check_images` for what a model is given: noise of a defense may leave [0, 1], bytes as floats are far off."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a torch.Tensor, got {type(images).__name__}; use torch.as_tensor(images)")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (n, 3, height, width), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}; divide bytes by 255")
    if not images.numel():
        return images
    least, most = (bound.item() for bound in images.detach().aminmax())  # one pass; NaN spreads to both
    if not (math.isfinite(least) and math.isfinite(most)):
        raise ValueError("images contain NaN or infinity; check the loader or the previous attack")
    if least < low or most > high:
        remedy = "normalisation belongs in the model, and bytes are divided by 255"
        raise ValueError(f"images must lie in [0, 1], got [{least:.4g}, {most:.4g}]; {remedy}")
    return images


def check_labels(labels: Tensor, classes: int, images: int | None = None) -> Tensor:
    """Return `labels` if they are integers in [0, classes), one per image, else raise ValueError."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a torch.Tensor, got {type(labels).__name__}; use torch.as_tensor(labels)")
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers of shape (n,), got {labels.dtype} of shape {tuple(labels.shape)}")
    if images is not None and len(labels) != images:
        raise ValueError(f"got {len(labels)} labels for {images} images; give one label per image")
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        wrong = labels[(labels < 0) | (labels >= classes)][0].item()
        raise ValueError(f"label {wrong} is out of range; this classifier has classes 0 to {classes - 1}")
    return labels


def check_logits(logits: Tensor, images: int) -> Tensor:
    """Return what a classifier said of so many images if it is a table of numbers, else raise ValueError."""
    if not isinstance(logits, Tensor):
        found = f"{type(logits).__name__}; wrap it, as in lambda images: model(images)[0]"
        raise ValueError(f"the classifier must return logits of shape ({images}, classes), got a {found}")
    if logits.ndim != 2 or len(logits) != images:
        shape = tuple(logits.shape)
        raise ValueError(f"the classifier must return logits of shape ({images}, classes), got shape {shape}")
    if logits.isnan().any():
        raise ValueError("the classifier gives NaN logits, by which no success can be told; restore or retrain it")
    return logits


def check_range(name: str, value: float, low: float, high: float = math.inf) -> float:
    """Return `value` as a plain int or float if it is a finite number with low <= value <= high, else ValueError."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value <= high or math.isinf(value):
        limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name}={value!r} is not allowed; it must be a finite number {limits}")
    return int(value) if isinstance(value, Integral) else float(value)


def check_integer(name: str, value: int, low: int, high: float = math.inf) -> int:
    """Return `value` as a plain int if it is a whole number with low <= value <= high, else raise ValueError."""
    plain = check_range(name, value, low, high)
    if not isinstance(plain, int):
        raise ValueError(f"{name}={value!r} is not allowed; it must be a whole number, such as {int(value)}")
    return plain


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`, else raise ValueError listing them."""
    allowed = list(choices)
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}; choose one of: {', '.join(map(str, allowed))}")
    return value


def check_folder(folder: Path, free_megabytes: float = 1) -> Path:
    """Create `folder` if needed and return it, or raise OSError if it is not writable or its disk is nearly full."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise OSError(f"cannot use {str(folder)!r} as a folder ({error.strerror}); choose another one") from error
    if not os.access(folder, os.W_OK):
        raise OSError(f"folder {str(folder)!r} is not writable; choose another one or change its permissions")
    free = shutil.disk_usage(folder).free / 1e6
    if free < free_megabytes:
        raise OSError(f"only {free:.1f} MB free for {str(folder)!r}, {free_megabytes:g} MB needed; make some room")
    return folder
