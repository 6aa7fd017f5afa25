"""The leaderboard: worst cases image by image, doubts by rule, the order, and somebody's own entry."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from robustclip.cli import app
from robustclip.component import component
from robustclip.defenses.base import Defense
from robustclip.report import leaderboard as table
from robustclip.study import entry as own
from robustclip.study import leaderboard, proofs, scale, testtime
from robustclip.study.leaderboard import AUTO, AWARE, CLEAN, CONDITIONS, PGD, Entry, doubts, ranked, row

QUICK, WHOLE = scale("quick"), scale("full")
SET, SETS = leaderboard.protocol(QUICK).sets[0], leaderboard.protocol(WHOLE).sets
MODULE = """
from robustclip.defenses.base import Defense

class Mean(Defense):
    def logits(self, classifier, images, draw):
        return (classifier(images) + classifier(images.flip(-1))) / 2

class Lacks(Defense):
    pass

class Odd(Defense):
    def logits(self, images):
        return images

class Push:
    def __init__(self, eps=0.1):
        self.eps = eps

    def __call__(self, classifier, images, labels):
        return (images + self.eps).clamp(0, 1)

    def __repr__(self):
        return f"Push(eps={self.eps})"

def plain(classifier):
    return classifier

def two(classifier, images):
    return images

def pixels(classifier):
    return lambda images: images

def breaks(classifier):
    def answer(images):
        raise RuntimeError("no\\nway")
    return answer

