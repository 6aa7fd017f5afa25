"""The training loop of all recipes, and the one file that an interrupted run goes on from."""

import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robustclip.checks import check_folder
from robustclip.data.tinyworld import generator
from robustclip.models import Clip, save
from robustclip.progress import progress
from robustclip.training.batch import Batch, Stopwatch, Texts
from robustclip.training.parallel import share, synchronised, wait, world
from robustclip.training.pictures import Order, Pictures

if TYPE_CHECKING:
    from robustclip.training.recipes import Recipe

CHECKPOINT = "checkpoint.safetensors"
LARGEST_SCALE = math.log(100)  # of logit_scale="clamped", as in CLIP's own training


class Diverged(ValueError):
    """A loss or gradient that is not a number; the message names the update, its pictures and the way back."""


class Objective(nn.Module):
    """The recipe's loss as a module, which is what several processes share."""

    def __init__(self, recipe: "Recipe", clip: Clip) -> None:
        super().__init__()
        self.recipe, self.clip = recipe, clip

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        return self.recipe.loss(batch)


class Run:
    """Everything that changes while a recipe runs."""

    def __init__(self, recipe: "Recipe", clip: Clip, pictures: Pictures) -> None:
        self.recipe, self.pictures, self.base = recipe, pictures, clip.digest
        self.clip = recipe.prepare(copy.deepcopy(clip)).requires_grad_(False)
        self.weights = [weight for name, weight in self.clip.network.named_parameters() if recipe.learns(name)]
        if not self.weights:
            raise ValueError(f"{recipe!r} trains no weight of {clip.name!r}; choose another value of trains")
        for weight in self.weights:
            weight.requires_grad_()
        self.optimizer = recipe.make_optimizer(self.weights)
        self.order = Order(pictures.labels, recipe.batch_size, recipe.shots, recipe.sampler, recipe.seed)
        self.updates = recipe.updates_on(len(self.order))
        self.objective, self.texts = synchronised(Objective(recipe, self.clip)), Texts(self.clip)
        self.done, self.losses, self.spent = 0, [], Stopwatch()
        self.place = "there is no checkpoint; give a folder to keep some"

    def batch(self) -> Batch:
        """The batch of the next update; what is random about it depends on the seed and its number only."""
        rows = self.order.rows(self.done)
        own, seed = share(len(rows)), self.recipe.seed
        images = self.pictures.fetch(rows[own]).to(self.clip.device)
        noise = torch.rand((len(rows), *images.shape[1:]), generator=generator(f"noise/{seed}", self.done))[own]
        return Batch(
            self.recipe, self.texts, images, self.pictures.labels[rows].to(self.clip.device), self.pictures.prompts,
            noise.to(images) * 2 - 1, self.recipe.eps_at(self.done, self.updates), self.spent,
        )  # fmt: skip

    def update(self) -> None:
        """One step of the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.spent.on("pictures"):
            batch = self.batch()
        with self.spent.on("update"):
            loss = self.objective(batch)
            if loss.isfinite():
                loss.backward()
            norm = nn.utils.clip_grad_norm_(self.weights, self.recipe.clip_norm or math.inf)
            if not (loss.isfinite() and norm.isfinite()):
                raise Diverged(self._story(loss, norm))
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.rate_at(self.done, self.updates)
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
            f"pictures {shown}; {self.place}. Lower rate={self.recipe.rate:g}, or set clip_norm"
        )

    def save(self, path: Path) -> None:
        """Weights, optimizer, random states, counters and losses in one file, written at once or not at all."""
        wait()
        if world()[0]:
            return
        tensors = {f"weights/{number}": weight.detach() for number, weight in enumerate(self.weights)}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{name}": value for name, value in state.items()}
        tensors |= _random_states()
        facts = {"done": self.done, "losses": self.losses, "spent": self.spent, **self._facts()}
        check_folder(path.parent, 2 * sum(value.nbytes for value in tensors.values()) / 1e6)
        temporary = path.with_suffix(".tmp")
        save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, temporary,
                  {"run": json.dumps(facts)})  # fmt: skip
        temporary.replace(path)
        self.place = f"the last good checkpoint is {path}, of update {self.done}"

    def restore(self, path: Path) -> None:
        """Go on from a file that `save` wrote, if there is one, and if it is of the same run."""
        if not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (SafetensorError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no checkpoint, or a torn one ({error}); delete it to start anew") from error
        if different := [name for name, value in self._facts().items() if facts.get(name) != value]:
            raise ValueError(f"{path} is of another run ({', '.join(different)} differ); choose another folder")
        with torch.no_grad():
            for number, weight in enumerate(self.weights):
                weight.copy_(tensors[f"weights/{number}"])
        states: dict[int, dict] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, number, entry = name.split("/")
                weight = self.weights[int(number)]
                same = value.shape == weight.shape and value.ndim  # moments lie in memory as their weight does
                states.setdefault(int(number), {})[entry] = torch.empty_like(weight).copy_(value) if same else value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": states})
        _set_random_states(tensors)
        self.done, self.losses = facts["done"], facts["losses"]
        self.spent.update(facts["spent"])
        self.place = f"the last good checkpoint is {path}, of update {self.done}"

    def _facts(self) -> dict:
        of = {"recipe": repr(self.recipe), "model": self.base, "pictures": self.pictures.digest}
        return of | {"updates": self.updates}


def train(
    recipe: "Recipe", clip: Clip, pictures: Pictures, folder: Path | None = None, every: int = 50, stages: int = 1
) -> tuple[Clip, Run]:
    """A tuned copy of `clip`, and the finished run; with a folder, a checkpoint in it `every` so many updates.

    The model after each but the last of so many equal `stages` is kept in the folder, too: `stage-1`, `stage-2` ...
    """
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        run = Run(recipe, clip, pictures)
        if folder:
            run.restore(folder / CHECKPOINT)
        for _ in progress(range(run.done, run.updates), type(recipe).__name__, unit="update"):
            run.update()
            stage, rest = divmod(run.done * stages, run.updates)
            if folder and stages > 1 and rest < stages and 0 < stage < stages and not world()[0]:
                save(run.clip, folder / f"stage-{stage}")
            if folder and (run.done % every == 0 or run.done == run.updates):
                run.save(folder / CHECKPOINT)
    return run.clip.requires_grad_(False), run


def _random_states() -> dict[str, Tensor]:
    """The state of torch's generators."""
    states = {"random/cpu": torch.get_rng_state()}
    return states | ({"random/cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random_states(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
