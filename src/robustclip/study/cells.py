"""Cells: one measured number each; a table is a grid of them."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import product
from typing import Any

from robustclip.attacks.base import Adversary, as_attack
from robustclip.attacks.fast import at_precision
from robustclip.checks import check_choice, check_integer, check_range
from robustclip.classes import Classes
from robustclip.component import Resolve, identity, rebuild, settings
from robustclip.data.roles import role, role_names
from robustclip.defenses.base import Defense, as_defense
from robustclip.models import PRECISIONS
from robustclip.study.scales import Scale, parse_eps
from robustclip.study.scales import scale as find_scale

ATTACKERS = ("blind", "aware")
TASKS = ("classify", "retrieve")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number: how often a (defended) model is right on a role under an attack.

    `attacker` says what the attack sees: "blind" only the base classifier, "aware" the defended one, "none" where there
    is no attack. `spec` is what `models.load` takes, a model that `fine_tuned` will make, or a CLIP already loaded.
    """

    scale: Scale
    model: str
    role: str
    task: str = "classify"
    attack_name: str = "clean"
    attack: Adversary | None = None
    attacker: str = "none"
    defense_name: str = "none"
    defense: Defense | None = None
    n: int
    seed: int = 0
    template: str | None = None  # None: the prompt template of the data
    spec: Any = field(default=None, compare=False, repr=False)

    @property
    def eps(self) -> float:
        """The attack's budget; 0 without one."""
        return float(getattr(self.attack, "eps", 0.0))

    def describe(self) -> dict:
        """The cell in words and numbers, as tables show it and the store keeps it."""
        return {
            "scale": self.scale.name,
            "model": self.model,
            "role": self.role,
            "dataset": role(self.role).title,
            "source": self.scale.source,
            "task": self.task,
            "attack": self.attack_name,
            "played_by": repr(self.attack) if self.attack else "",
            "attacker": self.attacker,
            "defense": self.defense_name,
            "defended_by": repr(self.defense) if self.defense else "",
            "eps": self.eps,
            "n": self.n,
            "seed": self.seed,
        }

    def key(self, checkpoint: str, data: str, classes: Classes, resolve: Resolve) -> str:
        """Name of the cell's result: a digest of every setting, of the weights, of the data and of all texts.

        Names of scales, models, attacks and defenses do not count, only what they stand for. Without a defense both
        attackers are the same cell.
        """
        parts = {
            "task": self.task, "role": self.role, "n": self.n, "seed": self.seed, "checkpoint": checkpoint,
            "data": data, "classes": classes.digest, "attack": identity(self.attack, resolve),
            "defense": identity(self.defense, resolve), "attacker": self.attacker if self.defense else "any",
        }  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def made_by(self) -> dict | None:
        """JSON from which `Cell.again` makes the cell; None for cells of loaded models or of a notebook's own parts."""
        if not (isinstance(self.spec, str) or is_dataclass(self.spec)):
            return None
        own = {name: getattr(self, name) for name in REPEATED}
        try:
            made = settings(own | {"scale": self.scale.place})
            rebuild(made)
        except ValueError:
            return None
        return made

    @classmethod
    def again(cls, made: dict) -> "Cell":
        """The cell that `made_by` described."""
        own = rebuild(made)
        return cls(**own | {"scale": find_scale(own["scale"])})


REPEATED = tuple(entry.name for entry in fields(Cell) if entry.name != "scale")


