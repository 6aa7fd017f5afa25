"""Tables and figures in one visual style: no number without its scale, its data and what its attacker knew."""

from robustclip.report.claims import answer, board, verdicts
from robustclip.report.figures import attack_strip, bars, curves, forest, image_grid, show, stacked, style
from robustclip.report.leaderboard import leaderboard
from robustclip.report.ledger import ledger, tally
from robustclip.report.tables import comparison, counterparts, downloads, listing, table

__all__ = [
    "answer", "attack_strip", "bars", "board", "comparison", "counterparts", "curves", "downloads", "forest",
    "image_grid", "leaderboard", "ledger", "listing", "show", "stacked", "style", "table", "tally", "verdicts",
]  # fmt: skip
