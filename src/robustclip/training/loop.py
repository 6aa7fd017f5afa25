"""The training loop of all recipes: `train(recipe, clip, pictures).clip`."""

import copy
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from robustclip.component import identity
from robustclip.data.tinyworld import generator
from robustclip.models import Clip, save
from robustclip.progress import progress
from robustclip.training import checkpoint
from robustclip.training.batch import Batch, Stopwatch, Texts
from robustclip.training.checkpoint import CHECKPOINT
from robustclip.training.parallel import share, synchronised, wait, world
from robustclip.training.pictures import Order, Pictures
from robustclip.training.recipes import Recipe

LARGEST_SCALE = math.log(100)  # of logit_scale="clamped", as in CLIP's own training


class Diverged(ValueError):
    """A loss or gradient that is not a number; the message names the update, its pictures and the way back."""


class Objective(nn.Module):
    """The recipe's loss as a module, which is what several processes share."""

    def __init__(self, recipe: Recipe, clip: Clip) -> None:
        super().__init__()
        self.recipe, self.clip = recipe, clip

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return self.recipe.loss(batch)


class Run:
    """Everything that changes while a recipe runs."""

    def __init__(self, recipe: Recipe, clip: Clip, pictures: Pictures) -> None:
        self.recipe, self.original, self.pictures = recipe, clip, pictures
        self.clip = recipe.prepare(copy.deepcopy(clip), pictures.classes).requires_grad_(False)
        named = {name.removeprefix("network."): weight for name, weight in self.clip.named_parameters()}
        self.weights = [weight for name, weight in named.items() if recipe.learns(name)]
        if not self.weights:
            raise ValueError(f"{recipe!r} trains no weight of {clip.name!r}; choose another value of trains")
        for weight in self.weights:
            weight.requires_grad_()
        self.optimizer = recipe.optimisation.start(self.weights)
        self.order = Order(pictures.labels, recipe.optimisation.batch_size, recipe.shots, recipe.sampler, recipe.seed)
        self.updates = recipe.optimisation.updates_on(len(self.order))
        self.objective, self.texts = synchronised(Objective(recipe, self.clip)), Texts(self.clip)
        self.done, self.losses, self.spent = 0, [], Stopwatch()
        self.place = "there is no checkpoint; give a folder to keep some"

    def batch(self) -> Batch:
        """The batch of the next update; what is random about it depends on the seed and its number only."""
        rows = self.order.rows(self.done)
        own, recipe = share(len(rows)), self.recipe
        images = self.pictures.fetch(rows[own]).to(self.clip.device)
        noise = torch.rand((len(rows), *images.shape[1:]), generator=generator(f"noise/{recipe.seed}", self.done))[own]
        return Batch(
            recipe, self.texts, images, self.pictures.labels[rows].to(self.clip.device), self.pictures.prompts,
            noise.to(images) * 2 - 1, recipe.attack.eps_at(recipe.eps, self.done, self.updates), self.original,
            self.spent,
        )  # fmt: skip

    def update(self) -> None:
        """One step of the optimizer."""
        optimisation = self.recipe.optimisation
        self.optimizer.zero_grad(set_to_none=True)
        with self.spent.on("pictures"):
            batch = self.batch()
        with self.spent.on("update"):
            loss = self.objective(batch)
            if loss.isfinite():
                loss.backward()
            norm = nn.utils.clip_grad_norm_(self.weights, optimisation.clip_norm or math.inf)
            if not (loss.isfinite() and norm.isfinite()):
                raise Diverged(self._story(loss, norm))
            for group in self.optimizer.param_groups:
                group["lr"] = optimisation.rate_at(self.done, self.updates)
            self.optimizer.step()
            if self.recipe.logit_scale == "clamped":
                self.clip.network.logit_scale.data.clamp_(0, LARGEST_SCALE)
        self.losses.append(loss.item())
        self.done += 1

    def _story(self, loss: Tensor, norm: Tensor) -> str:
        rows = self.order.rows(self.done).tolist()
        shown = f"{rows}" if len(rows) <= 16 else f"{rows[:16]} and {len(rows) - 16} more".replace("]", ", ...]")
        return (
            f"update {self.done} of {self.updates}: loss {loss.item():g}, norm of its gradient {norm.item():g}; "
            f"pictures {shown}; {self.place}. Lower rate={self.recipe.optimisation.rate:g}, or set clip_norm"
        )

    def save(self, path: Path) -> None:
        """Keep all of it in one file."""
        wait()
        if not world()[0]:
            facts = {"done": self.done, "losses": self.losses, "spent": self.spent, **self._about()}
            checkpoint.save(path, self.weights, self.optimizer, facts)
            self.place = f"the last good checkpoint is {path}, of update {self.done}"

    def restore(self, path: Path) -> None:
        """Go on from a file that `save` wrote, if there is one, and if it is of the same run."""
        if path.is_file():
            facts = checkpoint.restore(path, self.weights, self.optimizer, self._about())
            self.done, self.losses = facts["done"], facts["losses"]
            self.spent.update(facts["spent"])
            self.place = f"the last good checkpoint is {path}, of update {self.done}"

    def _about(self) -> dict:
        base, pictures = self.original.digest, self.pictures.digest
        return {"recipe": identity(self.recipe), "model": base, "pictures": pictures, "updates": self.updates}


def train(
    recipe: Recipe, clip: Clip, pictures: Pictures, folder: Path | str | None = None, every: int = 50, stages: int = 1,
    first: int | None = None,
) -> Run:  # fmt: skip
    """The finished run, whose `clip` is a tuned copy; or one of the `first` so many updates only.

    With a folder, a checkpoint in it is written `every` so many updates, and an interrupted run goes on from there. The
    model after each but the last of so many equal `stages` is kept in the folder, too: `stage-1`, `stage-2` ...
    """
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        run = Run(recipe, clip, pictures)
        path = folder and Path(folder) / CHECKPOINT
        if path:
            run.restore(path)
        end = min(run.updates, first or run.updates)
        for _ in progress(range(run.done, end), type(recipe).__name__, unit="update"):
            run.update()
            stage, rest = divmod(run.done * stages, run.updates)
            if path and stages > 1 and rest < stages and 0 < stage < stages and not world()[0]:
                save(run.clip, path.parent / f"stage-{stage}")
            if path and (run.done % every == 0 or run.done == run.updates):
                run.save(path)
    run.clip.requires_grad_(False)
    return run
