"""Say beforehand what the pages of the book would cost at a scale: hours of attacks and of training, gigabytes of data.

    python tools/plan_pages.py --scale paper                    all pages that have a grid of cells, summed by chapter
    python tools/plan_pages.py --scale paper --chapter mmcoa

No notebook is run and nothing is measured, trained or fetched. Of a page's code only its functions from a scale to
cells, `def cells_of(there: study.Scale) -> list[study.Cell]`, and the constants and functions that these name are
evaluated. A page whose cells depend on what it measures says so. Cells that pages share count for each page, and once
in the last line. What a page computes besides its cells is not in it.
"""

import argparse
import ast
import dis
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pandas as pd

from robustclip import study
from robustclip.checks import check_choice
from robustclip.data.roles import role
from robustclip.study import Cell

BOOK = Path(__file__).resolve().parent.parent / "book"
MEASURES = {"evaluate", "look_up", "artifact", "beside", "load", "load_samples", "reference", "judged", "outcomes"}
GIVES, USES, READS = {"STORE_NAME"}, {"LOAD_NAME", "LOAD_GLOBAL"}, {"LOAD_ATTR", "LOAD_METHOD"}
CELLS = "list[study.Cell]"


@dataclass(frozen=True)
class Statement:
    """A statement at the top of a page: the names that it gives a value, those it uses, and the attributes it reads."""

    tree: ast.stmt
    gives: frozenset[str]
    uses: frozenset[str]
    reads: frozenset[str]


def grids(path: Path, scale: str) -> list[Cell]:
    """The cells of a page at a scale, each once; a ValueError if they depend on what the page measures."""
    statements = list(_statements(path))
    makers = [one.tree.name for one in statements if isinstance(one.tree, ast.FunctionDef) and _makes_cells(one.tree)]
    if not makers and any("evaluate" in one.reads for one in statements):
        raise ValueError(f"it has no function from a scale to {CELLS}")
    wanted, names = _needed(statements, makers), {"scale": scale}
    for one in wanted:
        if measured := MEASURES & (one.uses | one.reads):
            raise ValueError(f"its cells depend on what {min(measured)} finds")
    exec(compile(ast.Module([one.tree for one in wanted], []), str(path), "exec"), names)
    there, found = study.scale(scale), {}
    for name in makers:
        found |= {_key(cell): cell for cell in names[name](there)}
    return list(found.values())


def _key(cell: Cell) -> str:
    """What tells a cell from others."""
    return json.dumps([cell.describe(), cell.template])


def _statements(path: Path) -> Iterator[Statement]:
    """The statements of all code cells, but for what gives the scale."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and "install" not in cell["metadata"].get("tags", ()):
            for one in ast.parse("".join(cell["source"])).body:
                steps = list(_steps(compile(ast.Module([one], []), str(path), "exec")))
                names = [frozenset(name for kind, name in steps if kind in kinds) for kinds in (GIVES, USES, READS)]
                if "scale" not in names[0]:
                    yield Statement(one, *names)


def _steps(code: CodeType) -> Iterator[tuple[str, str]]:
    """What code does with names, functions in it included."""
    yield from ((step.opname, step.argval) for step in dis.get_instructions(code))
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from ((kind, name) for kind, name in _steps(inner) if kind != "STORE_NAME")


def _needed(statements: Sequence[Statement], names: Sequence[str]) -> list[Statement]:
    """The statements that give these names a value, and all names that those use in turn, in their order."""
    found, queue = set(), set(names)
    while queue:
        new = {place for place, one in enumerate(statements) if place not in found and one.gives & queue}
        queue = set().union(*(statements[place].uses for place in new))
        found |= new
    return [statements[place] for place in sorted(found)]


def _makes_cells(function: ast.FunctionDef) -> bool:
    """Whether a function takes a scale, and nothing else that has to be given, and returns cells."""
    given = function.args
    free = len(given.args) - len(given.defaults)
    typed = [ast.unparse(one.annotation) for one in given.args[:1] if one.annotation]
    return free == 1 and typed == ["study.Scale"] and bool(function.returns) and ast.unparse(function.returns) == CELLS


# --- what they cost ---------------------------------------------------------------------------------------------------


def costs(cells: Sequence[Cell], device: str = "cpu") -> dict:
    """Hours of attacks and answers, of training, and gigabytes of data sets, of some cells."""
    frame, models, seconds = study.plan(cells, device=device), {}, 0.0
    for cell in cells:
        for model in getattr(cell.spec, "members", [cell.spec]):
            if hasattr(model, "recipe"):
                models[json.dumps([model.name, repr(model.recipe), model.stages])] = (model, cell.scale)
    for model, scale in models.values():
        whole = model.pictures or role(model.role).paper.get("train_images", 0)
        pictures = model.recipe.shots * len(role(model.role).classes) if model.recipe.shots else whole
        updates = model.recipe.optimisation.updates_on(pictures)
        passes = updates * model.recipe.optimisation.batch_size * sum(model.recipe.passes())
        seconds += passes / (scale.assumed_speed or float("nan"))
    return {
        "cells": len(cells), "image passes": int(frame[["forward", "backward"]].sum().sum()),
        "hours": frame["seconds"].sum() / 3600, "trainings": len(models), "hours of training": seconds / 3600,
        "GB of data": frame["megabytes"].sum() / 1e3, "sets of unknown size": int(frame["megabytes"].isna().sum()),
    }  # fmt: skip


def pages(chapter: str | None = None) -> dict[str, Path]:
    """The notebooks of the book by the names of their pages, or those of one chapter."""
    found = {path.relative_to(BOOK).with_suffix("").as_posix(): path for path in sorted(BOOK.rglob("*.ipynb"))}
    chapters = sorted({name.rpartition("/")[0] for name in found if "/" in name})
    if chapter is not None:
        check_choice("chapter", chapter, chapters)
    return {name: path for name, path in found.items() if chapter in (None, name.rpartition("/")[0])}


def table(scale: str, chapter: str | None = None) -> tuple[pd.DataFrame, dict[str, str]]:
    """One row per page that has cells, and one for all; and why the others have none."""
    rows, every, left, scale = [], {}, {}, study.scale(scale).place
    for name, path in pages(chapter).items():
        try:
            cells = grids(path, scale)
        except Exception as error:
            left[name] = " ".join(f"{error}".split())[:150]
            continue
        if cells:
            rows.append({"page": name} | costs(cells))
            every |= {_key(cell): cell for cell in cells}
    if every:
        rows.append({"page": "all, shared cells once"} | costs(list(every.values())))
    return pd.DataFrame(rows), left


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="paper", help="quick, full, photo, paper, or a .toml file")
    parser.add_argument("--chapter", help="a folder of the book, such as mmcoa or survey/testtime")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    chosen = parser.parse_args(arguments)
    try:
        frame, left = table(chosen.scale, chosen.chapter)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(frame.to_json(orient="records", indent=1))
    else:
        print(frame.to_string(index=False, float_format="{:,.1f}".format))
    for name, why in left.items():
        print(f"not planned: {name}: {why}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
