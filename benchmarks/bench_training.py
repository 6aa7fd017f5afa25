"""Recipes of adversarial fine-tuning against TeCoA: pictures a second, with the common budget on the same pictures.

A ratio of 0.8 says that a recipe trains on four fifths of the pictures that TeCoA takes in the same time.
"""

from functools import partial

from side_by_side import side_by_side

from robustclip import models, study
from robustclip.models import count_passes
from robustclip.progress import progress
from robustclip.study import finetuning
from robustclip.training import Pictures, Recipe, train

UPDATES, PICTURES = 6, 1000  # of a turn, and to learn from


def measure(rounds: int = 3) -> list[dict]:
    """One row per recipe that the book compares, TeCoA first: against itself, to show what the clock is worth."""
    clip, there = models.load(device="cpu"), study.scale("full")
    recipes = {name: model.recipe for name, model in finetuning.tuned(there, device="cpu").items()}
    pictures = Pictures.of(finetuning.ROLE, there.source, PICTURES)
    run = partial(updates, clip, pictures)
    return [duel(name, run, recipes[name], recipes["TeCoA"], rounds) for name in progress(recipes, "recipes")]


def updates(clip: models.Clip, pictures: Pictures, recipe: Recipe) -> None:
    """The first updates of a training."""
    train(recipe, clip, pictures, first=UPDATES)


def duel(name: str, run: partial, recipe: Recipe, tecoa: Recipe, rounds: int) -> dict:
    """A recipe against TeCoA, on as many pictures."""
    with count_passes() as passes:
        run(recipe)
    timing = side_by_side(partial(run, recipe), partial(run, tecoa), rounds)
    seen = UPDATES * recipe.optimisation.batch_size
    counted = f"{passes.forward / seen:.1f} passes forward, {passes.backward / seen:.1f} back to the pixels each"
    return timing.row(f"{name}, against TeCoA", note=f"{seen} pictures; {counted}")
