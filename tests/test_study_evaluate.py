"""Evaluation: right numbers, right costs, resume, staleness, plans."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from robustclip.attacks import APGD, FGSM, PGD, AutoAttack, Square, UniformNoise
from robustclip.component import component
from robustclip.data.sources import facts, load_samples
from robustclip.defenses.base import Defense
from robustclip.models import ZeroShotClassifier
from robustclip.study import (
    Store,
    artifact,
    confirm,
    evaluate,
    export,
    grid,
    is_stale,
    judged,
    look_up,
    outcomes,
    over_seeds,
    plan,
    provenance,
    reference,
    reproduce,
    scale,
    then,
)
from robustclip.study.provenance import commit
from robustclip.study.shipped import shipped_records
from robustclip.study.store import signed
from study_fakes import Darken, FakeClip, Guess, Step

MEASURED = ["role", "attack", "attacker", "defense", "accuracy", "low", "high", "forward", "backward", "key"]


def cells(models=None, attacks=None, **options):
    attacks = attacks or {"clean": None, "Step": Step()}
    return grid("quick", models or {"fake": FakeClip()}, **{"roles": ["cifar10"], "n": 30} | options, attacks=attacks)


def by_hand(defense=None, attacker="blind", attack=None):
    """Outcomes computed without the engine, in one batch."""
    samples = load_samples("cifar10", n=30)
    base = ZeroShotClassifier(FakeClip(), samples.prompts)
    defended = defense(base) if defense else base
    target = defended if attacker == "aware" else base
    images = attack(target, samples.images, samples.labels) if attack else samples.images
    with torch.no_grad():
        return (defended(images).argmax(1) == samples.labels).tolist()


def test_accuracies_are_those_computed_by_hand(tmp_path):
    defenses = {"none": None, "dark": Darken()}
    results = evaluate(cells(defenses=defenses, attackers=["blind", "aware"]), tmp_path, batch_size=7)
    assert len(results) == 6
    for _, row in results.iterrows():
        attack = None if row["attack"] == "clean" else Step()
        expected = by_hand(defenses[row["defense"]], row["attacker"], attack)
        assert outcomes(row, tmp_path).tolist() == expected
        assert row["accuracy"] == pytest.approx(100 * sum(expected) / 30)
        assert row["low"] <= row["accuracy"] <= row["high"]
    assert results["accuracy"].nunique() >= 3  # the cases do differ
    assert (results["source"] == "tinyworld").all()
    assert not results["stale"].any()


def test_outcomes_of_several_seeds_stand_in_the_order_of_seeds(tmp_path):
    clean = {"clean": None}
    models = {7: {"fake": FakeClip(0.3)}, 0: {"fake": FakeClip()}}
    results = evaluate([cells(model, clean, seeds=[seed])[0] for seed, model in models.items()], tmp_path)
    found = judged(results, tmp_path, role="cifar10", attack="clean")
    assert found.shape == (2, 30)
    for row, (_, result) in zip(found, results.sort_values("seed").iterrows(), strict=True):
        assert row.tolist() == outcomes(result, tmp_path).tolist()
    assert found[0].tolist() != found[1].tolist()
    with pytest.raises(ValueError, match=r"0 results for {'role': 'dtd'}, seeds \[\]"):
        judged(results, tmp_path, role="dtd")
    with pytest.raises(ValueError, match="select one result per seed"):
        judged(pd.concat([results, results]), tmp_path)


def test_undefended_blind_and_aware_are_measured_once(tmp_path):
    results = evaluate(cells(attacks={"Step": Step()}, attackers=["blind", "aware"]), tmp_path)
    assert results["attacker"].tolist() == ["blind", "aware"]
    assert results["key"].nunique() == 1
    assert len(list((tmp_path / "quick").glob("*.json"))) == 1


def test_rows_come_in_the_order_of_the_cells(tmp_path):
    wanted = cells(roles=["dtd", "cifar10"], n=5)
    mixed = [wanted[0], wanted[2], wanted[1], wanted[3]]
    results = evaluate(mixed, tmp_path)
    assert results["role"].tolist() == ["dtd", "cifar10", "dtd", "cifar10"]
    assert results["attack"].tolist() == [cell.attack_name for cell in mixed]


def test_a_second_call_reads_the_store_and_computes_nothing(tmp_path):
    first = evaluate(cells(), tmp_path)

    class Broken(FakeClip):
        def encode_images(self, images):
            raise AssertionError("should not be called")

    again = evaluate(cells({"fake": Broken()}), Store(tmp_path))
    assert set(first["origin"]) == {"measured"}
    assert set(again["origin"]) == {"stored"}
    pd.testing.assert_frame_equal(first.drop(columns="origin"), again.drop(columns="origin"))


def test_passes_are_counted_and_the_model_is_untouched(tmp_path):
    clip = FakeClip()
    before = dict(clip.__dict__)
    attacks = {"clean": None, "noise": UniformNoise(eps=0.1), "FGSM": FGSM(eps=0.1), "PGD": PGD(eps=0.0, steps=4)}
    results = evaluate(cells({"fake": clip}, attacks), tmp_path).set_index("attack")
    standing = sum(by_hand())
    assert results.loc["clean", ["forward", "backward"]].tolist() == [30, 0]
    assert results.loc["noise", ["forward", "backward"]].tolist() == [60, 0]
    assert results.loc["FGSM", ["forward", "backward"]].tolist() == [60 + standing, standing]
    assert results.loc["PGD", ["forward", "backward"]].tolist() == [60, 0]
    assert (results["seconds"] >= 0).all()
    assert clip.__dict__.keys() == before.keys()


def test_planned_passes_are_those_of_a_model_that_never_breaks(tmp_path):
    class Steady(FakeClip):
        """Always the right class: the attack runs all its steps on all images."""

        def encode_images(self, images):
            return super().encode_images(images) * 0 + self.answer

    samples, clip = load_samples("cifar10", n=1), Steady()
    clip.answer = clip.encode_texts(samples.prompts)[samples.labels]
    attacks = {
        "clean": None,
        "noise": UniformNoise(eps=0.1),
        "FGSM": FGSM(eps=0.1),
        "PGD": PGD(eps=0.1, steps=3, restarts=2),
        "targets": PGD(eps=0.1, steps=3, targets=2),
        "draws": PGD(eps=0.1, steps=2, draws=3),
        "APGD": APGD(eps=0.1, steps=4),
        "Square": Square(eps=0.1, queries=7),
        "ensemble": AutoAttack(eps=0.1, parts=("apgd-ce", "square"), steps=2, queries=5),
    }
    wanted = cells({"steady": clip}, attacks, n=1)
    planned, measured = plan(wanted, tmp_path), evaluate(wanted, tmp_path)
    assert planned["forward"].tolist() == measured["forward"].tolist()
    assert planned["backward"].tolist() == measured["backward"].tolist()


def test_passes_of_an_aware_attack_are_planned_with_those_of_the_defense(tmp_path):
    @component
    class Views(Defense):
        """Two views of each image."""

        def logits(self, classifier, images, draw):
            return classifier(images) + classifier(images.flip(3))

        def passes(self, classes):
            return 2, 0

    class Steady(FakeClip):
        """Always the right class."""

        def encode_images(self, images):
            return super().encode_images(images) * 0 + self.answer

    samples, clip = load_samples("cifar10", n=1), Steady()
    clip.answer = clip.encode_texts(samples.prompts)[samples.labels]
    attacks = {"PGD": PGD(eps=0.1, steps=3), "Square": Square(eps=0.1, queries=9)}
    wanted = cells({"steady": clip}, attacks, n=1, defenses={"views": Views()}, attackers=["blind", "aware"])
    planned, measured = plan(wanted, tmp_path), evaluate(wanted, tmp_path)
    assert planned[["forward", "backward"]].values.tolist() == measured[["forward", "backward"]].values.tolist()
    assert planned["forward"].nunique() > 2


def test_blind_images_are_made_once_for_all_defenses(tmp_path):
    calls = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(Step):
        calls: list = field(default_factory=lambda: calls, compare=False, repr=False)

        def __call__(self, classifier, images, labels):
            self.calls.append(len(images))
            return super().__call__(classifier, images, labels)

    defenses = {"none": None, "dark": Darken(), "darker": Darken(factor=0.3)}
    results = evaluate(cells(attacks={"Watched": Watched()}, defenses=defenses), tmp_path, batch_size=10)
    assert calls == [10, 10, 10]
    assert results["backward"].tolist() == [30, 30, 30]
    calls.clear()
    evaluate(cells(attacks={"Watched": Watched()}, defenses=defenses, attackers=["aware"], n=20), tmp_path)
    assert calls == [20, 20, 20]


def test_a_template_replaces_the_prompts(tmp_path):
    asked = []

    class Listening(FakeClip):
        def text_features(self, texts):
            asked.extend(texts)
            return self.encode_texts(texts)

    options = {"attacks": {"clean": None}, "roles": ["dtd"], "n": 5}
    plain = evaluate(cells({"fake": Listening()}, **options), tmp_path)
    other = evaluate(cells({"fake": Listening()}, template="a drawing of {}", **options), tmp_path)
    assert asked[0].startswith("A surface with a")
    assert asked[-1].startswith("a drawing of")
    assert plain["key"][0] != other["key"][0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"defenses": {"guess": Guess()}, "attacks": {"clean": None}}, "model 'fake' gives NaN or infinite logits"),
        ({"attacks": {"nan": Step(eps=float("nan"))}}, "images contain NaN"),
        ({"models": {"gone": "runs/no-such-folder"}}, "no-such-folder.*does not exist"),
    ],
)
def test_what_goes_wrong_is_named_and_finished_cells_are_kept(tmp_path, wrong, message):
    done = evaluate(cells(attacks={"clean": None}), tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        evaluate([*cells(attacks={"clean": None}), *cells(**wrong)], tmp_path)
    assert done["accuracy"].equals(evaluate(cells(attacks={"clean": None}), tmp_path)["accuracy"])


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(cells(), tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="device"):
        evaluate(cells(), tmp_path, device="abacus")
    with pytest.raises(FileNotFoundError, match="no result 'abc'"):
        outcomes({"scale": "quick", "key": "abc", "metric": "accuracy"}, tmp_path)


def test_a_corrupt_result_stops_the_run_and_stays(tmp_path):
    evaluate(cells(), tmp_path)
    path = next((tmp_path / "quick").glob("*.json"))
    path.write_text("{")
    with pytest.raises(OSError, match=path.name):
        evaluate(cells(), tmp_path)
    assert path.read_text() == "{"


@pytest.mark.parametrize(("name", "again"), [("quick", True), ("full", False)])
def test_stale_results_are_measured_again_at_quick_and_marked_at_full(tmp_path, monkeypatch, name, again):
    wanted = grid(name, {"fake": FakeClip()}, ["cifar10"], ["clean"], n=5)
    assert not evaluate(wanted, tmp_path)["stale"].any()
    own = provenance.digest
    monkeypatch.setattr(
        provenance, "digest", lambda module, name: "new" if name == "ZeroShotClassifier" else own(module, name)
    )
    result = evaluate(wanted, tmp_path).loc[0]
    assert (result["origin"], result["stale"]) == (("measured", False) if again else ("stored", True))
    assert scale(name).recompute_stale == again


def test_a_component_of_ones_own_that_changed_under_the_same_repr_is_noticed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "from robustclip.component import component\n\n@component\nclass Mine:\n    eps: float = 0.1\n\n"
    text += (
        "    def __call__(self, classifier, images, labels):\n        return (images + self.eps * SIGN).clamp(0, 1)\n"
    )
    rows = []
    for name, sign in (("mine_one", 1), ("mine_two", -1)):
        (tmp_path / f"{name}.py").write_text(text.replace("SIGN", str(sign)))
        attack = importlib.import_module(name).Mine()
        rows.append(evaluate(cells(attacks={"mine": attack}), tmp_path / "runs").iloc[0])
    assert rows[0]["key"] == rows[1]["key"]
    assert rows[1]["origin"] == "measured"


def test_a_batch_size_changes_no_outcome(tmp_path):
    first, second = (
        evaluate(cells(attacks={"PGD": PGD(eps=0.05, steps=3)}), tmp_path / str(size), batch_size=size)
        for size in (4, 30)
    )
    assert outcomes(first.loc[0], tmp_path / "4").tolist() == outcomes(second.loc[0], tmp_path / "30").tolist()


KILLED = """
import json, os, signal, sys
from pathlib import Path
from robustclip.study import evaluate
from robustclip.study.store import CellFiles
from test_study_evaluate import killed_grid, Step

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def after(number, work):  # work, but die in its call of that number
    calls = []
    def counted(*arguments, **options):
        calls.append(1)
        return die() if len(calls) == number else work(*arguments, **options)
    return counted

