"""What pages would cost, from their own code and without running them."""

import json

import pytest

import plan_pages
from robustclip.study import plan, scale

START = "from robustclip import study\nchosen = study.scale(scale)\n"
GRID = """
roles = ["cifar10", "dtd"]
def trained(there):
    return study.fine_tuned(there, ["TeCoA"], "cifar10")
def cells_of(there: study.Scale) -> list[study.Cell]:
    models = {"clip": there.model("clip")} | trained(there)
    return study.grid(there, models, roles=roles, attacks=["clean", "PGD-100"], n=there.size("mmcoa/I"))
"""
NOTHING_MORE = "results = study.evaluate(cells_of(chosen))\nraise SystemExit('this page was run')\n"


@pytest.fixture
def book(tmp_path, monkeypatch):
    """A book of pages, each from its code."""

    def write(**texts: str) -> None:
        for name, text in texts.items():
            cells = [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": 'scale: str = "quick"'},
                     {"cell_type": "code", "metadata": {}, "source": START + text}]  # fmt: skip
            (tmp_path / "part").mkdir(exist_ok=True)
            (tmp_path / f"part/{name}.ipynb").write_text(json.dumps({"cells": cells}))

    monkeypatch.setattr(plan_pages, "BOOK", tmp_path)
    return write


def test_a_page_is_planned_by_its_own_cells_and_not_run(book, capsys):
    book(one=GRID + NOTHING_MORE)
    assert plan_pages.main(["--scale", "paper", "--json"]) == 0
    page, everything = json.loads(capsys.readouterr().out)
    cells = plan_pages.grids(plan_pages.pages()["part/one"], "paper")
    assert {cell.n for cell in cells} == {scale("paper").sizes["mmcoa/I"]}
    costs = plan(cells)
    assert (page["page"], page["cells"], page["trainings"]) == ("part/one", 8, 1)
    assert page["image passes"] == costs["forward"].sum() + costs["backward"].sum()
    assert page["hours"] == pytest.approx(costs["seconds"].sum() / 3600)
    recipe = scale("paper").recipe("TeCoA")
    passes = recipe.optimisation.updates_on(50_000) * 256 * sum(recipe.passes())
    assert page["hours of training"] == pytest.approx(passes / scale("paper").assumed_speed / 3600)
    assert page["GB of data"] == pytest.approx(0.17 + 0.63, abs=0.01)
    assert {name: page[name] for name in page if name != "page"} == {
        name: everything[name] for name in page if name != "page"}  # fmt: skip


def test_cells_that_pages_share_count_once_in_the_end(book):
    book(one=GRID, two=GRID.replace('["cifar10", "dtd"]', '["dtd", "pets"]'))
    frame, left = plan_pages.table("paper", "part")
    assert frame["cells"].tolist() == [8, 8, 12]
    assert frame["trainings"].tolist() == [1, 1, 1]
    assert not left


def test_pages_that_cannot_be_planned_say_why(book, capsys):
    book(
        measuring=GRID.replace('["cifar10", "dtd"]', 'list(study.evaluate(study.grid("quick"))["role"])'),
        none="study.evaluate(study.grid('quick'))",
        words="print('hello')",
    )
    assert plan_pages.main(["--scale", "paper"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "not planned: part/measuring: its cells depend on what evaluate finds",
        "not planned: part/none: it has no function from a scale to list[study.Cell]",
    ]
    assert plan_pages.main(["--chapter", "other"]) == 2
    assert "unknown chapter 'other'; choose one of: part" in capsys.readouterr().err
    assert plan_pages.main(["--scale", "huge"]) == 2
    assert "unknown scale 'huge'" in capsys.readouterr().err


def test_pages_of_the_book_have_the_sizes_of_the_scale():
    """Table I: CLIP on each source, three recipes and one more on the first, clean and under three attacks."""
    paper = scale("paper")
    cells = plan_pages.grids(plan_pages.pages("mmcoa")["mmcoa/in-distribution"], "paper")
    sources = len(paper.role_names("source"))
    assert len(cells) == 4 * (sources + 3 * sources + 1)
    assert {cell.n for cell in cells} == {paper.sizes["mmcoa/I"]}
