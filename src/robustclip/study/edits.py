"""Edits of code that changed no answer: what was measured before them stays valid, also what no cell can confirm.

edits = edited_since("HEAD~1")               # definitions that count and are written otherwise than in that commit
confirm_edits(edits, "HEAD~1")               # cells that reach them, by the code of then and of now, on this machine

`study.confirm` compares components of cells with what is shipped. This looks at single definitions, so that artifacts
of notebooks, which are named by all the code they reach, stay as well. A definition whose cells all answer as before is
written to `assets/edits.json`, and counts from then on as what it was (`study.provenance`). It has to refer to the same
definitions as before: a new one would never be looked at again.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from robustclip.files import write_whole
from robustclip.progress import progress
from robustclip.study import provenance
from robustclip.study.cells import Cell
from robustclip.study.evaluate import evaluate
from robustclip.study.exchange import differing, sample
from robustclip.study.provenance import ROOT, Symbol, closure, counted, digest_of_parts, is_silent, neighbours, parsed
from robustclip.study.shipped import shipped_records
from robustclip.study.store import Store
from robustclip.study.then import CELLS, run_then

FEWEST = 3  # cells that have to answer as before
COLUMNS = ["definition", "cells", "answers", "flips", "confirmed", "why"]


@dataclass(frozen=True)
class Edit:
    """A definition that is written otherwise than it was."""

    symbol: Symbol
    was: tuple[str, ...]  # what counted of it
    now: tuple[str, ...]  # as it is written
    moved: bool  # whether it refers to other definitions than before

    @property
    def name(self) -> str:
        """Module and name, as provenance tells them."""
        return ":".join(self.symbol)


def edited_since(commit: str) -> list[Edit]:
    """The definitions of the package that count, exist in both, and are written otherwise than in a commit.

    Without those that are confirmed.
    """
    changed = _git("diff", "--name-only", "--diff-filter=M", commit, "--", ".").splitlines()
    known = json.loads(_git("show", f"{commit}:./assets/edits.json", missing="{}"))
    found = []
    for path in (Path(line) for line in changed if line.endswith(".py")):
        inside = path.parts[path.parts.index(ROOT.name) :]
        module = ".".join(inside).removesuffix(".py").removesuffix(".__init__")
        if is_silent(module):
            continue
        then = parsed(_git("show", f"{commit}:./{Path(*inside[1:])}"))
        now = parsed(ROOT.joinpath(*inside[1:]).read_text(encoding="utf-8"))
        for name in then.defined.keys() & now.defined.keys():
            old, new = counted(then, name), counted(now, name)
            if old != new and digest_of_parts(new) not in provenance.edits().get(f"{module}:{name}", {}):
                told = known.get(f"{module}:{name}", {}).get(digest_of_parts(old), {"was": old})
                moved = neighbours(then, module, name) != neighbours(now, module, name)
                found.append(Edit((module, name), tuple(told["was"]), new, moved))
    return sorted(found, key=lambda edit: edit.symbol)


def confirm_edits(edits: Sequence[Edit], commit: str, scale: str = "quick") -> pd.DataFrame:
    """Measure cells that reach each edit, by the code of the commit and by that of now; keep the edits without a flip.

    At least three cells of each edit, of every kind of attack that reaches it the cheapest. One row per edit.
    """
    records, reach = shipped_records(scale), {}
    for component in sorted({name for record in records for name in record["provenance"]}):
        module, _, name = component.partition(":")
        reach[component] = closure((module, name)) if module.startswith(provenance.PACKAGE) else set()
    evidence = {edit: sample([record for record in records if any(
        edit.symbol in reach[name] for name in record["provenance"])]) for edit in edits}  # fmt: skip
    picked = {record["key"]: record for own in evidence.values() for record in own}
    pairs = _answers(list(picked.values()), commit)
    rows = [_row(edit, [pairs.get(record["key"]) for record in own]) for edit, own in evidence.items()]
    found = pd.DataFrame(rows, columns=COLUMNS)
    _keep({edit: row for edit, row in zip(evidence, rows, strict=True) if row["confirmed"]}, commit, scale)
    return found


def _answers(records: Sequence[dict], commit: str) -> dict[str, tuple[dict, dict]]:
    """By key, the answers of cells by the code of a commit and by that of now, both on this machine."""
    found = {}
    with TemporaryDirectory() as folder:
        told = run_then(commit, CELLS, [record["made_by"] for record in records], str(Path(folder, "then")))
        then, store = {one["key"]: one["answers"] for one in told}, Store(Path(folder, "now"))
        for record in progress(records, "then and now", unit="cell"):
            cell = Cell.again(record["made_by"])
            row = evaluate([cell], store, "cpu", fresh=True).iloc[0]
            if (key := row["key"]) == record["key"] and key in then:
                found[key] = then[key], store.cell(cell.scale.name, key).read()["answers"]
    return found


def _row(edit: Edit, pairs: Sequence[tuple[dict, dict] | None]) -> dict:
    """What the evidence for one edit says."""
    known = [pair for pair in pairs if pair is not None]
    flips = sum(differing(*pair) if pair[0].keys() == pair[1].keys() else 1 for pair in known)
    why = ("no cell reaches it" if not pairs else
           "it refers to other definitions than before" if edit.moved else
           f"{len(known)} of {FEWEST} cells that are needed could be measured" if len(known) < FEWEST else
           "answers changed" if flips else "")  # fmt: skip
    answers = sum(len(part) for _, now in known for part in now.values())
    told = edit.name, len(known), answers, flips, not why, why
    return dict(zip(COLUMNS, told, strict=True))


def _keep(confirmed: dict[Edit, dict], commit: str, scale: str) -> None:
    """Write confirmed edits beside those that are known."""
    kept = json.loads(provenance.EDITS.read_text(encoding="utf-8")) if provenance.EDITS.is_file() else {}
    about = {"scale": scale, "since": _git("rev-parse", commit).strip(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    for edit, row in confirmed.items():
        told = about | {"cells": row["cells"], "answers": row["answers"], "was": list(edit.was)}
        kept.setdefault(edit.name, {})[digest_of_parts(edit.now)] = told
    if confirmed:
        write_whole(provenance.EDITS, json.dumps(kept, indent=1, sort_keys=True) + "\n")


def _git(*words: str, missing: str | None = None) -> str:
    """What git says in the folder of the package; `missing` where it has nothing to say."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode and missing is None:
        raise ValueError(f"git {' '.join(words)} does not work in {str(ROOT)!r}: {done.stderr.strip()}")
    return missing if done.returncode else done.stdout
