"""Hybrids: a fine-tuned CLIP, or a mixture of several, behind a defense at test time; chosen on validation images."""

from collections.abc import Iterable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from robustclip.data.sources import Samples, load_samples
from robustclip.study import testtime
from robustclip.study.bench import Bench
from robustclip.study.cells import Cell
from robustclip.study.exchange import artifact
from robustclip.study.finetuning import tuned
from robustclip.study.grown import grown
from robustclip.study.scales import Scale
from robustclip.study.tasks import Classify
from robustclip.study.trained import Soup

Candidate = tuple[str, str]  # host, defense
Right = dict[tuple[str, str, str], np.ndarray]  # right or wrong by host, defense, role
GROUND_UP = "ground-up"  # the CLIP that learned from attacked images from the first step on, where a scale has one


class Plan(NamedTuple):
    """What takes part, and on how many images of each role of the validation parts."""

    recipes: tuple[str, ...] = ("TeCoA", "PMG-AFT", "FARE")
    parts: tuple[tuple[str, str], ...] = tuple(product(("TeCoA", "PMG-AFT", "FARE"), ("quarter", "half")))  # of the way
    defenses: tuple[str, ...] = ("none", "Mirror", "Views-5", "TTE", "COLA")
    roles: tuple[str, ...] = ("cifar10", "caltech101")
    tested: tuple[str, ...] = testtime.ROLES  # roles of test images
    clean: int = 200
    aware: int = 32
    blind: tuple[str, ...] = ("clean", "PGD-10:last", "AutoAttack")  # conditions of test images, besides "aware"

    @property
    def singles(self) -> tuple[str, ...]:
        """Hosts that are a single method by themselves."""
        return ("CLIP", *self.recipes, GROUND_UP)


QUICK = Plan(
    ("TeCoA", "FARE"), (("TeCoA", "half"),), ("none", "Mirror", "Views-5"), ("cifar10",), ("cifar10",), 10, 6,
    ("clean", "PGD-10:last"),
)  # fmt: skip
WEIGHTS = {"quarter": 0.25, "half": 0.5}


def plan(scale: Scale) -> Plan:
    """What takes part at a scale."""
    return QUICK if scale.name == "quick" else Plan()


def hosts(scale: Scale, seed: int = 0, device: str = "auto") -> dict[str, Any]:
    """Models by name: CLIP, fine-tuned ones, some on the way from CLIP to these, their soup, one from the ground up."""
    own, first = plan(scale), [(GROUND_UP, model) for title, model in grown(scale).items() if title == "images"]
    recipes = tuned(scale, own.recipes, seed=seed, device=device)
    parts = {f"{name} {part}": recipes[name].between(WEIGHTS[part]) for name, part in own.parts}
    return {
        "CLIP": scale.model("clip"),
        **recipes,
        **parts,
        "Soup": Soup("Soup", tuple(recipes.values())),
        **dict(first),
    }


class Held(Bench):
    """A bench whose images are those of the validation parts."""

    def samples(self, cell: Cell) -> Samples:
        """The images of a cell; those of all roles are kept."""
        name = (cell.role, cell.scale.source, cell.n)
        if name not in self._samples:
            self._samples[name] = load_samples(cell.role, cell.scale.source, "validation", cell.n)
        return self._samples[name]


def answered(cell: Cell, bench: Held) -> dict[str, np.ndarray]:
    """Whether each validation image of a cell is right (n,), at a draw that its attacker never saw."""
    task = Classify()
    batches = task.batches(len(bench.samples(cell)), cell.scale.batch_size)
    return {"right": np.concatenate([task.answer(cell, bench, rows)["right"] for rows in batches]).astype(np.int8)}


def validated(cell: Cell, bench: Held, only_known: bool = False) -> np.ndarray | None:
    """As `answered`, from what is stored or shipped; with `only_known` None where it is not there."""
    remade = cell.scale.recompute_stale and hasattr(cell.spec, "identity")
    try:
        about = [bench.key(cell), cell.spec.provenance() if remade else {}]
    except FileNotFoundError:  # neither its pictures nor results of it are at hand
        return None
    measure, code = partial(answered, cell, bench), [answered, Held, cell.attack, cell.defense]
    found = artifact(cell.scale, "hybrids/validation", about, measure, code, only_known=only_known)
    return None if found is None else found["right"].astype(bool)


def mean(found: Right, candidate: Candidate) -> float | None:
    """Accuracy in %, with equal weight per role; None of nothing."""
    parts = [right.mean() for key, right in found.items() if key[:2] == candidate]
    return 100 * float(np.mean(parts)) if parts else None


def within_price(clean: Right, price: float) -> list[Candidate]:
    """The candidates that cost at most so many points of clean accuracy below CLIP, in table order."""
    least = mean(clean, ("CLIP", "none")) - price - 1e-9  # so that rounding excludes nobody
    return [one for one in dict.fromkeys(key[:2] for key in clean) if mean(clean, one) >= least]


def best_of(clean: Right, aware: Right, candidates: Iterable[Candidate]) -> Candidate | None:
    """The candidate that keeps most under the attacker who knows; of equals the better on clean images, or the first.

    None of nobody, or as long as one of them is not measured.
    """
    kept = {one: mean(aware, one) for one in candidates}
    if not kept or None in kept.values():
        return None
    return max(kept, key=lambda one: (kept[one], mean(clean, one)))
