"""Tables and figures in one visual style: no number without its scale, its data and what its attacker knew."""

from robustclip.report.claims import answer, evidence, verdicts
from robustclip.report.figures import attack_strip, bars, curves, forest, image_grid, show, stacked, style
from robustclip.report.leaderboard import drops, leaderboard
from robustclip.report.ledger import ledger, tally
from robustclip.report.tables import comparison, counterparts, downloads, listing, settings, table

__all__ = [
    "answer", "attack_strip", "bars", "comparison", "counterparts", "curves", "downloads", "drops",
    "evidence", "forest", "image_grid", "leaderboard", "ledger", "listing", "settings", "show", "stacked", "style",
    "table", "tally", "verdicts",
]  # fmt: skip