def grid(
    scale: str | Scale,
    models: Sequence[str] | Mapping[str, Any] = ("clip",),
    roles: Sequence[str] | None = None,
    attacks: Sequence[str] | Mapping[str, Callable | None] = ("clean", "PGD-100"),
    defenses: Sequence[Callable | None] | Mapping[str, Callable | None] = (None,),
    attackers: Sequence[str] = ("blind",),
    seeds: Sequence[int] = (0,),
    n: int | None = None,
    eps: Sequence[float | str] | None = None,
    template: str | None = None,
    task: str = "classify",
    precision: str | None = None,
) -> list[Cell]:
    """All combinations as cells, in table order; anything unknown or out of range is an error before any work.

    `models`: names of the scale, or name -> loaded CLIP, folder, model to be trained, or what `models.load` takes.
    `attacks`: names as in the papers, or name -> attack (any torchattacks.Attack will do). `roles`: by default all of
    the scale that the task can be done on. `eps` replaces the budgets of the attacks. Clean cells are not repeated over
    attackers and eps, nor attacks on prompts over eps. `precision`, of the gradients of image attacks, is the scale's
    unless given.
    """
    chosen = find_scale(scale)
    check_choice("task", task, TASKS)
    for attacker in attackers:
        check_choice("attacker", attacker, ATTACKERS)
    check_integer("n", 1 if n is None else n, 1)
    if template is not None and "{}" not in template:
        raise ValueError(f"template={template!r} has no {{}}; put {{}} where the class name goes")
    precision = check_choice("precision", precision or chosen.precision, PRECISIONS)
    models = models if isinstance(models, Mapping) else {name: chosen.model(name) for name in models}
    attacks = attacks if isinstance(attacks, Mapping) else {name: chosen.attack(name) for name in attacks}
    attacks = {name: attack and at_precision(as_attack(attack), precision) for name, attack in attacks.items()}
    if not isinstance(defenses, Mapping):
        defenses = {"none" if defense is None else type(defense).__name__: defense for defense in defenses}
    for name in (name for name, defense in defenses.items() if defense is None and name != "none"):
        raise ValueError(f"defense {name!r} is None; give the defense itself, or call it 'none'")
    defenses = {name: defense and as_defense(defense) for name, defense in defenses.items()}
    budgets = [None] if eps is None else [parse_eps(value) for value in eps]
    cells = []
    for (model, spec), name, (attack_name, attack) in product(
        models.items(), _roles(chosen, roles, task), attacks.items()
    ):
        own_budgets = budgets if attack and attack.changes_images else [None]
        variants = list(product(own_budgets, attackers)) if attack else [(None, "none")]
        for (budget, attacker), seed, (defense_name, defense) in product(variants, seeds, defenses.items()):
            cells.append(Cell(
                scale=chosen, model=model, spec=spec, role=name, n=n or chosen.images_of(name), seed=seed, task=task,
                template=template, attack_name=attack_name, attack=_tuned(attack, eps=budget, seed=seed),
                attacker=attacker, defense_name=defense_name, defense=_tuned(defense, seed=seed),
            ))  # fmt: skip
    return cells


def _roles(chosen: Scale, names: Sequence[str] | None, task: str) -> list[str]:
    """The named roles, checked, or all of the scale; sets for retrieval have captions instead of classes."""
    for name in names or ():
        if name in chosen.missing:
            raise ValueError(f"no set plays role {name!r} at scale {chosen.name!r}: {chosen.missing[name]}")
    allowed = [name for name in chosen.roles if (name in role_names("retrieval")) == (task == "retrieve")]
    return [
        check_choice(f"role to {task} at scale {chosen.name}", name, allowed)
        for name in (allowed if names is None else names)
    ]


def _tuned(component: Callable | None, **wanted: Any) -> Callable | None:
    """An attack or defense with the grid's eps and seed, as far as it has such fields."""
    if not is_dataclass(component):
        return component
    own = {entry.name: getattr(component, entry.name) for entry in fields(component) if entry.init}
    changes = {name: value for name, value in wanted.items() if name in own and value is not None}
    if "eps" in changes:
        check_range("eps", changes["eps"], 0, math.inf if getattr(component, "norm", "linf") == "l2" else 1)
    parts = {name: _tuned(value, **wanted) for name, value in own.items() if is_dataclass(value)}
    return replace(component, **changes, **parts)
