"""The chapters without solutions, and the labs as students get them: `make student`.

`_build/student` gets the sources of the book but for whatever stands in a `{solution}`, or between `{solution-start}`
and `{solution-end}`. The same of a book that has run, which Jupyter Book can render:

    python tools/student.py --source _build/executed && jupyter-book build _build/student
"""

import argparse
import copy
import re
import shutil
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from labs import handed_out

ROOT = Path(__file__).resolve().parent.parent
SOLUTION = re.compile(r"^(`{3,}|:{3,})\{solution\}.*?^\1[ \t]*$\n*", re.DOTALL | re.MULTILINE)
START, END = (re.compile(rf"^`{{3,}}\{{solution-{word}\}}", re.MULTILINE) for word in ("start", "end"))


def without_solutions(notebook: NotebookNode) -> NotebookNode:
    """A copy of a notebook without what solves its exercises; of a lab what is handed out."""
    made = handed_out(copy.deepcopy(notebook))
    kept, inside = [], False
    for cell in made.cells:
        prose = cell.cell_type == "markdown"
        if prose and START.search(cell.source):
            inside = True
        if not inside:
            cell.source = SOLUTION.sub("", cell.source).rstrip() if prose else cell.source
            kept.append(cell)
        if prose and END.search(cell.source):
            inside = False
    if inside:
        raise ValueError("a {solution-start} has no {solution-end}; add one in a cell below it")
    made.cells = kept
    return made


def write(out: Path, source: Path = ROOT) -> int:
    """Write the book without solutions to an empty folder; how many notebooks there are."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(source / "book", out / "book", ignore=shutil.ignore_patterns(".*"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copyfile(source / name, out / name)
    notebooks = sorted((out / "book").rglob("*.ipynb"))
    for path in notebooks:
        nbformat.write(without_solutions(nbformat.read(path, as_version=4)), path)
    return len(notebooks)


def main() -> None:
    """Write the student's book."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "student", help="where it goes; emptied first")
    parser.add_argument(
        "--source", type=Path, default=ROOT, help="where the book is: the repository, or an executed copy"
    )
    arguments = parser.parse_args()
    count = write(arguments.out, arguments.source)
    print(f"{count} notebooks without solutions below {arguments.out}")


if __name__ == "__main__":
    main()
