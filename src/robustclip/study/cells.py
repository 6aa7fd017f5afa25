"""Cells: one measured number each; a table is a grid of them."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import product
from typing import Any

from robustclip.attacks.base import as_attack
from robustclip.checks import check_choice, check_range
from robustclip.data.roles import role, role_names
from robustclip.study.scales import Scale, parse_eps
from robustclip.study.scales import scale as find_scale

ATTACKERS = ("blind", "aware")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number: the accuracy of a (defended) model on a role under an attack.

    `attacker` says what the attack sees: "blind" only the base classifier, "aware" the defended one, "none" where there
    is no attack. `spec` is what `models.load` takes, or a CLIP already loaded.
    """

    scale: Scale
    model: str
    role: str
    attack_name: str = "clean"
    attack: Callable | None = None
    attacker: str = "none"
    defense_name: str = "none"
    defense: Callable | None = None
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
            "attack": self.attack_name,
            "played_by": repr(self.attack) if self.attack else "",
            "attacker": self.attacker,
            "defense": self.defense_name,
            "defended_by": repr(self.defense) if self.defense else "",
            "eps": self.eps,
            "n": self.n,
            "seed": self.seed,
        }

    def key(self, checkpoint: str, data: str, prompts: Sequence[str]) -> str:
        """Name of the cell's result: a digest of the cell, the weights, the data revision and the prompts.

        Names of models, attacks and defenses do not count, only what they stand for. Without a defense both attackers
        are the same cell.
        """
        parts = {name: value for name, value in self.describe().items() if name not in ("model", "attack", "defense")}
        parts |= {"checkpoint": checkpoint, "data": data, "prompts": list(prompts)}
        parts |= {} if self.defense else {"attacker": "any"}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


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
) -> list[Cell]:
    """All combinations as cells, in table order; anything unknown or out of range is an error before any work.

    `models`: names of the scale, or name -> loaded CLIP, folder, or what `models.load` takes. `attacks`: names as in
    the papers, or name -> attack (any torchattacks.Attack will do). `roles`: by default all of the scale that have
    classes. `eps` replaces the budgets of the attacks. Clean cells are not repeated over attackers and eps, nor attacks
    on prompts over eps.
    """
    chosen = find_scale(scale)
    for attacker in attackers:
        check_choice("attacker", attacker, ATTACKERS)
    check_range("n", 1 if n is None else n, 1)
    if template is not None and "{}" not in template:
        raise ValueError(f"template={template!r} has no {{}}; put {{}} where the class name goes")
    models = models if isinstance(models, Mapping) else {name: chosen.model(name) for name in models}
    attacks = attacks if isinstance(attacks, Mapping) else {name: chosen.attack(name) for name in attacks}
    attacks = {name: as_attack(attack) for name, attack in attacks.items()}
    if not isinstance(defenses, Mapping):
        defenses = {"none" if defense is None else type(defense).__name__: defense for defense in defenses}
    budgets = [None] if eps is None else [parse_eps(value) for value in eps]
    cells = []
    for (model, spec), name, (attack_name, attack) in product(models.items(), _roles(chosen, roles), attacks.items()):
        own_budgets = budgets if hasattr(attack, "eps") else [None]
        variants = list(product(own_budgets, attackers)) if attack else [(None, "none")]
        for (budget, attacker), seed, (defense_name, defense) in product(variants, seeds, defenses.items()):
            cells.append(Cell(
                scale=chosen, model=model, spec=spec, role=name, n=n or chosen.images_of(name), seed=seed,
                template=template, attack_name=attack_name, attack=_tuned(attack, eps=budget, seed=seed),
                attacker=attacker, defense_name=defense_name, defense=_tuned(defense, seed=seed),
            ))  # fmt: skip
    return cells


def _roles(chosen: Scale, names: Sequence[str] | None) -> list[str]:
    """The named roles, checked, or all of the scale; sets for retrieval have no classes and no accuracy."""
    allowed = [name for name in chosen.roles if name not in role_names("retrieval")]
    return [
        check_choice(f"role at scale {chosen.name}", name, allowed) for name in (allowed if names is None else names)
    ]


def _tuned(component: Callable | None, **settings: Any) -> Callable | None:
    """An attack or defense with the grid's eps and seed, as far as it has such fields."""
    if component is None:
        return None
    if " at 0x" in repr(component):
        raise ValueError(f"{component!r} has no repr that tells its settings; make it a frozen dataclass")
    own = {entry.name: getattr(component, entry.name) for entry in fields(component) if entry.init}
    changes = {name: value for name, value in settings.items() if name in own and value is not None}
    if "eps" in changes:
        check_range("eps", changes["eps"], 0, math.inf if getattr(component, "norm", "linf") == "l2" else 1)
    parts = {name: _tuned(value, **settings) for name, value in own.items() if is_dataclass(value)}
    return replace(component, **changes, **parts)
