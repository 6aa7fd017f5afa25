"""Adversarial fine-tuning: recipes `(clip, pictures) -> clip`, one loop, and what lies between two models."""

from robustclip.training.batch import Batch
from robustclip.training.interpolation import interpolate
from robustclip.training.loop import Diverged
from robustclip.training.pictures import Order, Pictures
from robustclip.training.recipes import VP, AdvPT, MMCoA, Recipe, Standard, TeCoA, contrast, named_recipe

__all__ = [
    "VP", "AdvPT", "Batch", "Diverged", "MMCoA", "Order", "Pictures", "Recipe", "Standard", "TeCoA", "contrast",
    "interpolate", "named_recipe",
]  # fmt: skip
