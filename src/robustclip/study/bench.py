"""The bench of one call to `evaluate`: models, images and adversaries, each made once, and what they cost."""

import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustclip import models
from robustclip.attacks.base import Pair, Target
from robustclip.checks import check_images, check_labels
from robustclip.classes import Classes
from robustclip.data.sources import Samples, load_samples
from robustclip.study.cells import Cell


class CountingClip(nn.Module):
    """A CLIP that counts the images passing forward and backward through its image tower, and is otherwise the same."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.inner = clip
        self.forward_images = self.backward_images = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def encode_images(self, images: Tensor) -> Tensor:
        """Features of the wrapped CLIP; counts the images, and again when their gradient arrives."""
        self.forward_images += len(images)
        if images.requires_grad and torch.is_grad_enabled():
            images = images.view_as(images)
            images.register_hook(self._count_backward)
        return self.inner.encode_images(images)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_images += len(gradient)

    def timed(self, work: Callable[[], Any]) -> tuple[Any, np.ndarray]:
        """The result of `work()` and its cost: seconds, images forward, images backward."""
        before = np.array([time.perf_counter(), self.forward_images, self.backward_images])
        result = work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return result, np.array([time.perf_counter(), self.forward_images, self.backward_images]) - before


class Bench:
    """Models, samples and blind adversarial images of one call to `evaluate`, each made once."""

    def __init__(self, device: str) -> None:
        self.device = models.pick_device(device)
        self._clips: dict[Any, CountingClip] = {}
        self._samples: dict[tuple, Samples] = {}
        self._blind: dict[tuple, dict[tuple, tuple[list[Pair], np.ndarray]]] = {}
        self._builders: dict[str, Builder] = {}
        self._targets: dict[tuple, Target] = {}

    def clip(self, spec: Any) -> CountingClip:
        """The CLIP of a cell: objects are taken as they are, names and folders are loaded."""
        name = os.fspath(spec) if isinstance(spec, str | os.PathLike) else spec
        if name not in self._clips:
            self._clips[name] = CountingClip(models.load(name, str(self.device)) if isinstance(name, str) else spec)
        return self._clips[name]

    def place(self, cell: Cell) -> torch.device:
        """Where the cell's images go: to its CLIP, which stays where it is."""
        return torch.device(getattr(self.clip(cell.spec), "device", self.device))

    def samples(self, cell: Cell) -> Samples:
        """The images of a cell; only those of the latest role are kept."""
        name = (cell.role, cell.scale.source, cell.n)
        if name not in self._samples:
            self._samples = {name: load_samples(cell.role, source=cell.scale.source, n=cell.n)}
        return self._samples[name]

    def prompts(self, cell: Cell) -> list[str]:
        """One prompt per class: the data's own, or from the cell's template."""
        samples = self.samples(cell)
        return [cell.template.format(name) for name in samples.classes] if cell.template else list(samples.prompts)

    def key(self, cell: Cell) -> str:
        """The name of the cell's result."""
        return cell.key(self.clip(cell.spec).digest, self.samples(cell).digest, self.prompts(cell))

    def builder(self, defense: Callable | None) -> "Builder":
        """The builder of a defense, shared by all batches and cells."""
        return self._builders.setdefault(repr(defense), Builder(defense))

    def seen(self, cell: Cell) -> "Builder":
        """Builder of the classifiers that the attacker sees: the defended ones if it is aware of the defense."""
        return self.builder(cell.defense if cell.attacker == "aware" else None)

    def pairs(self, cell: Cell, rows: slice) -> tuple[list[Pair], np.ndarray]:
        """What the attacker of a cell makes of some rows, and what that cost it.

        A blind attacker makes the same of them whatever the defense, so its pairs are kept for the next one.
        """
        seen = self.seen(cell)
        if seen.defense:
            return self.clip(cell.spec).timed(lambda: self._attack(cell, rows, seen))
        name = (self.clip(cell.spec), self.samples(cell).digest, cell.template, repr(cell.attack))
        if name not in self._blind:
            self._blind = {name: {}}
        known, place = self._blind[name], (rows.start, rows.stop)
        if place not in known:
            known[place] = self.clip(cell.spec).timed(lambda: self._attack(cell, rows, seen))
        return known[place]

    def _attack(self, cell: Cell, rows: slice, build: "Builder") -> list[Pair]:
        images, labels = self.batch(cell, rows)
        classes = self.samples(cell).classes.with_prompts(self.prompts(cell))
        if cell.attack is None:
            return [Pair(images, classes)]
        name = (self.clip(cell.spec), self.samples(cell).digest, classes, repr(build.defense))
        if name not in self._targets:
            self._targets[name] = Target(self.clip(cell.spec), classes, build.defense, partial(self._held_out, cell))
        return cell.attack.pairs(self._targets[name], images, labels)

    def _held_out(self, cell: Cell, n: int) -> tuple[Tensor, Tensor]:
        """Labelled training images for attacks that ask for them."""
        other = load_samples(cell.role, source=cell.scale.source, split="train", n=n)
        return other.images.to(self.place(cell)), other.labels.to(self.place(cell))

    def batch(self, cell: Cell, rows: slice) -> tuple[Tensor, Tensor]:
        """Images and labels of some rows, checked and in place."""
        samples, place = self.samples(cell), self.place(cell)
        images = check_images(samples.images[rows])
        return images.to(place), check_labels(samples.labels[rows], len(samples.classes), len(images)).to(place)


class Builder:
    """Makes the classifier for a set of prompts, with a defense in front of it or not; the latest few are kept."""

    def __init__(self, defense: Callable | None) -> None:
        self.defense, self._made = defense, lru_cache(maxsize=4)(self._make)

    def __call__(self, clip: Any, classes: Classes | Sequence[str]) -> Callable:
        """Images in [0, 1] -> logits over the classes."""
        return self._made(clip, classes if isinstance(classes, Classes) else tuple(classes))

    def _make(self, clip: Any, classes: Classes | tuple[str, ...]) -> Callable:
        classifier = models.ZeroShotClassifier(clip, classes)
        return self.defense(classifier) if self.defense else classifier


def device_name(device: torch.device) -> str:
    """What results say they were measured on: "NVIDIA H100", "cpu (2 threads)"."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"{device.type} ({torch.get_num_threads()} threads)"
