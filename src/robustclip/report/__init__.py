"""Tables and figures in one visual style: no number without its scale, its data and what its attacker knew."""

from robustclip.report.claims import answer, board, evidence, verdicts
from robustclip.report.figures import attack_strip, bars, curves, forest, image_grid, show, style
from robustclip.report.tables import comparison, counterparts, listing, settings, table

__all__ = [
    "answer", "attack_strip", "bars", "board", "comparison", "counterparts", "curves", "evidence", "forest",
    "image_grid", "listing", "settings", "show", "style", "table", "verdicts",
]  # fmt: skip
