"""Verdicts are computed from intervals, by a rule whose errors are known."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from robustclip.study import (
    Claim,
    Condition,
    Estimate,
    Verdict,
    judge,
    keep_verdicts,
    kept_verdicts,
    room,
    shipped_verdicts,
    verdict_table,
    verdicts_by_scale,
)
from robustclip.study.claims import holm, together

CLAIM = Claim("MMCOA-C1", "MMCoA beats CLIP", printed="45 to 75 points", mark="paper")
AGREES = Condition("gain", Estimate(10, 5, 15), above=0)
CONTRADICTS = Condition("loss", Estimate(-10, -15, -5), above=0)
OPEN = Condition("nothing", Estimate(1, -4, 6), above=0)
OUTSIDE = Condition("no room", Estimate(10, 5, 15), above=0, outside="ceiling: CLIP is at 98 %")


def condition(z, **settings):
    """A condition whose estimate lies so many standard errors above its bound."""
    return Condition("x", Estimate(z, z - 1.959963984540054, z + 1.959963984540054), above=0, **settings)


@pytest.mark.parametrize(
    ("low", "high", "bounds", "outcome"),
    [
        (0.1, 9, {"above": 0}, "agree"),
        (-0.1, 9, {"above": 0}, "open"),
        (-9, -0.1, {"above": 0}, "contradict"),
        (-9, -0.1, {"below": 0}, "agree"),
        (0.1, 9, {"below": 0}, "contradict"),
        (-1, 9, {"below": 0}, "open"),
        (-1, 1, {"above": -2, "below": 2}, "agree"),
        (-1, 3, {"above": -2, "below": 2}, "open"),
        (3, 4, {"above": -2, "below": 2}, "contradict"),
        (-9, -4, {"above": -2, "below": 2}, "contradict"),
        (math.nan, math.nan, {"above": 0}, "open"),
        (3, 3, {"above": 2}, "agree"),
        (2, 2, {"above": 2}, "contradict"),
    ],
)
def test_one_condition_looks_at_the_whole_interval(low, high, bounds, outcome):
    assert judge(CLAIM, [Condition("x", Estimate((low + high) / 2, low, high), **bounds)]).outcomes == [outcome]


@pytest.mark.parametrize(
    ("ps", "rejected"),
    [
        ([0.04], [True]),
        ([0.04, 0.04], [False, False]),
        ([0.02, 0.04], [True, True]),  # the second meets 0.05 after the first fell
        ([0.04, 0.001, 0.02], [True, True, True]),
        ([0.03, 0.001, 0.03], [False, True, False]),  # both must meet 0.025
        ([0.012, 0.05, 0.05, 0.05], [True, False, False, False]),
        ([], []),
    ],
)
def test_holm(ps, rejected):
    assert holm(ps) == rejected


def test_outcomes_are_corrected_within_core_and_rest():
    z = 2.3  # p = 0.021: enough alone, not for the first of three
    assert judge(CLAIM, [condition(z)]).outcomes == ["agree"]
    assert judge(CLAIM, [condition(z), condition(0), condition(0)]).outcomes == ["open"] * 3
    rest = [condition(0, core=False)] * 2
    assert judge(CLAIM, [condition(z), *rest]).outcomes == ["agree", "open", "open"]
    assert judge(CLAIM, [condition(z), OUTSIDE, OUTSIDE]).outcomes == ["agree", "outside", "outside"]


@pytest.mark.parametrize(
    ("conditions", "verdict"),
    [
        ([AGREES], Verdict.SUPPORTED),
        ([AGREES, AGREES], Verdict.SUPPORTED),
        ([AGREES, AGREES, OPEN], Verdict.SUPPORTED),  # two thirds
        ([AGREES, OPEN], Verdict.OPEN),
        ([AGREES, CONTRADICTS], Verdict.MIXED),
        ([AGREES, AGREES, AGREES, CONTRADICTS], Verdict.MIXED),
        ([CONTRADICTS], Verdict.CONTRADICTED),
        ([CONTRADICTS, OPEN, OPEN], Verdict.CONTRADICTED),
        ([OPEN], Verdict.OPEN),
        ([], Verdict.OPEN),
        ([OUTSIDE], Verdict.OUTSIDE),
        ([OUTSIDE, AGREES], Verdict.SUPPORTED),
        ([OUTSIDE, OPEN], Verdict.OPEN),
        ([condition(3.0)] * 8 + [condition(-2.2)] * 4, Verdict.OPEN),  # two thirds agree, together they do not
        ([condition(2.0)] * 12, Verdict.OPEN),  # none by itself
        ([condition(3.2)] + [condition(2.0)] * 11, Verdict.SUPPORTED),
        ([condition(9.0)] * 7 + [condition(0.1)] * 5, Verdict.OPEN),  # large effects do not stand for the others
    ],
)
def test_verdicts(conditions, verdict):
    assert judge(CLAIM, conditions).verdict == verdict


def test_conditions_that_are_not_core_decide_nothing():
    extra = Condition("ours", CONTRADICTS.estimate, above=0, core=False)
    found = judge(CLAIM, [AGREES, extra])
    assert found.verdict == Verdict.SUPPORTED
    assert found.counts == {"agree": 1, "contradict": 0, "open": 0, "outside": 0}
    assert found.outcomes == ["agree", "contradict"]
    assert judge(CLAIM, [extra]).verdict == Verdict.OPEN


def test_a_claim_outside_this_world_is_not_judged():
    found = judge(CLAIM, [CONTRADICTS], outside="no photographs here")
    assert found.verdict == "outside this world"
    assert found.note == "no photographs here"
    assert found.counts == {"agree": 0, "contradict": 0, "open": 0, "outside": 1}
    assert judge(CLAIM, [OUTSIDE, OUTSIDE]).note == "ceiling: CLIP is at 98 %"


# --- operating characteristics ----------------------------------------------------------------------------------------


def words(effects, n, runs, correlation=0.0, discordant=0.4):
    """How often each word falls, if the methods differ on 40 % of n images and by `effects` points per condition."""
    random, found = np.random.default_rng(0), Counter()
    effects = np.array(effects, dtype=float)
    errors = np.sqrt(1e4 * discordant - effects**2) / math.sqrt(n)
    for _ in range(runs):
        noise = math.sqrt(1 - correlation) * random.normal(size=len(effects)) + math.sqrt(correlation) * random.normal()
        values = effects + errors * noise
        estimates = [Estimate(v, v - 1.96 * e, v + 1.96 * e) for v, e in zip(values, errors, strict=True)]
        found[judge(CLAIM, [Condition("x", one, above=0) for one in estimates]).verdict] += 1 / runs
    return found


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("conditions", [4, 12])
def test_a_null_claim_stays_open(conditions, correlation):
    assert words([0] * conditions, 300, 1500, correlation)[Verdict.OPEN] > 0.94


def test_a_null_claim_of_one_condition_errs_as_often_as_its_interval():
    found = words([0], 300, 3000)
    assert 0.935 < found[Verdict.OPEN] < 0.965
    assert found[Verdict.SUPPORTED] < 0.035


def test_a_true_claim_of_twelve_conditions_is_supported():
    assert words([10] * 12, 300, 600, discordant=0.3)[Verdict.SUPPORTED] > 0.97
    assert words([10] * 12, 300, 600)[Verdict.SUPPORTED] > 0.9


def test_a_false_claim_is_contradicted():
    assert words([-10] * 12, 300, 200)[Verdict.CONTRADICTED] > 0.98


def test_a_claim_that_is_true_in_half_of_its_conditions_is_not_supported():
    assert words([20] * 6 + [0] * 6, 300, 600)[Verdict.SUPPORTED] < 0.05
    assert words([15] * 6 + [-15] * 6, 300, 200)[Verdict.MIXED] > 0.95


@pytest.mark.parametrize("n", [100, 300])
def test_the_effect_that_could_have_been_seen_is_seen(n):
    (visible,) = {Condition("x", Estimate(0, -h, h), above=0).visible for h in [1.96 * 100 * math.sqrt(0.4 / n)]}
    assert words([visible], n, 1500)[Verdict.SUPPORTED] == pytest.approx(0.8, abs=0.04)


def test_that_many_images_settle_it():
    z = 1.0
    entry = judge(CLAIM, [condition(z)])
    assert entry.times == pytest.approx((1.959964 + 0.841621) ** 2, rel=1e-4)
    assert entry.note == (
        "a distance of 2.8 from the bound would have been seen; "
        "if the truth is what was measured, 7.8 times as many images would settle it"
    )
    assert judge(CLAIM, [condition(-z)]).times == pytest.approx(entry.times)
    assert "too close to the bound" in judge(CLAIM, [condition(0.1)]).note
    assert judge(CLAIM, [condition(9)] * 6 + [condition(0)] * 6).times == math.inf
    assert judge(CLAIM, [AGREES]).note == ""
    assert judge(CLAIM).note == "not tested"
    assert judge(CLAIM, [Condition("x", Estimate(1, math.nan, math.nan), above=0)]).note == "not tested"


def test_no_single_condition_speaks_for_all():
    assert together([50.0, 1.0, 1.0]) == pytest.approx(1.0)
    assert together([50.0, 3.0, -2.9]) == pytest.approx((4 + 3 - 2.9) / 3)
    assert together([]) == 0


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "claims", "start"),
    [
        ([98], "gain", "ceiling: 98.0 % leaves no room for a gain"),
        ([91.9], "gain", ""),
        ([1], "gain", ""),
        ([1], "loss", "floor: 1.0 % leaves no room for a loss"),
        ([98], "loss", ""),
        ([1, 1.5], "difference", "floor: 1.0 % and 1.5 % leaves no room for a difference"),
        ([1, 30], "difference", ""),
        ([95, 99], "difference", "ceiling"),
    ],
)
def test_room_is_judged_by_the_baseline(values, claims, start):
    found = room(*(Estimate(value, value - 1, value + 1) for value in values), claims=claims)
    assert found.startswith(start)
    assert bool(found) == bool(start)


def test_room_knows_three_kinds_of_claims():
    with pytest.raises(ValueError, match="claims 'more'"):
        room(Estimate(1, 0, 2), claims="more")
    assert room(Estimate(93, 90, 95), claims="gain", ceiling=95) == ""
    assert room(Estimate(7, 5, 9), claims="loss", by=5) == "floor: 7.0 % leaves no room for a loss"
    assert room(Estimate(7.1, 5, 9), claims="loss", by=5) == room(Estimate(7, 5, 9), claims="gain", by=5) == ""


# --- tables and files -------------------------------------------------------------------------------------------------


def test_the_table_shows_the_claim_with_every_condition():
    first, second, third = verdict_table([judge(CLAIM, [AGREES, OPEN, OUTSIDE])]).to_dict("records")
    claim = {
        "id": "MMCOA-C1", "statement": "MMCoA beats CLIP", "printed": "45 to 75 points", "mark": "paper", "ours": False,
        "verdict": "open", "agree": 1, "contradict": 0, "open": 1, "outside": 1,
    }  # fmt: skip
    evidence = {"what": "gain", "value": 10, "low": 5, "high": 15, "above": 0, "outcome": "agree", "core": True}
    assert {**first, **claim, **evidence} == first
    assert math.isnan(first["below"])
    assert first["p"] == pytest.approx(8.9e-5, rel=0.01)
    assert first["note"].startswith("a distance of 7.1 from the bound")
    assert {**second, **claim, "what": "nothing", "outcome": "open", "reason": ""} == second
    assert {**third, "outcome": "outside", "reason": "ceiling: CLIP is at 98 %"} == third


def test_a_claim_without_conditions_has_a_row_with_its_note():
    table = verdict_table([judge(CLAIM), judge(Claim("B", "b", ours=True), outside="no photographs")])
    assert table["what"].tolist() == ["not tested", "no photographs"]
    assert table["outcome"].tolist() == ["open", "outside"]
    assert table["value"].isna().all()
    assert table["ours"].tolist() == [False, True]
    assert verdict_table([]).columns.tolist() == table.columns.tolist()


def test_a_condition_needs_a_bound():
    with pytest.raises(ValueError, match=r"'gain' has no bound; give above"):
        Condition("gain", Estimate(1, 0, 2))


def test_a_claim_is_judged_once_on_a_page():
    with pytest.raises(ValueError, match="'MMCOA-C1' is judged twice"):
        verdict_table([judge(CLAIM), judge(CLAIM)])


def test_verdicts_of_pages_meet_again_in_the_order_of_pages(tmp_path):
    judgements = [judge(CLAIM, [AGREES, OPEN]), judge(Claim("OWN", "no “number”", ours=True), [CONTRADICTS])]
    table = verdict_table(judgements)
    for page in ("mmcoa/second", "mmcoa/first", "other/page"):
        pd.testing.assert_frame_equal(keep_verdicts(judgements, "quick", page, tmp_path), table)
    found = kept_verdicts("quick", "mmcoa", tmp_path)
    assert found["page"].tolist() == ["first"] * 3 + ["second"] * 3
    pd.testing.assert_frame_equal(found.drop(columns="page"), pd.concat([table, table], ignore_index=True))


def test_an_id_says_one_thing_in_a_part(tmp_path):
    keep_verdicts([judge(CLAIM)], "quick", "mmcoa/first", tmp_path)
    keep_verdicts([judge(Claim(CLAIM.id, "CLIP beats MMCoA"))], "quick", "mmcoa/second", tmp_path)
    keep_verdicts([judge(Claim(CLAIM.id, "another part may"))], "quick", "other/page", tmp_path)
    with pytest.raises(ValueError, match="'MMCOA-C1' says different things on the pages first and second"):
        kept_verdicts("quick", "mmcoa", tmp_path)


def test_a_page_that_runs_again_replaces_its_verdicts(tmp_path):
    keep_verdicts([judge(CLAIM, [AGREES])], "quick", "mmcoa/page", tmp_path)
    keep_verdicts([judge(CLAIM, [CONTRADICTS])], "quick", "mmcoa/page", tmp_path)
    assert kept_verdicts("quick", "mmcoa", tmp_path)["verdict"].tolist() == [Verdict.CONTRADICTED]


def test_a_part_of_which_nothing_ran_has_no_verdicts(tmp_path):
    found = kept_verdicts("full", "mmcoa", tmp_path)
    assert found.empty
    assert {"page", "id", "verdict", "what", "p"} <= set(found.columns)


def test_verdicts_of_a_page_stand_next_to_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(tmp_path))
    keep_verdicts([judge(CLAIM, [AGREES])], "full", "mmcoa/page", tmp_path)
    keep_verdicts([judge(Claim("B", "b"))], "full", "mmcoa/another", tmp_path)
    found = verdict_table([judge(CLAIM, [CONTRADICTS])])
    frames = verdicts_by_scale(found, "quick", "mmcoa/page")
    assert {name: frame["verdict"].tolist() for name, frame in frames.items()} == {
        "photo": [], "full": ["supported"], "quick": ["contradicted"],
    }  # fmt: skip
    assert set(frames["full"]) == set(found)
    assert verdicts_by_scale(found, "full", "mmcoa/page")["full"] is found
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(tmp_path / "nothing"))
    frames = verdicts_by_scale(found, "quick", "mmcoa/page")
    assert [len(frames[name]) for name in ("photo", "full", "quick")] == [0, 0, 1]


def test_shipped_verdicts_can_be_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(tmp_path))
    keep_verdicts([judge(CLAIM, [AGREES])], "full", "mmcoa/page", tmp_path)
    assert shipped_verdicts("full", "mmcoa")["page"].tolist() == ["page"]
    monkeypatch.setenv("ROBUSTCLIP_FRESH", "1")
    assert shipped_verdicts("full", "mmcoa").empty
