"""Store notebooks clean: no outputs, no counters, the kernel `python3`, so that a change shows what was written.

`--check` changes nothing and fails if a notebook is not clean.
"""

import argparse
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("tags", "mystnb")  # of a cell's metadata; "mystnb" holds captions and alternative texts
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


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
