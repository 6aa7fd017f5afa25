"""The printed numbers, and ours beside them."""

from importlib.resources import files

import pandas as pd
import pytest

from robustclip.data.roles import role, role_names
from robustclip.study import compare, reported, reported_papers

KEY = ["paper", "table", "method", "setting", "attack", "eps", "dataset", "metric"]
FILES = sorted(path.name.removesuffix(".csv") for path in files("robustclip").joinpath("assets/reported").iterdir()
               if path.name.endswith(".csv"))  # fmt: skip


def ours(**changes):
    row = {"model": "clip", "role": "cifar10", "dataset": "CIFAR10", "attack": "PGD-100", "attacker": "blind",
           "defense": "none", "eps": 8 / 255, "seed": 0, "n": 200, "accuracy": 3.0, "low": 1.0, "high": 6.0,
           "source": "tinyworld", "played_by": "PGD()", "distinct": None, "stale": False}  # fmt: skip
    return pd.DataFrame([row | changes])


@pytest.mark.parametrize("name", FILES)
def test_every_file_keeps_the_schema(name):
    table = reported(name)
    assert table.columns.tolist() == [*KEY[:6], "eps_value", *KEY[6:], "value", "grade", "source"]
    assert not table.duplicated(KEY).any()
    assert table["value"].notna().all()
    assert set(table["grade"]) <= {"primary", "code", "secondary"}
    assert table["eps"].str.fullmatch(r"(\d+/255)?").all()
    assert table["eps_value"].isna().equals(table["eps"] == "")
    assert table["eps_value"].dropna().between(0, 16 / 255).all()
    assert (table[["paper", "table", "method", "dataset", "metric", "source"]] != "").all(axis=None)
    shares = table[table["metric"].isin(["accuracy", "recall@1", "attack_success_rate"])]["value"]
    assert shares.between(0, 100).all()


def test_there_are_twelve_files_or_so_and_all_papers_are_found():
    assert len(FILES) == 11
    assert {"MMCoA", "COLA", "SCC", "DOC", "independent-testtime"} <= set(reported_papers())
    assert "mmcoa" not in reported_papers()


def test_known_numbers():
    table = reported("mmcoa", "I")
    row = table[(table["method"] == "CLIP") & (table["attack"] == "PGD-100") & (table["dataset"] == "CIFAR10")]
    assert row["value"].tolist() == [9.32]
    assert row["eps"].tolist() == ["1/255"]
    assert row["eps_value"].tolist() == [1 / 255]
    assert reported("MMCoA", "I").equals(table)
    assert len(reported("independent-testtime")) > len(reported("doc")) > 0
    assert reported("cola", 2)["table"].unique().tolist() == ["2"]


def test_the_printed_data_sets_have_roles():
    titles = {role(name).title for name in role_names()}
    assert {"CIFAR10", "OxfordPets", "MSCOCO", "BUSI"} <= titles & set(pd.concat(map(reported, FILES))["dataset"])


@pytest.mark.parametrize(
    ("paper", "table", "message"),
    [("attention", None, "unknown paper 'attention'.*mmcoa"), ("mmcoa", "IX", "unknown table of mmcoa 'IX'.*VIII")],
)
def test_unknown_papers_and_tables_are_answered_with_a_list(paper, table, message):
    with pytest.raises(ValueError, match=message):
        reported(paper, table)


def test_comparing_keeps_the_printed_order_and_rows_of_both_sides():
    printed = reported("mmcoa", "I")
    both = compare(pd.concat([ours(), ours(dataset="DTD")]), printed, methods={"clip": "CLIP"})
    assert len(both) == (printed["metric"] == "accuracy").sum() + 1
    assert both["method"][0] == printed["method"][0]
    (row,) = both[both["ours"].notna() & both["printed"].notna()].to_dict("records")
    assert (row["method"], row["attack"], row["dataset"]) == ("CLIP", "PGD-100", "CIFAR10")
    assert (row["printed"], row["grade"], row["ours"], row["low"], row["high"]) == (9.32, "primary", 3.0, 1.0, 6.0)
    assert row["difference"] == pytest.approx(3.0 - 9.32)
    assert both.iloc[-1][["dataset", "ours"]].tolist() == ["DTD", 3.0]


def test_a_defended_row_goes_by_its_defense():
    both = compare(ours(defense="ttc", attack="PGD-10"), reported("scc", "1"), methods={"ttc": "TTC"})
    assert (both["ours"].notna() & both["printed"].notna()).sum() == 1
    assert set(both[both["ours"].notna()]["method"]) == {"TTC"}


def test_budgets_can_be_part_of_the_comparison():
    printed = reported("mmcoa", "I")
    on = ["method", "attack", "dataset", "eps"]
    swept = pd.concat([ours(eps=1 / 255), ours(), ours(attack="clean", eps=0.0, attacker="none")])
    both = compare(swept, printed, on=on, methods={"clip": "CLIP"})
    found = both[both["ours"].notna() & both["printed"].notna()]
    assert found["attack"].tolist() == ["PGD-100", "clean"]
    assert found["eps"].tolist() == [1 / 255, 0.0]
    with pytest.raises(ValueError, match=r"several rows for .*CIFAR10.*select one, or add the column"):
        compare(swept, printed, methods={"clip": "CLIP"})
    with pytest.raises(ValueError, match="unknown column in `on` 'colour'"):
        compare(ours(), printed, on=["method", "colour"])


def test_references_stand_beside_on_the_most_images():
    full = pd.concat(
        [ours(accuracy=4.0, n=1000, eps=1 / 255), ours(accuracy=9.0, n=20), ours(accuracy=8.0, attack="x")]
    )
    both = compare(
        ours(), reported("mmcoa", "I"), methods={"clip": "CLIP"}, references={"full": full, "photo": full[:0]}
    )
    assert both[["full", "full n"]].dropna().values.tolist() == [[4.0, 1000]]
    assert both[both["full"].notna()]["ours"].tolist() == [3.0]
    assert both["photo"].isna().all()
