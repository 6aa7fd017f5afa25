"""The printed numbers."""

from importlib.resources import files

import pandas as pd
import pytest

from robustclip.data.roles import role, role_names
from robustclip.study import named, reported, reported_papers

KEY = ["paper", "table", "method", "setting", "attack", "eps", "dataset", "metric"]
FILES = sorted(path.name.removesuffix(".csv") for path in files("robustclip").joinpath("assets/reported").iterdir()
               if path.name.endswith(".csv"))  # fmt: skip


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


def test_a_defended_row_goes_by_its_defense_and_others_by_their_model():
    frame = pd.DataFrame({"model": ["clip", "clip", "TeCoA"], "defense": ["none", "ttc", "none"]})
    assert named(frame, {"ttc": "TTC", "clip": "CLIP"})["method"].tolist() == ["CLIP", "TTC", "TeCoA"]
