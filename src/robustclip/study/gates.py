"""Gates: numbers that papers print and that a run has to meet before hours are spent on what rests on them.

    list(hold(cells))    # of a run at scale paper: measures its gates first; a ValueError, one line, if one fails

A gate fails if the printed number lies outside the interval of the measured one by more than the tolerance. The
interval is at a level at which all gates together fail by chance in 5 of 100 runs at most. What is printed is read from
`assets/reported`. Tolerances: half a point for the protocol that TTC, COLA, SCC and DOC share, two points for FARE.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from robustclip.data.roles import role
from robustclip.study.cells import Cell, grid
from robustclip.study.evaluate import evaluate, outcomes
from robustclip.study.reported import reported
from robustclip.study.scales import Scale
from robustclip.study.statistics import Estimate, wilson
from robustclip.study.store import Where

SHARED = ("cifar10", "cifar100", "stl10", "imagenet", "caltech101", "caltech256", "pets", "flowers102", "aircraft",
          "cars", "sun397", "food101", "eurosat", "dtd", "pcam", "country211")  # fmt: skip
# In FARE's Table 10 the sets of the mean are those of CLIP_benchmark, with ensembles of prompts.
ENSEMBLES = "the printed numbers are of ensembles of prompts, a cell has one prompt per class"
WIDEST = 10.0  # points on either side; a wider interval decides nothing
CAUSES = (
    "resolution (short side 256, middle 224), prompts, class names, weights or their activation (QuickGELU), half "
    "precision, normalisation outside of the model"
)


@dataclass(frozen=True)
class Gate:
    """One printed number, and what has to be measured to meet it."""

    roles: tuple[str, ...]
    defense: str
    attack: str
    paper: str
    table: str
    method: str
    datasets: tuple[str, ...]  # as `reported` calls them, a mean for instance; of several the mean is taken
    tolerance: float  # points
    model: str = "ViT-B-32/openai"
    eps: str = "1/255"
    setting: str = "backbone=ViT-B/32"  # how the setting of the printed row begins
    lacks: str = ""  # why no cell is in the setting

    @property
    def name(self) -> str:
        """Whose number it is: "CLIP on ImageNet, clean"."""
        where = f"over {len(self.roles)} sets" if len(self.roles) > 1 else f"on {self.datasets[0]}"
        return f"{self.method} {where}, {self.attack if self.attack == 'clean' else f'{self.attack} at {self.eps}'}"

    @property
    def printed(self) -> float:
        """What the paper prints."""
        rows, attacked = reported(self.paper, self.table), self.attack != "clean"
        same = (rows["method"] == self.method) & rows["dataset"].isin(self.datasets) & (rows["metric"] == "accuracy")
        same &= rows["setting"].str.startswith(self.setting)
        same &= (rows["attack"] != "clean") & (rows["eps"] == self.eps) if attacked else rows["attack"] == "clean"
        if same.sum() != len(self.datasets):
            raise ValueError(f"{same.sum()} printed numbers for the gate {self.name!r}, not {len(self.datasets)}")
        return float(rows["value"][same].mean())

    def unfit(self, scale: Scale) -> str:
        """Why the scale has no cells in the setting of the printed number; "" if it has."""
        if scale.world != "paper" or not set(self.roles) <= set(scale.roles):
            return "the scale lacks sets"
        small = [name for name in self.roles if role(name).paper.get("pixels", 224) != 224]
        told = [name for name in self.roles if "prompts" in role(name).paper]
        reasons = [self.lacks] if self.lacks else []
        reasons += [f"the printed numbers are of 224 pixels, {', '.join(small)} have fewer here"] if small else []
        reasons += [f"{', '.join(told)} has other prompts here"] if told else []
        return "; ".join(reasons)

    def cells(self, scale: Scale, n: int | None = None) -> list[Cell]:
        """A cell per role, in the setting of the printed number: prompts of the shared protocol, this attack."""
        found = []
        for name in self.roles:
            template = role(name).paper.get("templates", {}).get("ttc")
            attacks = {self.attack: scale.attack(self.attack, self.eps)}
            defenses = {self.defense: scale.defense(self.defense)}
            found += grid(scale, {self.model: self.model}, [name], attacks, defenses, n=n, template=template,
                          precision="float32")  # fmt: skip
        return found


def _shared() -> list[Gate]:
    """The shared protocol: undefended before defended, clean before attacked, single sets before their mean."""
    own = ("imagenet", "pets", "caltech256", "flowers102", "food101")
    titles = tuple(role(name).title for name in own)
    sets = [*(((name,), (title,)) for name, title in zip(own, titles, strict=True)), (own, titles)]
    sets.append((SHARED, ("avg16",)))
    return [
        Gate(roles, defense, attack, "SCC", "1", method, datasets, 0.5)
        for (defense, method), attack, (roles, datasets) in product(
            (("none", "CLIP"), ("RN", "RN"), ("TTC", "TTC")), ("clean", "PGD-10:last"), sets
        )
    ]


def _fare() -> list[Gate]:
    """FARE-C3: CLIP and the released FARE on ImageNet, clean and at 1/255."""
    trained = {"CLIP": "backbone=ViT-B/32; train=none", "FARE": "backbone=ViT-B/32; train=ImageNet"}
    return [
        Gate(("imagenet",), "none", attack, "FARE", "10", method, ("ImageNet",), 2.0, setting=setting, lacks=ENSEMBLES,
             model="ViT-B-32/openai" if method == "CLIP" else "fare1-b32")
        for (method, setting), attack in product(trained.items(), ("clean", "APGD-T"))
    ]  # fmt: skip


GATES = (*_shared(), *_fare())


@dataclass(frozen=True)
class Finding:
    """What became of a gate: "holds", "fails", or "open" with the reason why it says nothing yet."""

    gate: Gate
    verdict: str
    measured: Estimate | None = None
    n: int = 0
    reason: str = ""

    def __str__(self) -> str:
        if self.verdict == "open":
            return f"gate {self.gate.name!r} is open: {self.reason}"
        found, gate = self.measured, self.gate
        return (
            f"gate {gate.name!r} {self.verdict}: printed {gate.printed:.4g} ({gate.paper}, table {gate.table}), "
            f"measured {found.value:.2f} on n={self.n} ({found.low:.2f} to {found.high:.2f}), tolerance "
            f"{gate.tolerance:g} points"
        )


def check(gate: Gate, hits: Sequence[np.ndarray]) -> Finding:
    """Compare right and wrong per image, an array for each role of the gate, with the printed number."""
    if len(hits) < len(gate.roles):
        return Finding(gate, "open", reason=f"{len(hits)} of {len(gate.roles)} cells are known")
    found, n = _mean(hits), sum(map(len, hits))
    if (half := (found.high - found.low) / 2) > WIDEST:
        return Finding(gate, "open", found, n, f"n={n} tells the number to {half:.0f} points only; take more images")
    near = found.low - gate.tolerance <= gate.printed <= found.high + gate.tolerance
    return Finding(gate, "holds" if near else "fails", found, n)


def _mean(hits: Sequence[np.ndarray]) -> Estimate:
    """Mean over roles, with the Wilson intervals of the roles joined as independent ones are."""
    parts = np.array([wilson(int(np.sum(one)), len(one), 1 - 0.05 / len(GATES)) for one in hits])
    value, (down, up) = float(parts[:, 0].mean()), np.sqrt(((parts[:, 1:] - parts[:, :1]) ** 2).sum(0)) / len(parts)
    return Estimate(value, value - float(down), value + float(up))


def asked(cells: Iterable[Cell]) -> list[tuple[Gate, list[Cell]]]:
    """The gates before a run, with their cells: of its models, its sets, and what it defends."""
    cells = [cell for cell in cells if cell.task == "classify" and cell.scale.world == "paper"]
    if not cells:
        return []
    images = {cell.role: cell.n for cell in cells}
    models = {cell.spec for cell in cells if isinstance(cell.spec, str)}
    defended = any(cell.defense for cell in cells)
    found = [gate for gate in GATES if gate.model in models and set(gate.roles) <= set(images)]
    found = [gate for gate in found if gate.defense == "none" or defended]
    return [(gate, gate.cells(cells[0].scale, images[gate.roles[0]])) for gate in found]


def hold(
    cells: Iterable[Cell], store: Where = None, device: str = "auto", batch_size: int | None = None
) -> Iterator[Finding]:
    """Measure the gates before a run, one after the other; the first that fails is a ValueError in one line."""
    for gate, own in asked(cells):
        reason = gate.unfit(own[0].scale)
        one = Finding(gate, "open", reason=reason) if reason else measured(gate, own, store, device, batch_size)
        if one.verdict == "fails":
            raise ValueError(f"{one}; usual causes: {CAUSES}; --no-gates goes on anyway")
        yield one


def measured(
    gate: Gate, cells: Sequence[Cell], store: Where = None, device: str = "auto", batch_size: int | None = None
) -> Finding:
    """What becomes of a gate by its cells, which are measured where they are not known."""
    rows = evaluate(cells, store, device, batch_size).to_dict("records")
    return check(gate, [outcomes(one, store) for one in rows])


def playable(scale: Scale, roles: Sequence[str] | None = None) -> list[Gate]:
    """The gates of which the scale has cells, on these roles or all of its own."""
    own = set(scale.roles if roles is None else roles)
    return [gate for gate in GATES if set(gate.roles) <= own and not gate.unfit(scale)]


def roles(scale: Scale) -> list[str]:
    """The sets that gates of the scale are on."""
    return list(dict.fromkeys(name for gate in playable(scale) for name in gate.roles))


def row(found: Finding) -> dict:
    """A finding as a row of a table."""
    gate, measured = found.gate, found.measured or Estimate(*[float("nan")] * 3)
    return {
        "gate": gate.name, "printed": gate.printed, "measured": measured.value, "low": measured.low,
        "high": measured.high, "n": found.n, "tolerance": gate.tolerance, "verdict": found.verdict,
        "reason": found.reason,
    }  # fmt: skip
