"""What stands beside a run of a page: the same cells at the scales of evidence, as far as they are known."""

from collections.abc import Callable, Iterable, Mapping

import pandas as pd

from robustclip.study.cells import Cell
from robustclip.study.evaluate import SAME, look_up
from robustclip.study.scales import EVIDENCE, Scale
from robustclip.study.scales import scale as find_scale
from robustclip.study.store import Where

CellsOf = Callable[[Scale], Iterable[Cell]]  # the cells of a page at any scale
NAMED_BY = [*(name for name in SAME if name not in ("scale", "metric", "n")), "seed"]  # a set may have fewer than n


def beside(scale: Scale, cells_of: CellsOf, store: Where = None, device: str = "auto") -> dict[str, pd.DataFrame]:
    """The rows of `look_up` at the scales of evidence other than the page's own, by their names.

    `cells_of` names the page's own models, so that nothing stands there of another page's models of the same names.
    """
    others = [find_scale(name) for name in EVIDENCE if name != scale.name]
    return {other.name: look_up(_cells(cells_of, other), store, device) for other in others}


def above(scale: Scale, known: Mapping[str, pd.DataFrame], cells_of: CellsOf) -> dict[str, pd.DataFrame]:
    """Of what `beside` found, the scale whose numbers a page speaks of and draws; {} if those are the run's own.

    It is the weightiest one of which every cell is known.
    """
    for name in EVIDENCE[: EVIDENCE.index(scale.name) if scale.name in EVIDENCE else None]:
        asked = {tuple(cell.describe()[part] for part in NAMED_BY) for cell in _cells(cells_of, find_scale(name))}
        if asked and asked == set(known[name][NAMED_BY].itertuples(index=False, name=None)):
            return {name: known[name]}
    return {}


def _cells(cells_of: CellsOf, scale: Scale) -> list[Cell]:
    """The cells of a page at a scale; none if it needs to know of data that is neither here nor shipped."""
    try:
        return list(cells_of(scale))
    except FileNotFoundError:
        return []
