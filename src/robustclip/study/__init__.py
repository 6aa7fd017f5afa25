"""The study engine: cells, the grid that makes them, the store that keeps them, and the numbers papers print."""

from robustclip.study.averages import averages
from robustclip.study.beside import above, beside
from robustclip.study.cells import Cell, grid
from robustclip.study.claims import (
    Claim,
    Condition,
    Judgement,
    Verdict,
    judge,
    keep_verdicts,
    kept_verdicts,
    room,
    shipped_verdicts,
    verdict_table,
    verdicts_by_scale,
)
from robustclip.study.edits import confirm_edits, edited_since
from robustclip.study.evaluate import audit_cell, evaluate, is_stale, judged, look_up, outcomes, over_seeds, reference
from robustclip.study.exchange import artifact, confirm, export, reproduce
from robustclip.study.ledger import ledger
from robustclip.study.planning import plan
from robustclip.study.provenance import digests, versions
from robustclip.study.reported import named, reported, reported_papers
from robustclip.study.scales import EVIDENCE, Scale, main_source, parse_eps, scale, scale_names, training_seeds
from robustclip.study.shipped import facts_of, shipped_folder, shipped_records
from robustclip.study.statistics import (
    Estimate,
    hierarchical,
    macro,
    mcnemar,
    mean_interval,
    paired_difference,
    wilson,
)
from robustclip.study.store import Store
from robustclip.study.trained import (
    Soup,
    Tuned,
    fine_tuned,
    model_name,
    plan_training,
    played_shots,
    training_facts,
    tuned_by_shots,
)

__all__ = [
    "EVIDENCE", "Cell", "Claim", "Condition", "Estimate", "Judgement", "Scale", "Soup", "Store", "Tuned", "Verdict",
    "above", "artifact", "audit_cell", "averages", "beside", "confirm", "confirm_edits", "digests", "edited_since",
    "evaluate", "export", "facts_of", "fine_tuned", "grid", "hierarchical", "is_stale", "judge", "judged",
    "keep_verdicts", "kept_verdicts", "ledger", "look_up", "macro", "main_source", "mcnemar", "mean_interval",
    "model_name", "named", "outcomes", "over_seeds", "paired_difference", "parse_eps", "plan", "plan_training",
    "played_shots", "reference", "reported", "reported_papers", "reproduce", "room", "scale", "scale_names",
    "shipped_folder", "shipped_records", "shipped_verdicts", "training_facts", "training_seeds", "tuned_by_shots",
    "verdict_table", "verdicts_by_scale", "versions", "wilson",
]  # fmt: skip