def half_a_line(cell, batch):
    with cell.part.open("a") as file:
        file.write(json.dumps(batch)[:40])
        file.flush()
    die()

def arm(moment):
    append = CellFiles.append
    if moment == "attack":
        Step.__call__ = after(6, Step.__call__)
    elif moment == "line":
        CellFiles.append = lambda cell, batch: half_a_line(cell, batch) if batch["start"] == 8 else append(cell, batch)
    elif moment == "rename":
        Path.replace = after(4, Path.replace)
    else:
        Path.unlink = after(2, Path.unlink)

evaluate(killed_grid()[:0])  # everything is imported before the forks
for moment in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        arm(moment)
        evaluate(killed_grid(), Path(sys.argv[1]) / moment, batch_size=4)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, moment
"""
MOMENTS = ["attack", "line", "rename", "unlink"]


def killed_grid():
    return cells(roles=["cifar10", "dtd"], defenses={"none": None, "dark": Darken()}, n=14)


def test_a_grid_killed_at_any_moment_goes_on_to_the_same_results(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "ROBUSTCLIP_PROGRESS": "0"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), *MOMENTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    undisturbed = evaluate(killed_grid(), tmp_path / "undisturbed", batch_size=4)
    for moment in MOMENTS:
        left = Store(tmp_path / moment).status(is_stale)
        assert 0 < len(left) < len(undisturbed), moment
        assert "corrupt" not in set(left["state"]), moment
        again = evaluate(killed_grid(), tmp_path / moment, batch_size=4)
        assert again[MEASURED].equals(undisturbed[MEASURED]), moment
        assert set(Store(tmp_path / moment).status(is_stale)["state"]) == {"done"}, moment


def test_a_killed_cell_loses_at_most_the_batch_it_was_in(tmp_path, monkeypatch):
    def interrupted(self, classifier, images, labels):
        seen.append(len(images))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return images

    seen, wanted = [], cells(attacks={"Step": Step()}, n=14)
    monkeypatch.setattr(Step, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(wanted, tmp_path, batch_size=4)
    assert Store(tmp_path).status(is_stale)[["state", "done"]].to_numpy().tolist() == [["partial", 8]]
    evaluate(wanted, tmp_path, batch_size=5)
    assert seen[3:] == [5, 1]


@pytest.fixture
def shipping(tmp_path, monkeypatch):
    """A folder to ship to, and how to measure and ship."""
    folder = tmp_path / "results"
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(folder))

    def ship(wanted, store="runs", **options):
        results = evaluate(wanted, tmp_path / store)
        return results, export(wanted[0].scale.name, [tmp_path / store], folder, **options)

    return ship


def real(**options):
    attacks = {"clean": None, "PGD": PGD(eps=0.02, steps=2)}
    return grid("quick", roles=["cifar10"], attacks=attacks, **{"n": 9} | options)


def test_what_is_shipped_is_read_after_the_store_with_every_answer(tmp_path, shipping):
    results, written = shipping(real())
    assert written.set_index("what")["count"][["cells", "models"]].tolist() == [2, 0]
    again = evaluate(real(), tmp_path / "empty")
    assert set(again["origin"]) == {"shipped"}
    assert not list((tmp_path / "empty").rglob("*.json"))
    pd.testing.assert_frame_equal(results.drop(columns="origin"), again.drop(columns="origin"))
    for _, row in again.iterrows():
        assert outcomes(row, tmp_path / "empty").tolist() == outcomes(row, tmp_path / "runs").tolist()
    pd.testing.assert_frame_equal(reference("quick")[MEASURED].sort_values("key", ignore_index=True),
                                  results[MEASURED].sort_values("key", ignore_index=True))  # fmt: skip
    assert reference("full").empty


def test_a_reference_can_be_told_which_trained_models_it_is_of(tmp_path, shipping):
    from robustclip.study import shipped

    shipping(real())
    tuned, plain = (dict(record) for record in shipped_records("quick"))
    tuned |= {"checkpoint": "tuned", "provenance": tuned["provenance"] | {"trained by robustclip.training:TeCoA": "0"}}
    shipped.write_cells(tmp_path / "results/quick", map(signed, (tuned, plain)))
    models = {"tuned", plain["checkpoint"]}
    assert set(reference("quick")["checkpoint"]) == models
    assert set(reference("quick", [])["checkpoint"]) == {plain["checkpoint"]}
    assert set(reference("quick", [SimpleNamespace(digest="tuned")])["checkpoint"]) == models
    assert set(reference("quick", [SimpleNamespace(digest="another")])["checkpoint"]) == {plain["checkpoint"]}


def test_seeds_become_one_row_with_an_interval_over_seeds_and_images(tmp_path):
    attacks = {"noise": UniformNoise(eps=0.3), "clean": None}
    results = evaluate(grid("quick", roles=["cifar10"], attacks=attacks, n=20, seeds=[0, 1, 2]), tmp_path)
    found = over_seeds(results, tmp_path)
    noisy = results[results["attack"] == "noise"]
    assert found["attack"].tolist() == ["noise", "clean"]
    assert found["seed"].tolist() == [0, 0]
    assert found["accuracy"].iloc[0] == pytest.approx(noisy["accuracy"].mean())
    assert found["low"].iloc[0] < noisy["accuracy"].mean() < found["high"].iloc[0]
    assert set(found["interval"]) == {"bootstrap (3 seeds)"}
    one = results[results["seed"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(over_seeds(one, tmp_path), one.assign(interval="Wilson"))


def test_fresh_ignores_what_is_shipped(tmp_path, shipping, monkeypatch):
    shipping(real())
    monkeypatch.setenv("ROBUSTCLIP_FRESH", "1")
    assert set(evaluate(real(), tmp_path / "empty")["origin"]) == {"measured"}


def test_stores_of_several_machines_are_merged_and_the_newest_record_counts(tmp_path, shipping):
    shipping(real(n=5), "one")
    _, written = shipping(real(n=6), "two")
    assert written["count"][0] == 4
    _, written = shipping(real(n=6), "two", fresh=True)
    assert written["count"][0] == 2
    before = (tmp_path / "results/quick/cells.parquet").read_bytes()
    shipping(real(n=6), "two", fresh=True)
    assert before == (tmp_path / "results/quick/cells.parquet").read_bytes()


def test_nothing_to_export_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTCLIP_RESULTS", str(tmp_path / "results"))
    with pytest.raises(ValueError, match=r"nothing to export of scale 'quick'.*measure some cells"):
        export("quick", [tmp_path / "none"], tmp_path / "results")


def test_a_damaged_shipped_file_is_noticed(tmp_path, shipping):
    from robustclip.study import shipped

    shipping(real())
    records = [dict(record) for record in shipped_records("quick")]
    records[0]["answers"] = {name: [1 - one for one in part] for name, part in records[0]["answers"].items()}
    shipped.write_cells(tmp_path / "results/quick", records)
    with pytest.raises(OSError, match=r"is damaged.*restore it"):
        evaluate(real(), tmp_path / "empty")


def test_shipped_cells_measured_again_are_compared_answer_by_answer(tmp_path, shipping):
    from robustclip.study import shipped

    shipping(real())
    assert reproduce("quick", store=tmp_path / "again")["flips"].tolist() == [0, 0]
    records = [dict(record) for record in shipped_records("quick")]
    records[0]["answers"] = {name: [1 - one for one in part] for name, part in records[0]["answers"].items()}
    shipped.write_cells(tmp_path / "results/quick", map(signed, records))
    assert sorted(reproduce("quick", store=tmp_path / "again")["flips"].gt(0)) == [False, True]
    assert len(reproduce("quick", (2, 2), tmp_path / "again")) == len(reproduce("quick", (1, 1), count=1)) == 1


def test_a_harmless_change_is_confirmed_and_a_flip_is_not(tmp_path, shipping, monkeypatch):
    shipping(real())
    own, component = provenance.digest, "robustclip.attacks.gradient:PGD"
    monkeypatch.setattr(provenance, "digest", lambda module, name: "new" if name == "PGD" else own(module, name))
    assert sorted(map(is_stale, shipped_records("quick"))) == [False, True]
    found = confirm("quick", tmp_path / "again")
    assert found[["component", "new", "cells", "flips", "confirmed"]].values.tolist() == [
        [component, "new", 1, 0, True]
    ]
    assert not any(map(is_stale, shipped_records("quick")))
    assert not evaluate(real(), tmp_path / "empty")["stale"].any()

    monkeypatch.setattr(provenance, "digest", lambda module, name: "newer" if name == "PGD" else own(module, name))
    perturb = PGD.perturb
    monkeypatch.setattr(PGD, "perturb", lambda *arguments: 1 - perturb(*arguments))
    monkeypatch.setattr(then, "run_then", lambda *_: shipped_records("quick"))  # which answers as shipped
    found = confirm("quick", tmp_path / "again")
    assert found["confirmed"].tolist() == [False]
    assert sorted(map(is_stale, shipped_records("quick"))) == [False, True]


@pytest.mark.parametrize("as_then", [True, False])
def test_flips_of_another_processor_are_told_from_those_of_a_change(tmp_path, shipping, monkeypatch, as_then):
    """Shipped are answers that no code gives here; what counts is whether old and new code agree on this machine."""
    from robustclip.study import shipped

    shipping(real())
    here = {record["key"]: record for record in shipped_records("quick")}
    elsewhere = [dict(record) for record in here.values()]
    for record in elsewhere:
        record["answers"] = {name: [1 - one for one in part] for name, part in record["answers"].items()}
    shipped.write_cells(tmp_path / "results/quick", map(signed, elsewhere))
    own, asked = provenance.digest, []
    monkeypatch.setattr(provenance, "digest", lambda module, name: "new" if name == "PGD" else own(module, name))

    def run_then(commit, *_):
        asked.append(commit)
        found = here.values()
        return found if as_then else [one | {"provenance": {}} for one in found]  # of code that is not the record's

    monkeypatch.setattr(then, "run_then", run_then)
    assert confirm("quick", tmp_path / "again")["confirmed"].tolist() == [as_then]
    assert asked[0] == elsewhere[0]["commit"]


@pytest.mark.slow
@pytest.mark.skipif(not commit(), reason="no checkout: old code is not at hand")
def test_old_code_measures_in_a_checkout_of_its_commit(tmp_path, shipping):
    shipping(real(n=4))
    records = shipped_records("quick")
    cells = [record["made_by"] for record in records]
    again = then.run_then(commit(), then.CELLS, cells, str(tmp_path / "then"))
    assert {one["key"]: one["answers"] for one in again} == {one["key"]: one["answers"] for one in records}
    assert then.run_then("no-commit", then.CELLS, cells, str(tmp_path / "then")) == []


def test_cells_can_be_named_where_the_data_is_not(tmp_path, shipping, monkeypatch):
    from robustclip.study import shipped

    shipping(real())
    known = {"data": {"cifar10/tinyworld": facts("cifar10")}, "models": {}}
    shipped.write_json(tmp_path / "results" / "quick", shipped.KNOWN, known)

    def gone(*arguments, **options):
        raise FileNotFoundError("no data here")

    monkeypatch.setattr(sys.modules["robustclip.study.bench"], "facts", gone)
    monkeypatch.setattr(sys.modules["robustclip.study.bench"], "load_samples", gone)
    assert set(evaluate(real(), tmp_path / "empty")["origin"]) == {"shipped"}
    with pytest.raises(FileNotFoundError, match="no data here"):
        evaluate(real(n=8), tmp_path / "empty")


def test_looking_up_finds_the_rows_of_evaluate_and_measures_nothing(tmp_path, shipping, monkeypatch):
    shipping(real())
    stored = evaluate(real(n=8), tmp_path / "here")
    files = sorted((tmp_path / "here").rglob("*.json"))
    monkeypatch.setattr(sys.modules["robustclip.study.evaluate"], "_measured", None)
    found = look_up([*real(n=7), *real(n=8), *real()], tmp_path / "here")
    assert found["origin"].tolist() == ["stored"] * len(stored) + ["shipped"] * len(real())
    columns = [name for name in found if name != "origin"]
    pd.testing.assert_frame_equal(found[columns][: len(stored)], stored[columns])
    assert look_up(real(n=7), tmp_path / "here").empty
    assert sorted((tmp_path / "here").rglob("*.json")) == files


def test_looking_up_leaves_out_cells_of_data_that_nobody_knows(tmp_path, shipping, monkeypatch):
    shipping(real())

    def gone(role, source):
        raise FileNotFoundError("no data here")

    monkeypatch.setattr(sys.modules["robustclip.study.bench"], "facts", gone)
    assert look_up(real(), tmp_path / "empty").empty


def test_arrays_are_computed_once_and_shipped(tmp_path, shipping):
    calls = []

    def compute():
        calls.append(1)
        return {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}

    options = {"parts": [PGD(eps=0.1)], "compute": compute}
    for store in ("runs", "runs"):
        found = artifact(scale("quick"), "figure", store=tmp_path / store, **options)
    shipping(real())
    other = {"parts": [PGD(eps=0.3)], "compute": lambda: {"b": np.zeros(1, np.float32)}}
    artifact(scale("quick"), "figure", store=tmp_path / "another", **other)
    shipping(real(), "another")  # a machine that has other artifacts only
    again = artifact(scale("quick"), "figure", store=tmp_path / "empty", **options)
    assert len(calls) == 1
    assert np.array_equal(found["a"], again["a"])
    unknown = {"parts": [PGD(eps=0.2)], "compute": compute, "store": tmp_path / "empty"}
    assert artifact(scale("quick"), "figure", **unknown, only_known=True) is None
    assert np.array_equal(artifact(scale("quick"), "figure", **options, only_known=True)["a"], found["a"])
    assert len(calls) == 1
    artifact(scale("quick"), "figure", **unknown)
    assert len(calls) == 2


def test_arrays_of_an_artifact_may_be_parts_of_one(tmp_path):
    both = np.arange(6.0).reshape(2, 3)
    made = {"first": both[0], "again": both[0], "last": both.T[-1]}
    for _ in range(2):  # computed, then stored
        found = artifact(scale("quick"), "parts", [1], lambda: made, store=tmp_path)
        assert {name: array.tolist() for name, array in found.items()} == {
            name: array.tolist() for name, array in made.items()
        }


def test_a_record_holds_everything_needed_to_trust_it(tmp_path):
    (row,) = evaluate(cells(attacks={"Step": Step()}), tmp_path).to_dict("records")
    record = json.loads((tmp_path / "quick" / f"{row['key']}.json").read_text())
    needed = {"cell", "answers", "checkpoint", "data", "classes", "provenance", "commit", "versions", "device"}
    assert needed <= set(record)
    assert len(record["answers"]["right"]) == len(record["answers"]["predicted"]) == 30
    assert "Step(eps=0.05, seed=0)" in record["cell"]["played_by"]
    assert record["checkpoint"] == "fake-0.0"
    assert {"own:Step", "own:FakeClip"} & set(record["provenance"])
    assert "robustclip.models:ZeroShotClassifier" in record["provenance"]


def test_plan_knows_speed_from_trying_then_from_records(tmp_path):
    wanted = cells()
    tried = plan(wanted, tmp_path)
    assert set(tried["estimate"]) == {"measured"}
    assert (tried["seconds"] > 0).all()
    evaluate(wanted, tmp_path)
    assert set(plan(wanted, tmp_path)["estimate"]) == {"records"}


def test_plan_at_paper_scale_touches_nothing(tmp_path):
    costs = plan(grid("paper", roles=["cifar10", "busi"], attacks=["clean", "PGD-10"]), tmp_path)
    assert set(costs["estimate"]) == {"assumed"}
    assert costs["seconds"].gt(0).all()
    first, second = costs[costs["role"] == "cifar10"]["megabytes"]
    assert first > 100
    assert second == 0
    assert costs[costs["role"] == "busi"]["megabytes"].isna().iloc[0]
    assert (costs[costs["role"] == "busi"]["forward"] < costs[costs["role"] == "cifar10"]["forward"].to_numpy()).all()


def test_plan_without_any_speed_says_so(tmp_path):
    costs = plan(grid("photo", {"far": "hf-hub:nobody/nothing"}, ["cifar10"], ["clean"]), tmp_path)
    assert costs["estimate"].tolist() == ["unknown"]
    assert costs["seconds"].isna().all()


def test_the_embedded_model_is_measured_end_to_end(tmp_path):
    results = evaluate(grid("quick", roles=["cifar10"], attacks=["clean", "noise", "PGD-10"], n=40), tmp_path)
    clean, noise, attacked = results["accuracy"]
    assert clean > 50
    assert noise > attacked
    assert attacked < clean - 20
