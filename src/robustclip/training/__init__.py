"""Adversarial fine-tuning: recipes, the one loop that runs them, and what lies between two models.

A recipe is a loss, an inner attack and an optimisation: `train(TeCoA(eps=4/255), clip, pictures).clip`.
"""

from robustclip.training.anchored import LAAT, TIMA
from robustclip.training.batch import Batch
from robustclip.training.guided import FARE, PMGAFT, TGAZSR
from robustclip.training.inner import InnerAttack
from robustclip.training.interpolation import interpolate
from robustclip.training.loop import Diverged, train
from robustclip.training.named import named_recipe
from robustclip.training.optimisation import Optimisation
from robustclip.training.pictures import Order, Pictures
from robustclip.training.recipes import VP, AdvPT, MMCoA, Recipe, Standard, TeCoA, WithoutText, contrast

__all__ = [
    "FARE", "LAAT", "PMGAFT", "TGAZSR", "TIMA", "VP", "AdvPT", "Batch", "Diverged", "InnerAttack", "MMCoA",
    "Optimisation", "Order", "Pictures", "Recipe", "Standard", "TeCoA", "WithoutText", "contrast", "interpolate",
    "named_recipe", "train",
]  # fmt: skip
