"""Labs for students and for instructors, from one source: `make labs`.

The notebooks below `book/coursework` are the instructor's: they hold solutions and hidden checks between the markers of
nbgrader, and its metadata. `_build/labs/instructor` gets them as they are, `_build/labs/student` without either. Links
to the book lead to where it is published. `--grade` runs what somebody handed in, with the locked cells of the source
put back as nbgrader's autograding does, and prints the points:

    python tools/labs.py --grade handed-in/attack.ipynb

It runs whatever stands there: grade where that may do no harm.
"""

import argparse
import copy
import re
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "book" / "coursework"
STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")  # nbgrader's own
SOLUTION = re.compile(r"^([ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION$", re.DOTALL | re.MULTILINE)
HIDDEN = re.compile(r"\n?^[ \t]*### BEGIN HIDDEN TESTS\n.*?^[ \t]*### END HIDDEN TESTS$", re.DOTALL | re.MULTILINE)
CELL_TIMEOUT = 600  # seconds; a cell that takes longer hangs


def labs() -> list[Path]:
    """The source of each lab."""
    return sorted(path for path in SOURCE.glob("*.ipynb") if is_lab(nbformat.read(path, as_version=4)))


def about(cell: NotebookNode) -> dict:
    """What nbgrader knows of a cell; nothing for most."""
    return cell.metadata.get("nbgrader", {})


def is_lab(notebook: NotebookNode) -> bool:
    """Whether a notebook has cells that are graded."""
    return any(about(cell).get("grade") for cell in notebook.cells)


def handed_out(notebook: NotebookNode) -> NotebookNode:
    """A copy without solutions, in whose place stubs stand, and without hidden checks."""
    made = copy.deepcopy(notebook)
    for cell in made.cells:
        if about(cell).get("solution"):
            cell.source = SOLUTION.sub(lambda found: "\n".join(found[1] + line for line in STUB), cell.source)
        if about(cell).get("grade"):
            cell.source = HIDDEN.sub("", cell.source)
    return made


def linked(notebook: NotebookNode) -> NotebookNode:
    """A copy whose links to pages of the book lead to where it is published."""
    made = copy.deepcopy(notebook)
    address = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))["html"]["baseurl"]

    def published(found: re.Match) -> str:
        page = (SOURCE / found[1]).resolve().relative_to(ROOT).with_suffix(".html").as_posix()
        return f"]({address}/{page})"

    for cell in made.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(((?:\.\./|[\w-]+\.)[^)]*?(?:ipynb|md))\)", published, cell.source)
    return made


def put_back(submission: NotebookNode, source: NotebookNode) -> NotebookNode:
    """A copy of what was handed in, with the locked cells as they are in the source, hidden checks included."""
    made = copy.deepcopy(submission)
    locked = {about(cell)["grade_id"]: cell.source for cell in source.cells if about(cell).get("locked")}
    found = {about(cell).get("grade_id") for cell in made.cells}
    if missing := sorted(locked.keys() - found):
        raise ValueError(f"cells {', '.join(missing)} of the lab are missing; put them back")
    for cell in made.cells:
        if about(cell).get("grade_id") in locked:
            cell.source = locked[about(cell)["grade_id"]]
    return made


def in_a_kernel(notebook: NotebookNode) -> list[str | None]:
    """Run all cells in a kernel of their own; for each cell what went wrong, in a line, if anything did."""
    ran = copy.deepcopy(notebook)
    NotebookClient(ran, timeout=CELL_TIMEOUT, allow_errors=True, kernel_name="python3").execute()
    told = []
    for cell in ran.cells:
        errors = [output for output in cell.get("outputs", []) if output.output_type == "error"]
        told.append(f"{errors[0].ename}: {errors[0].evalue}".splitlines()[0] if errors else None)
    return told


def graded(
    submission: NotebookNode, source: NotebookNode, run: Callable[[NotebookNode], list[str | None]] = in_a_kernel
) -> dict[str, tuple[int, int, str | None]]:
    """For each check the points given, the points there are, and what went wrong."""
    whole = put_back(submission, source)
    marks = {}
    for cell, wrong in zip(whole.cells, run(whole), strict=True):
        if about(cell).get("grade"):
            most = about(cell)["points"]
            marks[about(cell)["grade_id"]] = (0 if wrong else most, most, wrong)
    return marks


def write(out: Path) -> None:
    """Write both versions of all labs."""
    for path in labs():
        source = linked(nbformat.read(path, as_version=4))
        for version, notebook in (("student", handed_out(source)), ("instructor", source)):
            target = out / version / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, target)
        points = sum(about(cell).get("points", 0) for cell in source.cells)
        print(f"{points:3} points  {path.stem}")


def main() -> None:
    """Write the labs, or grade what was handed in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "labs", help="where the labs go")
    parser.add_argument("--grade", type=Path, metavar="NOTEBOOK", help="grade this one; it is named as the lab is")
    arguments = parser.parse_args()
    if not arguments.grade:
        write(arguments.out)
        return
    source = SOURCE / arguments.grade.name
    if source not in labs():
        sys.exit(
            f"error: no lab {arguments.grade.name!r}; name it as one of: {', '.join(path.name for path in labs())}"
        )
    marks = graded(*(nbformat.read(path, as_version=4) for path in (arguments.grade, source)))
    for name, (given, most, wrong) in marks.items():
        print(f"{given:3} of {most:2}  {name}{f': {wrong}' if wrong else ''}")
    print(f"{sum(given for given, *_ in marks.values()):3} of {sum(most for _, most, _ in marks.values()):2}")


if __name__ == "__main__":
    main()
