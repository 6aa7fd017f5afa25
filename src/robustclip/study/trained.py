"""Fine-tuned models of a scale, named by what makes them and trained when their weights are first needed.

models = fine_tuned("quick", ["TeCoA", "MMCoA"], "cifar10")      # {"TeCoA/cifar10": Tuned, ...} for `grid`
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from robustclip import models
from robustclip.attacks.language import load_language_model
from robustclip.checks import check_folder, check_range
from robustclip.classes import Classes
from robustclip.component import identity
from robustclip.data.roles import role as find_role
from robustclip.data.sources import facts
from robustclip.files import file_digest, locked, write_whole
from robustclip.study.bench import TRAINED, device_name
from robustclip.study.evaluate import is_stale
from robustclip.study.provenance import commit, digests, versions
from robustclip.study.scales import Scale
from robustclip.study.scales import scale as find_scale
from robustclip.study.shipped import shipped_models
from robustclip.study.store import Store, unusable
from robustclip.training.checkpoint import CHECKPOINT
from robustclip.training.interpolation import interpolate
from robustclip.training.loop import Run, train
from robustclip.training.parallel import wait, world
from robustclip.training.pictures import Pictures
from robustclip.training.recipes import Recipe

FACTS = "training.json"
FIRST = 10  # losses that tell whether other code trains the same model

_base = lru_cache(maxsize=1)(models.load)
_pictures = lru_cache(maxsize=1)(Pictures.of)
_digest_of = lru_cache(maxsize=256)(lambda path, changed: file_digest(path))  # `changed` makes a new file a new one


def model_name(recipe: str, role: str, shots: int | None = None) -> str:
    """How tables call a fine-tuned model: "MMCoA/imagenet", "MMCoA/imagenet-5" with 5 shots."""
    return f"{recipe}/{role}" + (f"-{shots}" if shots else "")


@dataclass(frozen=True)
class Tuned(os.PathLike):
    """A CLIP after a recipe on a role's training pictures; as a path it is the folder of its weights.

    Only `folder` (and with it `os.fspath`) trains, where the store holds no finished model. `at` is a stage on the way,
    `weight` a place on the line from the weights of the base (0) to those of the tuned model (1).
    """

    name: str  # as tables call it
    scale: str
    base: str  # what `models.load` takes
    recipe: Recipe
    role: str
    source: str
    pictures: int | None  # to learn from, None for all
    recompute: bool = False  # whether other code makes another model
    stages: int = 1
    at: int | None = None
    store: str | None = None  # folder of results
    device: str = "auto"
    weight: float = 1.0

    # --- what it is, without weights

    @cached_property
    def identity(self) -> dict:
        """Everything that makes the weights: recipe, base CLIP, pictures; as shipped if these are not at hand."""
        try:
            base, data = _base(self.base, self.device), facts(self.role, self.source, "train")
        except FileNotFoundError:
            if (known := self._shipped("recipe", "role", "stages")) is None:
                raise
            made = known["identity"]
        else:
            language = {"language_model": lambda name: load_language_model(name, base).digest}
            made = {"recipe": identity(self.recipe, language), "base": base.digest, "data": data["digest"],
                    "pictures": self.pictures, "classes": Classes(data["names"], data["prompts"]).digest}  # fmt: skip
        made = made | ({} if self.at is None else {"stage": [self.at, self.stages]})
        return made | ({} if self.weight == 1 else {"weight": self.weight})

    @cached_property
    def digest(self) -> str:
        """Names the model in keys of results."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:24]

    def provenance(self) -> dict[str, str]:
        """Digests of the code that makes it, as it is now."""
        return digests(self.recipe, train, *[interpolate] * (self.weight != 1))

    def stage(self, number: int) -> "Tuned":
        """The model after so many of its `stages`; the last is the finished one."""
        return replace(self, at=None if number == self.stages else number, weight=1.0)

    def between(self, weight: float) -> "Tuned":
        """The model at this place on the line from the base (0) to this one (1); no further training."""
        return replace(self, weight=float(check_range("weight", weight, 0, 1)))

    # --- where it is

    def __fspath__(self) -> str:
        return str(self.folder())

    def folder(self) -> Path:
        """The folder of the weights, which are trained now if they are not there; what was interrupted goes on."""
        if world()[1] > 1 or not self.finished():  # several processes look together
            self._train()
        end = self._whole if self.at is None else self._whole / f"stage-{self.at}"
        place = end if self.weight == 1 else end / f"weight-{self.weight:g}"
        if not place.is_dir():
            mixed = interpolate(_base(self.base, self.device), models.load(str(end), self.device), self.weight)
            models.save(mixed, end / f"unfinished-{os.getpid()}").replace(place)
        return place

    @cached_property
    def _whole(self) -> Path:
        """The folder of the finished model."""
        whole = self.stage(self.stages)
        name = whole.digest
        if self.recompute:
            name += "-" + hashlib.sha256(json.dumps(whole.provenance(), sort_keys=True).encode()).hexdigest()[:8]
        return Store(self.store).root / self.scale / "models" / name

    def finished(self) -> bool:
        """Whether the store holds the model; one that was damaged since is an OSError."""
        if not (self._whole / FACTS).is_file():
            return False
        for name, digest in read_facts(self._whole)["files"].items():
            path = self._whole / name
            if not path.is_file() or _digest_of(path, path.stat().st_mtime_ns) != digest:
                raise unusable(self._whole, f"its {name} was changed or damaged after the training")
        return all((self._whole / f"stage-{number}").is_dir() for number in range(1, self.stages))

    @property
    def stale(self) -> bool:
        """Whether the finished model was trained by other code; scales with `recompute_stale` then train another."""
        if not self.finished():
            return False
        codes = read_facts(self._whole)["provenance"], self.stage(self.stages).provenance()
        then, now = ({TRAINED + name: digest for name, digest in code.items()} for code in codes)
        return is_stale({"cell": {"scale": self.scale}, "provenance": then}, now)

    def facts(self) -> dict:
        """What its training took: from the store, else as shipped; else it is trained."""
        whole = self.stage(self.stages)
        return (None if self.finished() else whole._shipped("digest")) or read_facts(whole.folder())

    def _shipped(self, *names: str) -> dict | None:
        """The shipped facts that agree with what this model has by these names."""
        own = {"recipe": repr(self.recipe)} | {name: getattr(self, name) for name in names if name != "recipe"}
        rows = shipped_models(self.scale).to_dict("records")
        return next((row for row in rows if all(row[name] == own[name] for name in names)), None)

    # --- making it

    def ingredients(self) -> tuple[models.Clip, Pictures]:
        """The CLIP to start from and the pictures to learn from."""
        return _base(self.base, self.device), _pictures(self.role, self.source, self.pictures)

    def _train(self) -> None:
        """Train it, one process at a time; the others wait and find it finished."""
        check_folder(self._whole, 50)
        with nullcontext() if world()[0] else locked(self._whole / "lock"):
            wait()  # so that all processes of one training look at the same folder
            if not self.finished():
                begin = time.perf_counter()
                run = train(self.recipe, *self.ingredients(), self._whole, stages=self.stages)
                if not world()[0]:
                    models.save(run.clip, self._whole)
                    facts = self._told(run) | {"wall": round(time.perf_counter() - begin, 3)}
                    write_whole(self._whole / FACTS, json.dumps(facts, indent=1) + "\n")
                    (self._whole / CHECKPOINT).unlink()
                wait()

    def _told(self, run: Run) -> dict:
        """The facts of a finished training."""
        batch_size, whole = self.recipe.optimisation.batch_size, self.stage(self.stages)
        forward, backward = self.recipe.passes()
        weights = (path for path in sorted(self._whole.rglob("*.safetensors")) if path.name != CHECKPOINT)
        return {
            "model": self.name, "digest": whole.digest, "identity": whole.identity, "provenance": whole.provenance(),
            "recipe": repr(self.recipe), "scale": self.scale, "role": self.role, "source": self.source,
            "shots": self.recipe.shots, "seed": self.recipe.seed, "stages": self.stages, "updates": run.updates,
            "batch_size": batch_size, "pictures": run.updates * batch_size, "per_epoch": len(run.order),
            "seconds": round(sum(run.spent.values()), 3),
            **{f"seconds {what}": round(value, 3) for what, value in run.spent.items()},
            "forward": run.updates * batch_size * forward, "backward": run.updates * batch_size * backward,
            "losses": run.losses, "first_losses": run.losses[:FIRST], "base": run.original.digest,
            "checkpoint": run.clip.digest, "data": run.pictures.digest,
            "files": {path.relative_to(self._whole).as_posix(): file_digest(path) for path in weights},
            "commit": commit(), "device": device_name(run.clip.device), "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip


@dataclass(frozen=True)
class Soup(os.PathLike):
    """The mean of the weights of several fine-tuned models, whatever their order; mixed when it is first needed."""

    name: str  # as tables call it
    members: tuple[Tuned, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        if not self.members:
            raise ValueError(f"members=() of the soup {self.name!r} are none; give at least one fine-tuned model")

    @cached_property
    def identity(self) -> dict:
        """What makes the weights: the digests of the members."""
        return {"soup": sorted(member.digest for member in self.members)}

    @cached_property
    def digest(self) -> str:
        """Names the model in keys of results."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def base(self) -> str:
        """The model that the members were fine-tuned from."""
        return self.members[0].base

    def provenance(self) -> dict[str, str]:
        """Digests of the code that makes the members, and of what mixes them."""
        return digests(*(member.recipe for member in self.members), train, interpolate)

    def __fspath__(self) -> str:
        return str(self.folder())

    def folder(self) -> Path:
        """The folder of the weights; members that are not there are trained."""
        own = sorted(self.members, key=lambda member: member.digest)
        folders = [member.folder() for member in own]
        code = hashlib.sha256(json.dumps(self.provenance(), sort_keys=True).encode()).hexdigest()[:8]
        place = Store(own[0].store).root / own[0].scale / "models" / f"{self.digest}-{code}"
        if not place.is_dir():
            mixed, *others = (models.load(str(folder), own[0].device) for folder in folders)
            for count, other in enumerate(others, 2):
                mixed = interpolate(mixed, other, 1 / count)
            models.save(mixed, place.with_name(f"unfinished-{os.getpid()}")).replace(place)
        return place


def fine_tuned(
    scale: str | Scale, recipes: Sequence[str], role: str, shots: Sequence[int | None] = (None,), seed: int = 0,
    store: Store | str | Path | None = None, device: str = "auto", stages: int = 1, **settings: Any,
) -> dict[str, Tuned]:  # fmt: skip
    """The scale's CLIP after each recipe on a role, by the names that tables give them; nothing is trained yet.

    `settings` go to every recipe. With several `stages`, those on the way are kept, too: `tuned.stage(1)` ...
    """
    chosen, found = find_scale(scale), {}
    place = store.root if isinstance(store, Store) else store
    for count, name in product(shots, recipes):
        recipe = chosen.recipe(name, shots=count, seed=seed, **settings)
        found[model_name(name, role, count)] = Tuned(
            model_name(name, role, count), chosen.name, chosen.model("clip"), recipe, find_role(role).name,
            chosen.source, chosen.training.get("pictures"), chosen.recompute_stale, stages, None,
            place and str(place), device,
        )  # fmt: skip
    return found


def played_shots(scale: str | Scale, role: str, amount: str) -> int | None:
    """Pictures per class that play an amount like "50" or "full" (None): the scale may not have as many."""
    pictures = find_scale(scale).training.get("pictures")
    most = math.inf if pictures is None else pictures // len(find_role(role).classes)
    return None if amount == "full" else int(min(int(amount), most))


def tuned_by_shots(
    scale: str | Scale, recipes: Sequence[str], role: str, amounts: Sequence[str], equal: bool = False, **options: Any
) -> dict[str, Tuned]:
    """Models that differ in the amount of data, by the names that MMCoA prints: "MMCoA 5-shot", "MMCoA full".

    Updates follow the pictures, by the epochs of the scale's table [training.shots]; or all models take equally many,
    those of [training.equal]: no models if the scale has no such table. `options` as in `fine_tuned`.
    """
    chosen, found = find_scale(scale), {}
    own = chosen.training.get("equal") if equal else chosen.training.get("shots", {})
    for amount in amounts if own is not None else ():
        settings = ({"epochs": None} if equal else {"updates": None}) | own | options
        models = fine_tuned(chosen, recipes, role, [played_shots(chosen, role, amount)], **settings)
        found |= {f"{name} {amount}{'-shot' * (amount != 'full')}{', equal updates' * equal}": model
                  for name, model in zip(recipes, models.values(), strict=True)}  # fmt: skip
    return found


def training_facts(tuned: Iterable[Tuned]) -> pd.DataFrame:
    """What the training of models took, one row each: from the store, else as shipped; else they are trained now."""
    return pd.DataFrame([model.facts() for model in tuned])


def read_facts(folder: Path) -> dict:
    """What the training of the finished model in a folder took."""
    path = Path(folder) / FACTS
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise unusable(path.parent, f"its {FACTS} is not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("files"), dict) or not found["files"]:
        raise unusable(path.parent, f"its {FACTS} does not describe a training of this version")
    return found


def retrace(tuned: Tuned, losses: Sequence[float] | None, updates: int = 5) -> bool:
    """Whether the first updates, run again now, have these losses; of none that nobody knows."""
    if losses is None:
        return False
    known = list(losses)[:updates]
    run = train(tuned.recipe, *tuned.ingredients(), first=len(known))
    return all(math.isclose(*pair, rel_tol=1e-6) for pair in zip(run.losses, known, strict=True))


def plan_training(
    scale: str | Scale, recipes: Sequence[str], roles: Sequence[str], shots: int | None = None
) -> pd.DataFrame:
    """What fine-tuning would cost per epoch, at the scale's assumed speed in image passes a second if it has one."""
    chosen, rows = find_scale(scale), []
    for role in roles:
        entry = find_role(role)
        whole = (entry.paper.get("train_images") if chosen.name == "paper" else chosen.training.get("pictures")) or 0
        if not (whole or shots):
            raise ValueError(f"scale {chosen.name!r} does not say how many pictures {role} has; give shots, or set "
                             "pictures in its table [training]")  # fmt: skip
        for name in recipes:
            recipe = chosen.recipe(name, shots=shots)
            pictures = shots * len(entry.classes) if shots else whole
            forward, backward = (pictures * count for count in recipe.passes())
            seconds = (forward + backward) / chosen.assumed_speed if chosen.assumed_speed else float("nan")
            rows.append({
                "scale": chosen.name, "recipe": name, "role": role, "shots": shots, "pictures": pictures,
                "batch_size": recipe.optimisation.batch_size, "updates": recipe.optimisation.updates_on(pictures),
                "forward": forward, "backward": backward, "seconds": seconds,
            })  # fmt: skip
    return pd.DataFrame(rows)
