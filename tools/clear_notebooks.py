"""Store notebooks clean: no outputs, no counters, the kernel `python3`, so that a change shows what was written.

Two cells that readers of the book do not see are written here for all notebooks: `install` before the first code, which
acts on Colab only, and `check` after the parameters, which ends a page that was given wrong ones. `--check` changes
nothing and fails if a notebook is not clean.
"""

import argparse
import ast
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("tags", "mystnb", "nbgrader")  # of a cell's metadata: captions and alternative texts; what grades a lab
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDTH = 88  # columns of code on a page
INSTALL = """\
# On Colab, install the package that this page imports; elsewhere this cell does nothing.
import sys

if "google.colab" in sys.modules:
    address = "ADDRESS"
    get_ipython().run_line_magic("pip", f"install -q git+{address}")"""


def install_cell() -> nbformat.NotebookNode:
    """The cell that makes a page run on Colab, from the address of the repository in the book's settings."""
    address = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))["repository"]["url"]
    tags = {"tags": ["install", "remove-cell"]}
    return nbformat.v4.new_code_cell(INSTALL.replace("ADDRESS", address), id="install", metadata=tags)


def check_cell(parameters: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The cell that checks what the cell `parameters` declares."""
    names = [node.target.id for node in ast.parse(parameters.source).body if isinstance(node, ast.AnnAssign)]
    call = f"parameters.check({', '.join(f'{name}={name}' for name in names)})"
    if len(call) > WIDTH:
        call = "\n".join(["parameters.check(", *(f"    {name}={name}," for name in names), ")"])
    source = f"from robustclip import parameters\n\n{call}"
    return nbformat.v4.new_code_cell(source, id="check", metadata={"tags": ["remove-cell"]})


def with_standard_cells(cells: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The cells of a notebook with the two that all notebooks share, anew."""
    found = []
    for cell in cells:
        if cell.get("id") in {"install", "check"}:
            continue
        if cell.cell_type == "code" and not any(other.cell_type == "code" for other in found):
            found.append(install_cell())
        found.append(cell)
        if "parameters" in cell.metadata.get("tags", []):
            found.append(check_cell(cell))
    return found


def clean(text: str) -> str:
    """The notebook `text` without anything that running it leaves behind."""
    notebook = nbformat.reads(text, as_version=4)
    notebook.nbformat_minor = 5
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{number}" if not cell.get("id") else cell.id
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in KEPT if cell.metadata.get(key)})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.cells = with_standard_cells(notebook.cells)
    nbformat.validate(notebook)
    return nbformat.writes(notebook, indent=1) + "\n"


def main() -> None:
    """Clean every notebook of the book, or say which ones are not clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a notebook is not clean")
    check = parser.parse_args().check
    dirty = []
    for path in sorted((ROOT / "book").rglob("*.ipynb")):
        text = path.read_text(encoding="utf8")
        if clean(text) != text:
            dirty.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(clean(text), encoding="utf8")
    if dirty and check:
        sys.exit(f"not clean, run `make format`: {', '.join(dirty)}")


if __name__ == "__main__":
    main()
