"""Averages over roles: equal weight, one n for all roles, seeds together."""

import numpy as np
import pandas as pd
import pytest

from robustclip.attacks.gradient import UniformNoise
from robustclip.study import averages, evaluate, grid, macro, outcomes
from study_fakes import FakeClip

SETS = {"avg2": ["cifar10", "dtd"], "CIFAR10": ["cifar10"]}


def measured(store, n, roles=("cifar10", "dtd"), **options):
    return evaluate(
        grid(
            "quick", {"fake": FakeClip()}, list(roles), {"clean": None, "noise": UniformNoise(eps=0.4)}, n=n, **options
        ),
        store,
    )


def test_roles_weigh_equally_and_n_is_one(tmp_path):
    """A role that was also measured on many more images weighs no more, as it would if all cells were pooled."""
    few, many = measured(tmp_path, 10), measured(tmp_path, 40, roles=["cifar10"])
    both = pd.concat([many, few], ignore_index=True)
    found = averages(both, SETS, tmp_path).set_index(["role", "attack"])
    for attack in ("clean", "noise"):
        rows = few[few["attack"] == attack]
        hits = [[outcomes(row, tmp_path)] for row in rows.to_dict("records")]
        mean = found.loc["avg2", attack]
        assert mean["accuracy"] == pytest.approx(rows["accuracy"].mean())
        assert (mean["low"], mean["high"]) == macro(hits)[1:]
        assert mean["n"] == 10
        own = many[many["attack"] == attack].iloc[0]
        assert found.loc["CIFAR10", attack][["n", "accuracy"]].tolist() == [40, own["accuracy"]]
    pooled = both.assign(hits=both["accuracy"] * both["n"]).groupby("attack")[["hits", "n"]].sum()
    assert not np.allclose(pooled["hits"] / pooled["n"], found.loc["avg2"]["accuracy"][pooled.index])
    assert list(found.reset_index()["role"].unique()) == ["avg2", "CIFAR10"]


def test_what_lacks_a_role_or_a_seed_has_no_average(tmp_path):
    frame = measured(tmp_path, 10, seeds=[0, 1])
    assert averages(frame[frame["role"] != "dtd"], {"avg2": SETS["avg2"]}, tmp_path).empty
    lacking = frame.drop(frame[(frame["role"] == "dtd") & (frame["attack"] == "noise") & (frame["seed"] == 1)].index)
    assert averages(lacking, {"avg2": SETS["avg2"]}, tmp_path)["attack"].tolist() == ["clean"]


def test_seeds_are_averaged_and_widen_the_interval(tmp_path):
    frame = measured(tmp_path, 10, seeds=[0, 1, 2])
    (row,) = averages(frame[frame["attack"] == "noise"], {"avg2": SETS["avg2"]}, tmp_path).to_dict("records")
    assert row["accuracy"] == pytest.approx(frame[frame["attack"] == "noise"]["accuracy"].mean())
    assert row["seed"] == 0
    assert set(averages(frame, SETS, tmp_path).columns) == {*frame.columns, "interval"}


def test_a_set_with_fewer_images_counts_with_all_it_has(tmp_path):
    """Digits have 1,000 test images; a role of which only some were measured does not pass for a small one."""
    roles = {"avg2": ["cifar10", "digits"]}
    frame = measured(tmp_path, 1100, roles["avg2"])
    found = averages(frame, roles, tmp_path)
    assert set(frame["n"]) == {1000, 1100}
    assert found["n"].tolist() == [1100, 1100]
    clean = frame[frame["attack"] == "clean"]
    assert found.iloc[0]["accuracy"] == pytest.approx(clean["accuracy"].mean())
    part = measured(tmp_path, 40, ["digits"])
    lacking = pd.concat([frame[frame["role"] == "cifar10"], part], ignore_index=True)
    assert averages(lacking, roles, tmp_path).empty
    assert averages(pd.concat([lacking, measured(tmp_path, 40, ["cifar10"])]), roles, tmp_path)["n"].tolist() == [
        40,
        40,
    ]
