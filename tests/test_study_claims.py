"""Verdicts are computed from intervals."""

import math

import pytest

from robustclip.study import Claim, Condition, Estimate, Verdict, judge, verdict_table

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
