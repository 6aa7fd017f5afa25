"""Make a course of all labs for nbgrader, and try it on two students: one knows all solutions, one changes nothing.

    python -m venv ~/nbgrader && ~/nbgrader/bin/pip install nbgrader
    python tools/try_nbgrader.py course --nbgrader ~/nbgrader/bin/nbgrader

The first student has to get all points and the second none. The kernel `python3` that nbgrader finds is told to run
this Python, which has `robustclip`.
"""

import argparse
import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from labs import about, labs, linked

KNOWS, UNTOUCHED = "knows-all", "untouched"


def solved(release: nbformat.NotebookNode, source: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """What somebody hands in who knows all solutions: a copy of the release with these in the place of the stubs."""
    made = copy.deepcopy(release)
    known = {about(cell)["grade_id"]: cell.source for cell in source.cells if about(cell).get("solution")}
    for cell in made.cells:
        if about(cell).get("solution"):
            known_here = known[about(cell)["grade_id"]]
            cell.source = re.sub(r"^ *### (BEGIN|END) SOLUTION\n?", "", known_here, flags=re.MULTILINE).rstrip()
    return made


def prepare(course: Path) -> dict[str, str]:
    """Write the course's settings, sources and kernel; the environment in which nbgrader has to run."""
    course.mkdir(parents=True)
    (course / "nbgrader_config.py").write_text(
        'c = get_config()\nc.CourseDirectory.course_id = "robust-clip"\nc.ExecutePreprocessor.timeout = 900\n'
    )
    kernel = course / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    arguments = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": arguments, "display_name": "Python 3", "language": "python"})
    )
    for path in labs():
        target = course / "source" / path.stem / path.name
        target.parent.mkdir(parents=True)
        nbformat.write(linked(nbformat.read(path, as_version=4)), target)
    return os.environ | {"JUPYTER_PATH": str(course / "jupyter")}


def hand_in(course: Path, name: str) -> None:
    """Hand in a lab for both students."""
    source = nbformat.read(course / "source" / name / f"{name}.ipynb", as_version=4)
    release = nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4)
    for student, notebook in ((UNTOUCHED, release), (KNOWS, solved(release, source))):
        folder = course / "submitted" / student / name
        folder.mkdir(parents=True)
        nbformat.write(notebook, folder / f"{name}.ipynb")


def main() -> None:
    """Make the course, grade the two students, print their marks; fail if they are not full and none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("course", type=Path, help="a folder that is not there yet")
    parser.add_argument("--nbgrader", default="nbgrader", help="the command")
    arguments = parser.parse_args()
    course, command = arguments.course.resolve(), shutil.which(arguments.nbgrader)
    if not command:
        sys.exit(f"error: no command {arguments.nbgrader!r}; install nbgrader, or say with --nbgrader where it is")
    if course.exists():
        sys.exit(f"error: {arguments.course} is there already; give a new folder")
    environment = prepare(course)
    environment["PATH"] = os.pathsep.join(
        [str(Path(command).absolute().parent), environment["PATH"]]
    )  # it calls alembic

    def call(*words: str) -> None:
        print("nbgrader", *words, flush=True)
        subprocess.run([command, *words], cwd=course, env=environment, check=True)

    for path in labs():
        call("generate_assignment", path.stem)
        hand_in(course, path.stem)
        call("autograde", path.stem)
    call("export")
    with (course / "grades.csv").open(newline="", encoding="utf8") as file:
        rows = [(row["student_id"], row["assignment"], row["score"], row["max_score"]) for row in csv.DictReader(file)]
    for student, name, score, most in sorted(rows):
        print(f"{float(score):4.0f} of {float(most):2.0f}  {student:10} {name}")
    wrong = [row for row in rows if float(row[2]) != (float(row[3]) if row[0] == KNOWS else 0)]
    if wrong or len(rows) != 2 * len(labs()):
        sys.exit(f"error: marks are not full and none: {wrong or rows}")


if __name__ == "__main__":
    main()
