"""The grids of the pages on adversarial fine-tuning: every recipe with one budget, on one set, under the same attacks.

models = tuned(scale("photo"), ["TeCoA", "FARE"])          # named by what makes them, trained when they are needed
cells = zero_shot(scale("photo"), models)                  # clean and attacked, on sets that none has seen
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd

from robustclip.study.cells import Cell, grid
from robustclip.study.evaluate import outcomes
from robustclip.study.scales import Scale
from robustclip.study.shipped import shipped_models
from robustclip.study.statistics import Estimate, macro
from robustclip.study.trained import Tuned, fine_tuned

ROLE = "tinyimagenet"  # what all learn from
MAIN = ("TeCoA", "FT-adversarial", "MMCoA", "PMG-AFT", "TGA-ZSR", "FARE", "LAAT", "TIMA")
VARIANTS = (
    *("PMG-AFT-released", "TGA-ZSR-released", "FARE-l1", "LAAT-raw", "LAAT-expanded"),
    *("TIMA-margin", "TIMA-distant", "TIMA-distilled", "TIMA-energy"),
)
USUAL = ("clean", "PGD-10:last")
STRONG = ("AutoAttack",)
TEXTS = ("BERT-Attack", "PGD-10+BERT-Attack:worst")
STRONG_ROLES = (ROLE, "cifar10", "caltech101")
PRECISION = "float32"  # of gradients, in training and in attacks
Answers = dict[tuple[str, str, str], dict[int, np.ndarray]]  # (model, attack, set) -> training seed -> right or wrong


def tuned(
    scale: Scale, recipes: Sequence[str] = MAIN, seed: int = 0, device: str = "auto", **settings: Any
) -> dict[str, Tuned]:
    """The scale's CLIP after each recipe, by the recipe's name; all take equally many updates, pictures and steps."""
    own = {"precision": PRECISION} | scale.training.get("budget", {}) | settings
    found = fine_tuned(scale, recipes, ROLE, seed=seed, device=device, **own)
    return dict(zip(recipes, found.values(), strict=True))


def roles(scale: Scale) -> list[str]:
    """Sets that a scale has: the one that all learn from first, then those that none has seen."""
    return [ROLE, *(name for name in scale.roles if name not in (ROLE, "coco"))]


def zero_shot(
    scale: Scale, models: Mapping[str, Any], attacks: Sequence[str] = USUAL, sets: Sequence[str] = (), **more: Any
) -> list[Cell]:
    """Each model, CLIP before it included, on each set."""
    size = scale.size("finetuning/strong" if set(attacks) & set(STRONG) else "finetuning", more.pop("n", 0))
    everybody = {"CLIP": scale.model("clip")} | dict(models)
    return grid(scale, everybody, sets or roles(scale), attacks, n=size, precision=PRECISION, **more)


def answers_of(frame: pd.DataFrame) -> Answers:
    """Right or wrong, image by image, of rows of `evaluate`."""
    found: Answers = {}
    for row in frame.to_dict("records"):
        found.setdefault((row["model"], row["attack"], row["role"]), {})[row["seed"]] = outcomes(row)
    return found


def seeds_of(found: Answers, model: str, attack: str, sets: Sequence[str]) -> set[int]:
    """The training seeds that are known on all sets."""
    return set.intersection(*(set(found.get((model, attack, name), ())) for name in sets)) if sets else set()


def stacked(found: Answers, model: str, attack: str, sets: Sequence[str], numbers: Collection[int]) -> list[np.ndarray]:
    """Outcomes (seeds, images) of each set."""
    return [np.stack([found[model, attack, name][number] for number in sorted(numbers)]) for name in sets]


def mean(found: Answers, model: str, attack: str, sets: Sequence[str]) -> Estimate | None:
    """The mean over sets, over seeds and images; None if a set is missing."""
    numbers = seeds_of(found, model, attack, sets)
    return macro(stacked(found, model, attack, sets, numbers)) if numbers else None


def gap(
    found: Answers, one: tuple[str, str], two: tuple[str, str], sets: Sequence[str], alone: Collection[str] = ("CLIP",)
) -> Estimate | None:
    """The first (model, attack) minus the second, on the same images, for the same trainings; None if unknown.

    Models that are `alone` were trained once, and are compared with every training of the other.
    """
    numbers = [seeds_of(found, *side, sets) for side in (one, two)]
    if not {one[0], two[0]} & set(alone):
        numbers = [numbers[0] & numbers[1]] * 2
    if not all(numbers):
        return None
    sides = [stacked(found, *side, sets, some) for side, some in zip((one, two), numbers, strict=True)]
    sizes = [min(first.shape[1], second.shape[1]) for first, second in zip(*sides, strict=True)]
    return macro(*([part[:, :size] for part, size in zip(side, sizes, strict=True)] for side in sides))


def known_facts(model: Tuned) -> dict[str, Any]:
    """What its training took, as far as it is known without training."""
    with suppress(FileNotFoundError):
        if model.finished():
            return model.facts()
        rows = shipped_models(model.scale)
        return next(iter(rows[rows["digest"] == model.digest].to_dict("records")), {}) if len(rows) else {}
    return {}
