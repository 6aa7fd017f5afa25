"""Tables and figures in one visual style: no number without its scale, its data and what its attacker knew."""

from robustclip.report.figures import attack_strip, bars, curves, image_grid, show, style
from robustclip.report.tables import comparison, table, verdicts

__all__ = ["attack_strip", "bars", "comparison", "curves", "image_grid", "show", "style", "table", "verdicts"]
