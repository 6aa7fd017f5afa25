"""Fine-tuned models of a scale: trained once, kept in the store, taken from there by every table that needs them.

models = fine_tuned("quick", ["TeCoA", "MMCoA"], "cifar10")      # {"TeCoA/cifar10": folder, ...} for `grid`
"""

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd

from robustclip import models
from robustclip.checks import check_folder
from robustclip.data.roles import role as find_role
from robustclip.study.bench import device_name
from robustclip.study.scales import Scale
from robustclip.study.scales import scale as find_scale
from robustclip.study.store import Store, Where, code_digest, commit, versions, write_whole
from robustclip.training import Pictures, Recipe
from robustclip.training.loop import CHECKPOINT, train
from robustclip.training.parallel import wait, world

FACTS = "training.json"


def model_name(recipe: str, role: str, shots: int | None = None) -> str:
    """How tables call a fine-tuned model: "MMCoA/imagenet", "MMCoA/imagenet-5" with 5 shots."""
    return f"{recipe}/{role}" + (f"-{shots}" if shots else "")


def fine_tuned(
    scale: str | Scale,
    recipes: Sequence[str],
    role: str,
    shots: Sequence[int | None] = (None,),
    seed: int = 0,
    store: Where = None,
    device: str = "auto",
    stages: int = 1,
    **settings: Any,
) -> dict[str, str]:
    """Folders of the scale's CLIP after each recipe on a role, by the names that tables give them.

    What the store does not hold yet is trained now; what was interrupted goes on. `settings` go to every recipe.
    With several `stages`, the folder of each model also holds those on the way: `stage-1`, `stage-2` ...
    """
    chosen, found = find_scale(scale), {}
    for count in shots:
        for name in recipes:
            recipe = chosen.recipe(name, shots=count, seed=seed, **settings)
            found[model_name(name, role, count)] = str(trained(chosen, recipe, role, name, store, device, stages))
    return found


def trained(
    scale: Scale, recipe: Recipe, role: str, name: str = "", store: Where = None, device: str = "auto", stages: int = 1
) -> Path:
    """The folder of the scale's CLIP after one recipe on a role's training pictures."""
    base = _base(scale.model("clip"), device)
    pictures = _pictures(role, scale.source, scale.training.get("pictures"))
    key = [repr(recipe), base.digest, pictures.digest, list(pictures.prompts)]
    key += [code_digest()] * scale.recompute_stale
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    folder = check_folder(Store.of(store).root / scale.name / "models" / digest, 50)
    with _alone(folder):
        wait()  # so that all processes look at the same folder
        if (folder / FACTS).is_file() and all((folder / f"stage-{number}").is_dir() for number in range(1, stages)):
            return folder
        begin = time.perf_counter()
        tuned, run = train(recipe, base, pictures, folder, stages=stages)
        if not world()[0]:
            models.save(tuned, folder)
            passes = recipe.batch_size * run.updates
            facts = {
                "model": model_name(name or type(recipe).__name__, role, recipe.shots), "recipe": repr(recipe),
                "scale": scale.name, "role": role, "shots": recipe.shots, "seed": recipe.seed, "updates": run.updates,
                "batch_size": recipe.batch_size, "pictures": passes, "per_epoch": len(run.order),
                "seconds": round(sum(run.spent.values()), 3), "wall": round(time.perf_counter() - begin, 3),
                **{f"seconds {what}": round(value, 3) for what, value in run.spent.items()},
                "forward": passes * recipe.passes()[0], "backward": passes * recipe.passes()[1], "losses": run.losses,
                "base": base.digest, "checkpoint": tuned.digest, "data": pictures.digest, "code": code_digest(),
                "commit": commit(), "device": device_name(tuned.device), "versions": versions(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }  # fmt: skip
            write_whole(folder / FACTS, json.dumps(facts, indent=1) + "\n")
            (folder / CHECKPOINT).unlink()
        wait()
    return folder


def training_facts(folders: Sequence[str | Path]) -> pd.DataFrame:
    """What the training of models cost, one row per folder that `fine_tuned` returned."""
    return pd.DataFrame([json.loads((Path(folder) / FACTS).read_text(encoding="utf-8")) for folder in folders])


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
                "batch_size": recipe.batch_size, "updates": recipe.updates_on(pictures), "forward": forward,
                "backward": backward, "seconds": seconds,
            })  # fmt: skip
    return pd.DataFrame(rows)


@lru_cache(maxsize=1)
def _pictures(role: str, source: str, n: int | None) -> Pictures:
    return Pictures.of(role, source, n)


@lru_cache(maxsize=1)
def _base(name: str, device: str) -> models.Clip:
    return models.load(name, device)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time train a model; the others wait and then find it finished."""
    if world()[0]:
        yield
        return
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
