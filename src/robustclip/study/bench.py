"""The bench of one call to `evaluate`: models, images and adversaries, each made once, and what they cost."""

import json
import os
import time
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustclip import models
from robustclip.attacks.base import Pair, Target
from robustclip.attacks.language import load_language_model
from robustclip.checks import check_images, check_labels
from robustclip.classes import Classes
from robustclip.component import identity
from robustclip.data.sources import Samples, facts, load_samples
from robustclip.defenses.base import SCORING_DRAW, redrawn
from robustclip.models import Clip, ZeroShotClassifier, count_passes
from robustclip.study.cells import Cell
from robustclip.study.provenance import digests
from robustclip.study.shipped import known

TRAINED = "trained by "  # before the components that made a model, among those of a cell


class Bench:
    """Models, samples and blind adversarial images of one call to `evaluate`, each made once."""

    def __init__(self, device: str) -> None:
        self.device = models.pick_device(device)
        self._clips: dict[Any, Clip] = {}
        self._samples: dict[tuple, Samples] = {}
        self._facts: dict[tuple, dict] = {}
        self._blind: dict[tuple, dict[tuple, tuple[list[Pair], np.ndarray]]] = {}
        self._target: tuple[Any, Target | None] = (None, None)
        self.saved = np.zeros(3)
        self.distinct: tuple[int, int] | None = None  # texts left by the latest attack on them, of so many

    # --- what a cell stands for, without weights or pictures where that is possible

    def facts(self, cell: Cell) -> dict:
        """What is known of the cell's data: source, digest, names, prompts; as shipped if the data is not here."""
        place = (cell.role, cell.scale.source)
        if place not in self._facts:
            try:
                self._facts[place] = facts(*place)
            except FileNotFoundError:
                shipped = known(cell.scale.name)["data"]
                if "/".join(place) not in shipped:
                    raise
                self._facts[place] = shipped["/".join(place)]
        return self._facts[place]

    def classes(self, cell: Cell) -> Classes:
        """Names and prompts: the data's own, or prompts from the cell's template."""
        if cell.task == "retrieve":
            return Classes((cell.role,), (cell.role,))  # its texts are captions, which the data's digest covers
        found = self.facts(cell)
        prompts = [cell.template.format(name) for name in found["names"]] if cell.template else found["prompts"]
        return Classes(found["names"], prompts)

    def digest(self, cell: Cell) -> str:
        """What names the cell's weights: what makes them if they are yet to be trained, else their fingerprint."""
        if hasattr(cell.spec, "identity"):
            return cell.spec.digest
        try:
            return self.clip(cell.spec).digest
        except OSError:
            if (shipped := known(cell.scale.name)["models"].get(str(cell.spec))) is None:
                raise
            return shipped

    def key(self, cell: Cell) -> str:
        """The name of the cell's result."""
        language = {"language_model": lambda name: load_language_model(name, self._speaker(cell)).digest}
        return cell.key(self.digest(cell), self.facts(cell)["digest"], self.classes(cell), language)

    def _speaker(self, cell: Cell) -> Clip | None:
        """The CLIP whose language a text attack speaks: fine-tuning keeps that of the model it starts from."""
        return self.clip(getattr(cell.spec, "base", cell.spec))

    def provenance(self, cell: Cell, task: Any) -> dict[str, str]:
        """Digests of the code that the cell's number depends on; of trained models, the code that made them, too."""
        parts = [cell.attack, cell.defense, task, Bench, Clip, ZeroShotClassifier]
        trained = cell.spec.provenance() if hasattr(cell.spec, "identity") else {}
        return digests(*parts) | {TRAINED + name: digest for name, digest in trained.items()}

    # --- what has to be there to measure it

    def clip(self, spec: Any) -> Clip:
        """The CLIP of a cell: loaded ones as they are, models to be trained are trained, all else is loaded."""
        name = spec if isinstance(spec, nn.Module) else os.fspath(spec)
        if name not in self._clips:
            self._clips[name] = models.load(name, str(self.device)) if isinstance(name, str) else spec
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

    def batch(self, cell: Cell, rows: slice) -> tuple[Tensor, Tensor]:
        """Images and labels of some rows, checked and in place."""
        samples, place = self.samples(cell), self.place(cell)
        images = check_images(samples.images[rows])
        return images.to(place), check_labels(samples.labels[rows], len(samples.classes), len(images)).to(place)

    def target(self, cell: Cell) -> Target:
        """What the attacker of a cell faces; the same for all its batches, as attacks on texts remember it."""
        defense = cell.defense if cell.attacker == "aware" else None
        name = (self.clip(cell.spec), cell.role, cell.scale.source, self.classes(cell), defense)
        if self._target[0] == name:
            return self._target[1]

        def held_out(n: int) -> tuple[Tensor, Tensor]:
            other = load_samples(cell.role, source=cell.scale.source, split="train", n=n)
            return other.images.to(self.place(cell)), other.labels.to(self.place(cell))

        self._target = name, Target(self.clip(cell.spec), self.classes(cell), defense, held_out)
        return self._target[1]

    def judge(self, cell: Cell) -> Callable[[Classes], Callable]:
        """Builds the classifier that judges what the attacker made, at a draw that it never saw."""

        @lru_cache(maxsize=4)
        def build(classes: Classes) -> Callable:
            plain = ZeroShotClassifier(self.clip(cell.spec), classes)
            return redrawn(cell.defense(plain), SCORING_DRAW + cell.seed) if cell.defense else plain

        return build

    def pairs(self, cell: Cell, rows: slice) -> list[Pair]:
        """What the attacker of a cell makes of some rows; the prompts it leaves are counted."""
        found = self._pairs(cell, rows)
        self.count(cell, self.classes(cell).prompts, min((set(pair.classes.prompts) for pair in found), key=len))
        return found

    def count(self, cell: Cell, before: Iterable[str], after: Iterable[str]) -> None:
        """Keep in `distinct` how many different texts an attack on them leaves of how many.

        Texts that coincide cap the accuracy, whatever the model.
        """
        texts = cell.attack is not None and cell.attack.changes_texts
        self.distinct = (len(set(after)), len(set(before))) if texts else None

    def _pairs(self, cell: Cell, rows: slice) -> list[Pair]:
        """As `pairs`; a blind attacker makes the same whatever the defense, so its pairs are kept for the next one.

        What they cost then counts as `saved`.
        """
        if cell.attack is None:
            return [Pair(self.batch(cell, rows)[0], self.classes(cell))]
        attack = partial(cell.attack.pairs, self.target(cell), *self.batch(cell, rows))
        if cell.attacker == "aware" and cell.defense:
            return attack()
        name = (self.clip(cell.spec), cell.role, cell.n, cell.template, json.dumps(identity(cell.attack)))
        if name not in self._blind:
            self._blind = {name: {}}
        place, kept = (rows.start, rows.stop), self._blind[name]
        if place in kept:
            self.saved = self.saved + kept[place][1]
        else:
            kept[place] = timed(attack)
        return kept[place][0]

    def timed(self, work: Callable[[], Any]) -> tuple[Any, np.ndarray]:
        """As `timed`, with the cost of what was kept from earlier cells."""
        self.saved = np.zeros(3)
        result, cost = timed(work)
        return result, cost + self.saved


def timed(work: Callable[[], Any]) -> tuple[Any, np.ndarray]:
    """The result of `work()` and its cost: seconds, images forward, images backward."""
    begin = time.perf_counter()
    with count_passes() as passes:
        result = work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result, np.array([time.perf_counter() - begin, passes.forward, passes.backward])


def device_name(device: torch.device) -> str:
    """What results say they were measured on: "NVIDIA H100", "cpu (2 threads)"."""
    cuda = device.type == "cuda"
    return torch.cuda.get_device_name(device) if cuda else f"{device.type} ({torch.get_num_threads()} threads)"
