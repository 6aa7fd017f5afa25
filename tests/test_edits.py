"""Edits that change no answer: found definition by definition, kept only with evidence, and then without effect."""

import importlib
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from robustclip.cli import app
from robustclip.study import edits, provenance
from robustclip.study.edits import confirm_edits, edited_since
from robustclip.study.provenance import current

CODE = {
    "__init__": "",
    "base": "from fake.other import helper\n\nclass Uses:\n    def work(self, x):\n        return helper(x)\n",
    "other": "def helper(x):\n    return x + 1\n\n\ndef spare(x):\n    return x\n",
}
CACHES = ("_source", "_neighbours", "_digest", "_dumps", "edits")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package under git; the call edits a module and returns the digest of what uses it."""
    folder = tmp_path / "fake"
    (folder / "assets").mkdir(parents=True)
    for name, text in CODE.items():
        (folder / f"{name}.py").write_text(text)
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(provenance, "PACKAGE", "fake")
    monkeypatch.setattr(provenance, "EDITS", folder / "assets" / "edits.json")
    for module in (provenance, edits):
        monkeypatch.setattr(module, "ROOT", folder)

    def digest(old: str = "", new: str = "", file: str = "other") -> str:
        path = folder / f"{file}.py"
        path.write_text(path.read_text().replace(old, new))
        for name in CACHES:
            getattr(provenance, name).cache_clear()
        importlib.invalidate_caches()
        return current("fake.base:Uses")

    yield digest
    for name in CACHES:
        getattr(provenance, name).cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake"]:
        del sys.modules[name]


@pytest.fixture
def answers(monkeypatch):
    """What cells answer then and now; the call says how many cells there are, and what they answer now."""

    def set_up(now: list[int], cells: int = 3) -> None:
        records = [{"key": str(count), "provenance": {"fake.base:Uses": "0"}} for count in range(cells)]
        monkeypatch.setattr(edits, "shipped_records", lambda scale: records)
        monkeypatch.setattr(edits, "sample", lambda records: records)
        pairs = {record["key"]: ({"right": [1, 0]}, {"right": now}) for record in records}
        monkeypatch.setattr(edits, "_answers", lambda records, commit: pairs)

    return set_up


EDIT = "return x + 1", "y = x + 1\n    return y"


def test_only_definitions_that_are_written_otherwise_are_found(package):
    assert edited_since("HEAD") == []
    package("return x + 1", "return x + 1  # a comment")
    package("def spare(x):\n    return x\n", "")
    package("def helper", "def fresh():\n    pass\n\n\ndef helper")
    assert edited_since("HEAD") == []
    package(*EDIT)
    (edit,) = edited_since("HEAD")
    assert (edit.name, edit.moved) == ("fake.other:helper", False)


def test_an_edit_without_a_flip_counts_as_what_it_was_until_the_next(package, answers):
    before = package()
    assert package(*EDIT) != before
    answers([1, 0])
    row = confirm_edits(edited_since("HEAD"), "HEAD").iloc[0]
    assert (row["cells"], row["answers"], row["flips"], row["confirmed"]) == (3, 6, 0, True)
    assert package() == before
    assert edited_since("HEAD") == []
    (told,) = json.loads(provenance.EDITS.read_text())["fake.other:helper"].values()
    assert (told["cells"], told["scale"], len(told["since"])) == (3, "quick", 40)

    assert package("return y", "return y + 0") != before
    confirm_edits(edited_since("HEAD"), "HEAD")
    assert package() == before  # two edits later it still counts as the first


@pytest.mark.parametrize(
    ("now", "cells", "why"),
    [
        ([1, 1], 3, "answers changed"),
        ([1, 0], 2, "2 of 3 cells that are needed"),
        ([1, 0], 0, "no cell reaches it"),
    ],
)
def test_without_evidence_an_edit_counts(package, answers, now, cells, why):
    package(*EDIT)
    answers(now, cells)
    row = confirm_edits(edited_since("HEAD"), "HEAD").iloc[0]
    assert not row["confirmed"]
    assert why in row["why"]
    assert not provenance.EDITS.exists()


def test_an_edit_that_refers_to_something_new_counts(package, answers):
    """Else nobody would look at that again."""
    package("return x + 1", "return spare(x) + 1")
    answers([1, 0])
    (edit,) = edited_since("HEAD")
    row = confirm_edits([edit], "HEAD").iloc[0]
    assert (edit.moved, row["confirmed"]) == (True, False)


def test_what_is_kept_fits_the_code():
    """Each definition that counts as something else is written as one of its confirmed edits."""
    for name, known in provenance.edits().items():
        module, _, symbol = name.partition(":")
        assert provenance.digest_of_parts(provenance.counted(provenance._source(module), symbol)) in known
        assert all(told["cells"] >= edits.FEWEST and told["answers"] for told in known.values())


def test_a_commit_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match=r"git diff .* does not work"):
        edited_since("nosuchcommit")


@pytest.mark.parametrize("words", [["--store", "runs"], ["--device", "cpu"]])
def test_the_command_does_not_take_what_it_would_not_use(words):
    done = CliRunner().invoke(app, ["confirm", "--scale", "quick", "--since", "HEAD", *words])
    assert done.exit_code == 2
    assert "leave --store and --device out" in done.stderr