number = 3
"""


@component
class Coin(Defense):
    """Answers as it likes."""

    randomised = True

    def logits(self, classifier, images, draw):
        return classifier(images)


def right(*places: int, n: int = 10) -> np.ndarray:
    """Right at these places only."""
    found = np.zeros(n, dtype=bool)
    found[list(places)] = True
    return found


ALL = tuple(range(10))
AWARES = (AWARE, "aware")
FOUND = {CLEAN: right(*ALL), (PGD, "blind"): right(*ALL[:9]), (AUTO, "blind"): right(*ALL[1:]), AWARES: right(0, 1, 2)}


def entry(found: dict, made: Defense | None = None, **more) -> Entry:
    """An entry of one set."""
    rights = {condition: {SET: outcomes} for condition, outcomes in found.items()}
    return Entry(QUICK, "CLIP", "CLIP", type(made).__name__ if made else "none", made, rights, **more)


def test_the_worst_case_is_image_by_image_on_the_first_images_of_all():
    mirror = QUICK.defense("Mirror")
    found = row(entry(FOUND, mirror))
    assert (found["worst"], found["best_known"], found["aware"]) == (20, 20, 30), "images 1 and 2"
    assert found["strongest"] == AWARE
    longer = FOUND | {CLEAN: right(*range(40), n=40), (PGD, "blind"): right(*range(30), n=40)}
    again = row(entry(longer, mirror))
    assert (again["worst"], again["worst_n"], again["blind"], again["blind_n"]) == (20, 10, 75, 40)
    assert again["worst_low"] < 20 < again["worst_high"]


def test_blind_numbers_give_no_worst_case_and_stand_last():
    blind = {one: part for one, part in FOUND.items() if one != AWARES}
    good, weak = entry(blind, QUICK.defense("Mirror")), entry(FOUND | {AWARES: right()}, QUICK.defense("LPF"))
    lines = ranked([row(good), row(weak), row(entry(blind))])
    assert lines["defense"].tolist() == ["none", "LowPass", "Mirrored"]
    assert lines["rank"].tolist()[:2] == [1, 2]
    assert pd.isna(lines["rank"].iloc[2])
    assert lines["best_known"].iloc[2] > lines["best_known"].iloc[1], "it would be ahead by its blind number"


def test_an_entry_needs_every_set_of_the_protocol():
    there = {condition: {SETS[0]: outcomes} for condition, outcomes in FOUND.items()}
    whole = {condition: dict.fromkeys(SETS, outcomes) for condition, outcomes in FOUND.items()}
    part = Entry(WHOLE, "CLIP", "defense", "Mirror", WHOLE.defense("Mirror"), whole | {AWARES: there[AWARES]})
    assert row(part)["worst"] is None
    assert "only on" in doubts(part)["attacker"]
    assert row(replace(part, rights=whole))["worst_n"] == 10 * len(SETS)


def test_every_doubt_has_its_reason():
    mirror, seen = QUICK.defense("Mirror"), {SET: {0}}
    many = {CLEAN: right(*range(100), n=100), (PGD, "blind"): right(*range(90), n=100),
            (AUTO, "blind"): right(*range(100), n=100), AWARES: right(*range(88), n=100)}  # fmt: skip
    assert doubts(entry(many, mirror)) == {}
    assert list(doubts(entry(many, mirror, flags=("noise",)))) == ["audit"]
    assert list(doubts(entry(many | {AWARES: right(*range(60), n=100)}, mirror))) == ["blind"]
    assert list(doubts(entry({one: many[one] for one in (CLEAN, (PGD, "blind"), AWARES)}, mirror))) == ["AutoAttack"]
    assert list(doubts(entry({one: many[one] for one in (CLEAN, (PGD, "blind"))}, mirror))) == ["attacker"]
    assert list(doubts(entry(many, Coin(), draws=seen))) == ["draws"]
    assert doubts(entry(many, Coin(), draws={SET: {0, 1}})) == {}
    assert doubts(entry({one: many[one] for one in (CLEAN, (AUTO, "blind"))})) == {}, "nothing to be blind to"


def test_autoattack_counts_on_the_defended_one_if_it_is_known_there():
    defended = FOUND | {(AUTO, "aware"): right(0)}
    assert row(entry(FOUND, QUICK.defense("Mirror")))["autoattack_on"] == "host"
    found = row(entry(defended, QUICK.defense("Mirror")))
    assert (found["autoattack_on"], found["autoattack"], found["worst"]) == ("defended", 10, 0)


def test_printed_numbers_stand_beside_the_methods_that_claim_them():
    printed = testtime.printed()
    assert set(printed["metric"]) == {"accuracy"}
    claimed = printed[(printed["defense"] == "TTC") & (printed["attack"] == "PGD-10")]["value"].item()
    found = leaderboard.in_print(entry(FOUND, QUICK.defense("TTC")).__class__(
        QUICK, "CLIP", "defense", "TTC", QUICK.defense("TTC"), {}))  # fmt: skip
    assert found["reported"] == claimed, "the claim, not the lower aware number of a later paper"
    assert leaderboard.in_print(entry(FOUND, Coin())) == {"reported": None, "reported_of": ""}


def test_the_protocol_has_the_sizes_of_the_scale_and_one_cell_per_question():
    usual = leaderboard.cells(WHOLE, {"clip": WHOLE.model("clip")}, {"Mirror": WHOLE.defense("Mirror")})
    sizes = {(one.attack_name, one.attacker): one.n for one in usual}
    assert sizes[PGD, "blind"] == WHOLE.sizes["testtime/blind"]
    assert sizes[AUTO, "aware"] == sizes[AWARE, "aware"] == WHOLE.sizes["testtime/aware"]
    assert {one.role for one in usual} == set(SETS)
    assert {one.seed for one in usual} == {0}
    random = leaderboard.cells(WHOLE, {"clip": WHOLE.model("clip")}, {"TTE": WHOLE.defense("TTE")}, n=4)
    assert {one.seed for one in random if one.attack_name == PGD} == set(range(leaderboard.DRAWS))
    assert not [one for one in random if (one.attack_name, one.attacker) == (AUTO, "aware")], (
        "it answers anew each time"
    )
    assert {one.n for one in random} == {4}


def test_known_rows_are_those_that_are_shipped(tmp_path):
    frame = leaderboard.rows(QUICK, tmp_path)
    known = frame[frame["rank"].notna()]
    assert known["worst"].is_monotonic_decreasing
    assert frame["worst"].isna().iloc[len(known) :].all()
    assert (known["worst"] <= known[["clean", "blind"]].max(axis=1)).all()
    clip = frame[(frame["model"] == "CLIP") & (frame["defense"] == "none")].iloc[0]
    cells = testtime.blind(QUICK, ["none"], [SET], ["clean"])
    assert clip["clean_n"] >= cells[0].n
    assert (frame["forward"].dropna() < 100).all(), "a training is no part of an answer"
    shown = table(frame.head(7), "Board")
    assert len(shown.rows) == 7
    assert 'data-label="potentially unreliable"' in shown._repr_html_()
    assert frame["model"].iloc[0] in leaderboard.text(frame)


def test_certificates_are_made_once_and_counted_at_their_radius(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path))
    monkeypatch.setenv("ROBUSTCLIP_FRESH", "1")
    model = SimpleNamespace(digest="somebody", provenance=dict)
    assert proofs.certificates(QUICK, model, 4) is None
    votes = np.array([[200, 0], [200, 0], [110, 90]])
    found = proofs.certificates(
        QUICK, model, 4, lambda: {"labels": np.array([0, 1, 0]), "select": votes, "estimate": votes}
    )
    assert proofs.proved(found, 4).tolist() == [True, False, False]
    again = proofs.certificates(QUICK, model, 4)
    assert (again["radii"] == found["radii"]).all()
    smooth = replace(entry({}, QUICK.defense("Smoothing")), certificates=found)
    assert row(smooth)["certified"] == pytest.approx(100 / 3)
    assert row(smooth)["clean"] is None


# --- somebody's own ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a module, which no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path / "runs"))
    for name in ("mine", "halfway", "broken"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "halfway.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    return tmp_path


def test_an_own_defense_gets_its_row_by_the_command(folder):
    done = CliRunner().invoke(app, ["leaderboard", "--defense", "mine:Mean", "--n", "2", "--json", "a.json"])
    assert done.exit_code == 0, done.output
    assert "CLIP + Mean has rank" in done.stdout
    (mine,) = [one for one in json.loads((folder / "a.json").read_text()) if one["defense"] == "Mean"]
    assert (mine["kind"], mine["clean_n"], mine["worst_n"], mine["forward"]) == ("own", 2, 2, 2)
    assert mine["autoattack_on"] == "defended"
    assert mine["flags"] != "not audited"
    frame = leaderboard.rows(QUICK)
    assert "Mean" not in set(frame["defense"]), "it is on nobody else's board"


def test_an_own_function_and_an_own_attack_are_measured(folder):
    found = own.propose(QUICK, defense="mine:plain", attack="mine:Push")
    assert found.attack.eps == QUICK.reference_eps, "a budget that can be set is the scale's"
    small = replace(found, attack=found.attack)
    mine = own.measure(small, n=2)
    alone, before, after = own.against(mine, "Push")
    assert after.value <= min(alone.value, before.value)
    frame, place = own.placed(pd.DataFrame(), mine)
    assert (len(frame), place) == (1, 0)
    assert any("Push alone leaves" in line for line in own.said(frame, place, mine, "Push"))


def test_a_changed_module_is_measured_again():
    found = own.Proposal(WHOLE, "CLIP", WHOLE.model("clip"), "CLIP", "Coin", Coin())
    assert all(one.scale.recompute_stale for one in found.cells(1)[0])
    known = replace(found, defense_name="TTE", defense=WHOLE.defense("TTE"))
    assert not any(one.scale.recompute_stale for one in known.cells(1)[0])


def test_an_entry_takes_the_place_of_its_twin():
    board = ranked([row(entry(FOUND, Coin())), row(entry(FOUND))])
    better = entry(FOUND | {AWARES: right(*ALL)}, Coin())
    frame, place = own.placed(board, better)
    assert (len(frame), place) == (2, 0) or frame["defense"].tolist().count("Coin") == 1
    assert frame.iloc[place]["aware"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defense", "gone:A"], "--defense 'gone:A': no module 'gone' here; name a .py file of this folder"),
        (["--defense", "mine:A"], "module 'mine' has no 'A'; it defines Lacks, Mean, Odd, Push, breaks"),
        (["--defense", "mine:number"], "--defense 'mine:number' is of type int, not callable"),
        (["--defense", "mine:Lacks"], "Lacks() failed: TypeError"),
        (
            ["--defense", "mine:Odd"],
            "--defense 'mine:Odd' takes (images), and is called with (classifier, images, draw)",
        ),
        (["--defense", "mine:two"], "takes (classifier, images), and is called with (classifier)"),
        (["--defense", "mine:pixels"], "give finite logits (images, classes), here (2, 10)"),
        (["--defense", "mine:breaks"], "defense 'breaks' fails on two images: RuntimeError: no way; correct it"),
        (["--defense", "halfway:A"], "'halfway' imports 'nothing_of_this_name', which is not installed"),
        (["--defense", "broken:A"], "importing 'broken' failed: ZeroDivisionError: division by zero"),
        (["--defense", ":A"], "--defense ':A' is no module:Name; write it like my_module:MyDefense"),
        (["--defense", "TTCC"], "unknown defense 'TTCC'"),
        (["--model", "nobody"], "no CLIP called 'nobody'"),
        (["--attack", "mine:plain"], "takes (classifier), and is called with (classifier, images, labels)"),
        (["--attack", "BERT-Attack"], "--attack 'BERT-Attack' is no attack on images alone"),
        (["--attack", "clean"], "--attack 'clean' is no attack on images alone"),
        (["--scale", "huge"], "unknown scale 'huge'"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(folder, arguments, message):
    done = CliRunner().invoke(app, ["leaderboard", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_conditions_name_attacks_that_the_scales_play():
    for attack, _ in CONDITIONS.values():
        assert attack == "clean" or QUICK.attack(attack)
