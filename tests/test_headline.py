"""What holds, in five sentences: the front page's and the README's."""

import runpy
from pathlib import Path

import pandas as pd
import pytest

from robustclip.study import headline

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def board() -> pd.DataFrame:
    """Three models and two defenses; the second defense has no attacker who knows it."""
    names = ["model", "defense", "kind", "clean", "blind", "worst"]
    rows = [
        ("FARE", "none", "fine-tuned", 60, 40, 30),
        ("TeCoA", "none", "fine-tuned", 50, 35, 20),
        ("CLIP", "TTE", "defense", 70, 50, 10),
        ("CLIP", "none", "CLIP", 75, 4, 2),
        ("CLIP", "COLA", "defense", 70, 60, None),
        ("CLIP", "TTC-reversed", "defense", 70, 60, 9),  # a gate that no paper has
        ("TGA-ZSR-released", "none", "fine-tuned", 50, 35, 8),  # a recipe at another setting
    ]
    frame = pd.DataFrame(rows, columns=names)
    return frame.assign(worst_low=frame["worst"] - 1, worst_high=frame["worst"] + 1)


def test_defenses_are_counted_under_blind_and_under_all_attackers(board):
    said = headline.at_test_time(board, "here")
    assert said.startswith("Of 1 defenses at test time around an undefended CLIP, 1 keep at least 5 points")
    assert (
        "and 1 once attackers who know the defense count, 1 of them with the whole interval (here); "
        "the best, TTE, falls from 50 to 10 % [9, 11]" in said
    )
    weak = headline.at_test_time(board.assign(worst=board["worst"].where(board["defense"] != "TTE", 6)), "here")
    assert "and 0 once attackers" in weak
    unsure = headline.at_test_time(board.assign(worst_low=0), "here")
    assert "count, 0 of them with the whole interval" in unsure


def test_recipes_and_the_best_of_all_are_named_with_their_intervals(board):
    said = headline.tuned(board, "here")
    assert "Of 2 recipes" in said
    assert "FARE keeps most in the worst case, 30 % [29, 31], at 60 % on clean images, and TeCoA least, 20 %" in said
    assert "Best of all 6 entries of the leaderboard is FARE (fine-tuned): it keeps 30 %" in headline.best(
        board, "here"
    )


def test_what_is_not_measured_is_not_said(board):
    nothing = board.assign(worst=None)
    assert [make(nothing, "") for make in (headline.at_test_time, headline.tuned, headline.best)] == ["", "", ""]


def test_worlds_agree_where_both_can_test():
    frame = pd.DataFrame({
        "id": ["A", "B", "C", "A", "B", "C"], "scale": ["photo"] * 3 + ["full"] * 3,
        "verdict": ["supported", "open", "due", "supported", "mixed", "supported"], "page": "mmcoa/ablation",
    })  # fmt: skip
    assert "same word on 1 of 2 claims" in headline.agreement(frame)
    assert headline.agreement(frame[frame["scale"] == "photo"]) == ""


def test_the_readme_says_what_the_shipped_results_say(monkeypatch):
    tool = runpy.run_path(str(ROOT / "tools" / "headline.py"), run_name="tool")
    monkeypatch.setattr("sys.argv", ["headline.py", "--check"])
    with pytest.raises(SystemExit) as end:
        tool["main"]()
    assert end.value.code == 0, end.value.code
    assert all(path.is_file() for path in (tool["PICTURE"], tool["CARD"]))


def test_a_readme_without_a_place_is_refused():
    tool = runpy.run_path(str(ROOT / "tools" / "headline.py"), run_name="tool")
    with pytest.raises(ValueError, match="has no place for the headline"):
        tool["written"]("# Title", "told")
