"""Exercises tell what they ask for, students get no solutions, and slides hold the book's figures."""

import re

import nbformat
import pytest
from matplotlib.figure import Figure

import labs
import parts
import slides
import student
from robustclip import report

ROOT = student.ROOT
EXERCISE = re.compile(r"^(`{3,}|:{3,})\{exercise\}[^\n]*\n:label: (\S+)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)
SIZE = re.compile(r"\A\n\*(Easy|Medium|Hard), (\d+) minutes\.\*\n\n")
HINT = re.compile(r"^```\{dropdown\} Hint\n(.+?)\n```\n\Z", re.DOTALL | re.MULTILINE)
NOTEBOOKS = [path for path in sorted((ROOT / "book").rglob("*.ipynb")) if "/." not in path.as_posix()]


def prose_of(path) -> str:
    return "\n\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")


def test_every_exercise_has_a_level_minutes_and_a_hint_of_its_own():
    hints, found = {}, 0
    for path in NOTEBOOKS:
        prose = prose_of(path)
        found += len(re.findall(r"\{exercise\}", prose))
        for _, label, body in EXERCISE.findall(prose):
            size, hint = SIZE.search(body), HINT.search(body)
            assert size, f"{path.name}, {label}: no level and minutes"
            assert 5 <= int(size[2]) <= 60, label
            assert hint, f"{path.name}, {label}: no hint at its end"
            assert len(hint[1].split()) >= 8, f"{label}: say more than {hint[1]!r}"
            assert hint[1] not in hints.values(), label
            hints[label] = hint[1]
            assert re.search(rf"\{{solution(-start)?\}} {label}$", prose, re.MULTILINE), f"{label} has no solution"
    assert len(hints) == found >= 100


def test_the_syllabus_adds_up():
    minutes = {
        label: int(SIZE.search(body)[2]) for path in NOTEBOOKS for _, label, body in EXERCISE.findall(prose_of(path))
    }
    text = (ROOT / "book" / "coursework" / "syllabus.md").read_text(encoding="utf8")
    given = {what: re.findall(rf"\| (\d+) \| {what}: (.+) \|", text) for what in ("read", "lab", "exercises")}
    assert [len(rows) for rows in given.values()] == [len(labs.labs())] * 3 == [4] * 3
    for its_minutes, lab in given["lab"]:
        name = re.search(r"\]\((.+)\)", lab)[1]
        first = nbformat.read(labs.SOURCE / name, as_version=4).cells[0].source
        assert f"| **Time** | {its_minutes} minutes. |" in first
    for their_minutes, exercises in given["exercises"]:
        assert sum(minutes[label] for label in re.findall(r"<([\w-]+)>`", exercises)) == int(their_minutes)


def test_a_students_book_has_no_solutions(tmp_path):
    count = student.write(tmp_path / "book")
    written = sorted((tmp_path / "book").rglob("*.ipynb"))
    assert count == len(written) == len(NOTEBOOKS)
    text = "".join(path.read_text(encoding="utf8") for path in written)
    assert "{solution" not in text
    assert "### BEGIN" not in text
    assert text.count("{exercise}") == sum(prose_of(path).count("{exercise}") for path in NOTEBOOKS)
    assert text.count("## References") == sum(prose_of(path).count("## References") for path in NOTEBOOKS)
    for path in labs.labs():
        made = nbformat.read(tmp_path / "book" / "book" / "coursework" / path.name, as_version=4)
        assert made == labs.handed_out(nbformat.read(path, as_version=4))
    assert {"_config.yml", "_toc.yml", "book"} == {path.name for path in (tmp_path / "book").iterdir()}


def notebook(*sources: str) -> nbformat.NotebookNode:
    """A notebook of Markdown, and of code where a source begins with `#!`."""
    new = {True: nbformat.v4.new_code_cell, False: nbformat.v4.new_markdown_cell}
    return nbformat.v4.new_notebook(cells=[new[source.startswith("#!")](source) for source in sources])


def test_what_a_solution_is():
    inner = "`````{solution} a\n:class: dropdown\n\n```python\n1\n```\n`````"
    gated = ("```{solution-start} b\n```\n\nText.", "#! 2", "More.\n\n```{solution-end}\n```")
    made = student.without_solutions(notebook(f"Before.\n\n{inner}\n\n## References\n\nAfter.", *gated, "#! 3"))
    assert [cell.source for cell in made.cells] == ["Before.\n\n## References\n\nAfter.", "#! 3"]
    with pytest.raises(ValueError, match=r"has no .solution-end"):
        student.without_solutions(notebook(*gated[:2]))


@pytest.fixture
def executed(tmp_path):
    """An executed notebook with a figure that is shown twice."""
    figure = Figure()
    figure.subplots().plot([1, 2])
    picture = report.show(figure, "A line from one to two.", "Up & on")
    shown = nbformat.v4.new_output("display_data", {"text/html": picture._repr_html_(), "text/plain": repr(picture)})
    page = notebook("# A <page>\n\nProse.", "#!", "#!", "#!")
    page.cells[1].outputs = page.cells[2].outputs = [shown]
    page.cells[3].outputs = [nbformat.v4.new_output("display_data", {"text/html": "<table></table>"})]
    page.metadata["myst"] = {"html_meta": {"description": "Lines go up by 3 %."}}
    nbformat.write(page, tmp_path / "page.ipynb")
    return tmp_path / "page.ipynb"


def test_a_slide_has_title_sentence_figure_and_caption(executed):
    (slide,) = slides.slides_of(executed)
    assert slide.title == "A &lt;page&gt;"
    assert slide.said == "Lines go up by 3 %."
    assert slide.caption == "Up &amp; on"
    assert 'alt="A line from one to two."' in slide.image


@pytest.mark.parametrize(("said", "shown"), [("It is.", "It is."), ("It was cu", "It was …"), ("", "")])
def test_sentences_that_were_cut_end_with_a_whole_word(said, shown):
    assert slides.whole(said) == shown


def test_a_deck_asks_nobody_for_anything_and_can_be_turned_and_printed(executed):
    text = slides.deck("A & part", list(slides.slides_of(executed)))
    assert text.count("<section>") == 2
    assert "<h1>A &amp; part</h1>" in text
    assert "ArrowRight" in text
    assert "@media print" in text
    outside = re.sub(r'src="data:image/\w+;base64,[\w+/=]+"', "", text)
    assert not re.search(r"https?:|//\w|\bsrc=|\bhref=|url\(|@import", outside)


def test_decks_follow_the_table_of_contents(executed, tmp_path, monkeypatch):
    (tmp_path / "_toc.yml").write_text(
        "parts:\n- {caption: Two Words, chapters: [{file: page}]}\n- {caption: None, chapters: [{file: absent}]}\n"
    )
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["slides.py", "--executed", str(tmp_path), "--out", str(tmp_path / "out")])
    slides.main()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["two-words.html"]
