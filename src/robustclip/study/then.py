"""What the code of earlier commits gives on this machine: processors round in their own ways, and flips may be theirs.

The package is taken out of the history of the checkout that it is in, and runs in a process of its own. What its code
was is checked by the provenance that it tells, so that a commit that is not the right one proves nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from robustclip.study.provenance import ROOT
from robustclip.study.store import Store

CELLS = """
import json, sys
from robustclip.study.cells import Cell
from robustclip.study.evaluate import evaluate
from robustclip.study.store import Store
for made in json.load(sys.stdin):
    row = evaluate([Cell.again(made)], sys.argv[1], "cpu", fresh=True).iloc[0]
    print(json.dumps(Store(sys.argv[1]).cell(row["scale"], row["key"]).read()))
"""
LOSSES = """
import json, sys
from robustclip.study.cells import Cell
from robustclip.training.loop import train
made, count = json.load(sys.stdin)
tuned = Cell.again(made).spec
run = train(tuned.recipe, *tuned.ingredients(), first=count)
print(json.dumps({"losses": run.losses, "provenance": tuned.provenance()}))
"""


def answers_then(records: Iterable[dict], store: Store) -> dict[str, dict]:
    """By key, the answers of cells by the code that measured them; none for code that cannot be had any more."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["commit"], []).append(record)
    found = {}
    for first, group in groups.items():
        wanted = {record["key"]: record["provenance"] for record in group}
        for commit in _candidates(first):
            due = [record["made_by"] for record in group if record["key"] not in found]
            again = run_then(commit, CELLS, due, str(store.root / commit)) if due else []
            found |= {one["key"]: one["answers"] for one in again if wanted.get(one["key"]) == one["provenance"]}
    return found


def losses_then(made_by: dict, facts: dict, updates: int) -> list[float] | None:
    """The first losses of the training of a cell's model by the code that trained it; None if that cannot be had."""
    for commit in _candidates(facts["commit"]):
        for told in run_then(commit, LOSSES, [made_by, updates]):
            if told["provenance"] == facts["provenance"]:
                return told["losses"]
    return None


def run_then(commit: str, script: str, told: Any, *arguments: str) -> list:
    """What a script prints, line by line, that runs on the package as it was; nothing if it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        there, ask = {"PYTHONPATH": str(Path(folder) / "src")}, {"check": True, "stdout": subprocess.PIPE}
        try:
            packed = subprocess.run(["git", "-C", str(ROOT.parents[1]), "archive", commit, "src"], **ask).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=packed, **ask)
            command = [sys.executable, "-c", script, *arguments]
            found = subprocess.run(command, input=json.dumps(told).encode(), env=os.environ | there, **ask).stdout
        except (OSError, subprocess.CalledProcessError):
            return []
    return [json.loads(line) for line in found.splitlines()]


def _candidates(commit: str) -> Iterator[str]:
    """The commit, and the next one that changed the package: what was measured before it was committed is there."""
    yield commit
    command = ["git", "-C", str(ROOT), "rev-list", "--reverse", f"{commit}..HEAD", "--", "."]
    try:
        yield from subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[:1]
    except (OSError, subprocess.CalledProcessError):
        return
