"""Digests of components: what an edit voids, and what it does not."""

import importlib
import sys
from pathlib import Path

import pytest

from robustclip.attacks import PGD, AutoAttack, SepAttack, Square
from robustclip.study import provenance
from robustclip.study.bench import Bench
from robustclip.study.provenance import current, digests
from robustclip.study.tasks import Classify, Retrieve

BASE = '''
"""A module."""
from fake.other import helper

FACTOR = 2


class Base:
    """What they share."""

    def shared(self, x: int) -> int:
        """Words."""
        return helper(x) * FACTOR  # a comment


class Uses(Base):
    """One."""


class Alone:
    """Another."""

    def own(self):
        raise ValueError("some words")
'''
SCRIPT = """
K = 2


def help(x):
    return x


class Mine:
    'Words.'

    def __call__(self, x):
        return help(x) * K
"""
OTHER = "def helper(x):\n    return x + 1\n\n\ndef unused(x):\n    return x\n"


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Digests of a small package after edits of its text."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "__init__.py").write_text("from fake.base import Uses\n")
    monkeypatch.setattr(provenance, "PACKAGE", "fake")
    monkeypatch.syspath_prepend(str(tmp_path))

    def of(old: str = "", new: str = "", file: str = "base") -> dict[str, str]:
        texts = {"base": BASE, "other": OTHER}
        assert old in texts[file]
        texts[file] = texts[file].replace(old, new)
        for name, text in texts.items():
            (folder / f"{name}.py").write_text(text)
        for known in (provenance._source, provenance._neighbours, provenance._digest, provenance._dumps):
            known.cache_clear()
        importlib.invalidate_caches()
        return {name: current(f"fake.base:{name}") for name in ("Uses", "Alone")}

    yield of
    for known in (provenance._source, provenance._neighbours, provenance._digest, provenance._dumps):
        known.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake"]:
        del sys.modules[name]


def test_digests_are_the_same_in_all_versions_of_python():
    """As Python 3.11 writes a tree: 3.12 has types of parameters in it, 3.13 leaves out what is empty."""
    text = 'def f(x, *, y=None):\n    """Words."""\n    return [f"{x!r:>{y}}", g(), u"a", None]\n'
    assert provenance.counted(provenance.parsed(text), "f") == (
        "FunctionDef(name='f', args=arguments(posonlyargs=[], args=[arg(arg='x')], kwonlyargs=[arg(arg='y')], "
        "kw_defaults=[Constant(value=None)], defaults=[]), body=[Return(value=List(elts=[JoinedStr(values=["
        "FormattedValue(value=Name(id='x', ctx=Load()), conversion=114, format_spec=JoinedStr(values=[Constant("
        "value='>'), FormattedValue(value=Name(id='y', ctx=Load()), conversion=-1)]))]), Call(func=Name(id='g', "
        "ctx=Load()), args=[], keywords=[]), Constant(value='a', kind='u'), Constant(value=None)], ctx=Load()))], "
        "decorator_list=[])",
    )


@pytest.mark.parametrize(
    ("old", "new", "file"),
    [
        ("What they share.", "Other words.", "base"),
        ("  # a comment", "", "base"),
        ("x: int) -> int", "x)", "base"),
        ("some words", "better words", "base"),
        ("def unused(x):\n    return x", "def unused(x):\n    return 2 * x", "other"),
        ('"""A module."""', '"""Words."""', "base"),
    ],
)
def test_what_does_not_count(edited, old, new, file):
    assert edited() == edited(old, new, file)


@pytest.mark.parametrize(
    ("old", "new", "file", "voided"),
    [
        ("FACTOR = 2", "FACTOR = 3", "base", {"Uses"}),
        ("return x + 1", "return x + 2", "other", {"Uses"}),
        ("raise ValueError", "raise TypeError", "base", {"Alone"}),
        ("class Uses(Base):", "class Uses(Base):\n    more = 1\n", "base", {"Uses"}),
    ],
)
def test_what_counts_voids_only_what_refers_to_it(edited, old, new, file, voided):
    before, after = edited(), edited(old, new, file)
    assert {name for name in before if before[name] != after[name]} == voided


def test_a_definition_that_moved_is_the_same_and_one_that_is_gone_is_told():
    assert current("robustclip.attacks.gradient:PGD") == current("robustclip.attacks:PGD")
    assert current("robustclip.attacks.gradient:NoSuchAttack") == "gone"
    assert current("robustclip.nosuch:PGD") == "gone"
    assert current("own:LastIterate") is None


def test_square_counts_for_autoattack_and_not_for_pgd():
    parts = {kind: provenance.closure((kind.__module__, kind.__name__)) for kind in (PGD, Square, AutoAttack)}
    square = ("robustclip.attacks.square", "Square")
    assert all(square in parts[kind] for kind in (Square, AutoAttack))
    assert square not in parts[PGD]


def test_what_measures_every_cell_names_no_attack_and_no_recipe():
    """So that an edit of one attack leaves the cells of the others alone."""
    measured = provenance.closure(*((kind.__module__, kind.__name__) for kind in (Bench, Classify, Retrieve, PGD)))
    modules = {module.removeprefix("robustclip.") for module, _ in measured}
    assert {"study.bench", "study.tasks", "models", "attacks.gradient", "data.sources"} <= modules
    for other in ("attacks.square", "attacks.autoattack", "attacks.from_textattack", "training.recipes", "audit"):
        assert other not in modules


def test_an_edit_of_one_task_leaves_the_cells_of_the_other_alone():
    classified = provenance.closure(*((kind.__module__, kind.__name__) for kind in (Bench, Classify)))
    assert ("robustclip.study.tasks", "ranks") not in classified
    assert ("robustclip.study.tasks", "ranks") in provenance.closure(("robustclip.study.tasks", "Retrieve"))


def test_every_component_inside_counts():
    names = {name.partition(":")[2] for name in digests(SepAttack(image=PGD(eps=0.1)))}
    assert names == {"SepAttack", "PGD", "BertAttack"}


def test_a_component_of_a_notebook_counts_by_its_cell():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    cell = "from robustclip.component import component\n\n@component\nclass Mine:\n    k: int = 1\n\n"
    cell += "    def __call__(self, x):\n        return x * self.k + 1\n"
    found = []
    for text in (cell, cell.replace("+ 1", "+ 2"), "\n# words\n" + cell):
        assert shell.run_cell(text).success
        found.append(digests(shell.user_ns["Mine"](k=2)))
    assert set(found[0]) == {"own:Mine"}
    assert found[0] == found[2] != found[1]


def test_a_component_of_a_script_counts_by_its_source_and_what_that_uses(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def of(text: str, name: str) -> dict:
        Path(tmp_path, f"{name}.py").write_text(text)
        return digests(importlib.import_module(name).Mine)

    text = SCRIPT
    first = of(text, "script_one")
    assert set(first) == {"own:Mine"}
    assert first == of(text.replace("'Words.'", "'Others.'"), "script_two")
    assert first != of(text.replace("K = 2", "K = 3"), "script_three")
    assert first != of(text.replace("return x\n", "return -x\n"), "script_four")
