"""Verdicts are computed from intervals."""

import math

import pandas as pd
import pytest

from robustclip.study import Claim, Condition, Estimate, Verdict, judge, keep_verdicts, kept_verdicts, verdict_table

CLAIM = Claim("MMCOA-C1", "MMCoA beats CLIP", printed="45 to 75 points", mark="paper")
HOLDS = Condition("gain", Estimate(10, 5, 15), above=0)
FAILS = Condition("gain", Estimate(-10, -15, -5), above=0)
UNDECIDED = Condition("gain", Estimate(1, -4, 6), above=0)


@pytest.mark.parametrize(
    ("low", "high", "bounds", "outcome"),
    [
        (0.1, 9, {"above": 0}, "holds"),
        (0.0, 9, {"above": 0}, "undecided"),
        (-9, 0.0, {"above": 0}, "fails"),
        (-9, -0.1, {"below": 0}, "holds"),
        (0.0, 9, {"below": 0}, "fails"),
        (-1, 9, {"below": 0}, "undecided"),
        (-1, 1, {"above": -2, "below": 2}, "holds"),
        (-1, 3, {"above": -2, "below": 2}, "undecided"),
        (3, 4, {"above": -2, "below": 2}, "fails"),
        (-9, -4, {"above": -2, "below": 2}, "fails"),
        (math.nan, math.nan, {"above": 0}, "undecided"),
    ],
)
def test_a_condition_looks_at_the_whole_interval(low, high, bounds, outcome):
    assert Condition("x", Estimate((low + high) / 2, low, high), **bounds).outcome == outcome


@pytest.mark.parametrize(
    ("conditions", "verdict"),
    [
        ([HOLDS], Verdict.REPRODUCED),
        ([HOLDS, HOLDS], Verdict.REPRODUCED),
        ([HOLDS, UNDECIDED], Verdict.PARTLY),
        ([HOLDS, FAILS], Verdict.PARTLY),
        ([FAILS], Verdict.NOT_REPRODUCED),
        ([FAILS, UNDECIDED], Verdict.NOT_REPRODUCED),
        ([UNDECIDED], Verdict.NOT_TESTABLE),
        ([], Verdict.NOT_TESTABLE),
    ],
)
def test_verdicts(conditions, verdict):
    assert judge(CLAIM, conditions).verdict == verdict


def test_the_table_shows_claim_verdict_and_evidence():
    (row,) = verdict_table([judge(CLAIM, [HOLDS, UNDECIDED])]).to_dict("records")
    assert row == {
        "id": "MMCOA-C1",
        "statement": "MMCoA beats CLIP",
        "printed": "45 to 75 points",
        "mark": "paper",
        "verdict": "partly",
        "evidence": "gain: 10.0 [5.0, 15.0] (holds); gain: 1.0 [-4.0, 6.0] (undecided)",
    }
    assert verdict_table([]).columns.tolist() == list(row)


def test_a_condition_needs_a_bound():
    with pytest.raises(ValueError, match=r"'gain' has no bound; give above"):
        Condition("gain", Estimate(1, 0, 2))


def test_verdicts_of_pages_meet_again_in_the_order_of_pages(tmp_path):
    table = verdict_table([judge(CLAIM, [HOLDS]), judge(Claim("OWN", "no number"), [FAILS])])
    for page in ("mmcoa/second", "mmcoa/first", "other/page"):
        pd.testing.assert_frame_equal(keep_verdicts(table, "quick", page, tmp_path), table)
    found = kept_verdicts("quick", "mmcoa", tmp_path)
    assert found["page"].tolist() == ["first", "first", "second", "second"]
    pd.testing.assert_frame_equal(found.drop(columns="page"), pd.concat([table, table], ignore_index=True))


def test_a_page_that_runs_again_replaces_its_verdicts(tmp_path):
    keep_verdicts(verdict_table([judge(CLAIM, [HOLDS])]), "quick", "mmcoa/page", tmp_path)
    keep_verdicts(verdict_table([judge(CLAIM, [FAILS])]), "quick", "mmcoa/page", tmp_path)
    assert kept_verdicts("quick", "mmcoa", tmp_path)["verdict"].tolist() == [Verdict.NOT_REPRODUCED]


def test_a_part_of_which_nothing_ran_has_no_verdicts(tmp_path):
    found = kept_verdicts("full", "mmcoa", tmp_path)
    assert found.empty
    assert {"page", "id", "verdict"} <= set(found.columns)


def test_evidence_of_many_conditions_is_told_by_outcome():
    table = verdict_table([judge(CLAIM, [HOLDS, FAILS, UNDECIDED, HOLDS, HOLDS])])
    told = "holds 3 of 5: gain +10.0; gain +10.0; gain +10.0. fails 1 of 5: gain -10.0. undecided 1 of 5: gain +1.0"
    assert table["evidence"].tolist() == [told]
