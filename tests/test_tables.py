"""The tables of the book as PDF."""

import re
import runpy
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from robustclip import report

tables = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "tables.py"))


def executed(folder: Path, *shown) -> Path:
    """A notebook whose only cell shows some objects."""
    outputs = [
        nbformat.v4.new_output("display_data", {"text/html": one._repr_html_(), "text/plain": repr(one)})
        for one in shown
    ]
    cell = nbformat.v4.new_code_cell("show()", outputs=outputs)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "page.ipynb")
    return folder / "page.ipynb"


def frame(rows: int) -> pd.DataFrame:
    return pd.DataFrame({"name": [f"row {number}" for number in range(rows)], "a | b": ["long words " * 8] * rows})


def test_tables_are_read_as_they_are_shown(tmp_path):
    page = executed(tmp_path, report.listing(frame(2), "First"), report.listing(frame(1), "Second"))
    (first, rows), (second, _) = tables["tables_of"](page)
    assert (first, second) == ("First", "Second")
    assert rows[0] == ["name", "a | b"]
    assert rows[1] == ["row 0", ("long words " * 8).strip()]
    assert len(rows) == 3


def test_long_places_are_wrapped_and_nothing_is_lost(tmp_path):
    ((_, rows),) = tables["tables_of"](executed(tmp_path, report.listing(frame(3), "Long")))
    lines = tables["laid_out"](rows)
    assert max(map(len, lines)) < 2 * tables["CELL"]
    assert " ".join(lines).split().count("long") == 3 * 8


@pytest.mark.parametrize(("rows", "least"), [(1, 1), (60, 3)])
def test_a_part_becomes_one_file_of_enough_pages(tmp_path, rows, least):
    page = executed(tmp_path, report.listing(frame(rows), "Long"))
    assert tables["write"](tmp_path / "part.pdf", "Part", [page]) == 1
    pages = len(re.findall(rb"/Type /Page\b", (tmp_path / "part.pdf").read_bytes()))
    assert pages >= least
    assert least > 1 or pages == 1


def test_a_part_without_tables_has_no_file(tmp_path):
    assert tables["write"](tmp_path / "part.pdf", "Part", [executed(tmp_path)]) == 0
    assert not (tmp_path / "part.pdf").exists()
