"""What stands beside a run: only a page's own cells, of scales of evidence; whole ones are what the page speaks of."""

import importlib
from dataclasses import replace

import pytest

from robustclip.study import EVIDENCE, above, beside, evaluate, facts_of, grid, scale
from study_fakes import FakeClip, Step

module = importlib.import_module("robustclip.study.beside")
SCALES = {name: replace(scale("quick"), name=name) for name in ("photo", "full", "quick")}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small scales of the names of the real ones."""
    monkeypatch.setattr(module, "find_scale", SCALES.__getitem__)


def cells_of(there, attacks=("clean", "Step")):
    own = {"clean": None, "Step": Step()}
    return grid(there, {"fake": FakeClip()}, ["cifar10"], {name: own[name] for name in attacks}, n=8)


def test_beside_a_run_stand_the_cells_of_the_page_at_other_scales_of_evidence_as_far_as_known(tmp_path):
    evaluate(cells_of(SCALES["photo"]), tmp_path)
    evaluate(grid(SCALES["photo"], {"fake": FakeClip()}, ["cifar10"], ["clean"], n=4), tmp_path)  # of another page
    for name in SCALES:
        found = beside(SCALES[name], cells_of, tmp_path)
        assert list(found) == [one for one in EVIDENCE if one != name]
        if "photo" in found:
            assert found["photo"][["attack", "n"]].values.tolist() == [["clean", 8], ["Step", 8]]
        if "full" in found:
            assert found["full"].empty


@pytest.mark.parametrize(
    ("run", "known", "expected"),
    [
        ("quick", {"photo": ("clean", "Step"), "full": ("clean", "Step")}, ["photo"]),
        ("quick", {"photo": ("clean",), "full": ("clean", "Step")}, ["full"]),
        ("quick", {"photo": ("clean",)}, []),
        ("full", {"photo": ("clean", "Step")}, ["photo"]),
        ("full", {"photo": ("Step",)}, []),
        ("photo", {"full": ("clean", "Step")}, []),
    ],
)
def test_a_page_speaks_of_the_weightiest_scale_that_is_known_whole(tmp_path, run, known, expected):
    for name, attacks in known.items():
        evaluate(cells_of(SCALES[name], attacks), tmp_path)
    found = above(SCALES[run], beside(SCALES[run], cells_of, tmp_path), cells_of)
    assert list(found) == expected
    assert all(len(frame) == 2 for frame in found.values())


def test_a_scale_whose_cells_cannot_be_named_is_unknown(tmp_path):
    def missing(there):
        raise FileNotFoundError("no prompts of this set")

    found = beside(SCALES["quick"], missing, tmp_path)
    assert all(frame.empty for frame in found.values())
    assert above(SCALES["quick"], found, missing) == {}


def test_facts_of_are_those_of_the_data_else_as_shipped(monkeypatch):
    assert facts_of(scale("quick"), "cifar10")["names"][0] in facts_of(scale("quick"), "cifar10")["prompts"][0]
    monkeypatch.delenv("ROBUSTCLIP_DATA", raising=False)
    shipped = {"data": {"cifar10/parquet": {"names": ["a cat"]}}}
    monkeypatch.setattr("robustclip.study.shipped.known", lambda name: shipped if name == "photo" else {"data": {}})
    assert facts_of(scale("photo"), "cifar10") == {"names": ["a cat"]}
    with pytest.raises(FileNotFoundError, match="cifar100"):
        facts_of(scale("photo"), "cifar100")
