"""The grids of the pages on adversarial fine-tuning: every recipe with one budget, on one set, under the same attacks.

models = tuned(scale("photo"), ["TeCoA", "FARE"])          # named by what makes them, trained when they are needed
cells = zero_shot(scale("photo"), models)                  # clean and attacked, on sets that none has seen
"""

from collections.abc import Mapping, Sequence
from typing import Any

from robustclip.study.cells import Cell, grid
from robustclip.study.scales import Scale
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
