"""Evaluation: right numbers, right costs, resume, staleness, plans."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pandas as pd
import pytest
import torch

from robustclip.attacks import APGD, FGSM, PGD, AutoAttack, Square, UniformNoise
from robustclip.data.sources import load_samples
from robustclip.models import ZeroShotClassifier
from robustclip.study import Store, evaluate, export, grid, outcomes, plan, reference, scale, store
from robustclip.study.bench import CountingClip
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


def test_undefended_blind_and_aware_are_measured_once(tmp_path):
    results = evaluate(cells(attacks={"Step": Step()}, attackers=["blind", "aware"]), tmp_path)
    assert results["attacker"].tolist() == ["blind", "aware"]
    assert results["key"].nunique() == 1
    assert len(list((tmp_path / "quick").iterdir())) == 1


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

    pd.testing.assert_frame_equal(first, evaluate(cells({"fake": Broken()}), Store(tmp_path)))


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


def test_the_counting_clip_is_otherwise_the_same():
    clip, images = FakeClip(), torch.rand(3, 3, 32, 32)
    counting = CountingClip(clip)
    assert torch.equal(counting.encode_images(images), clip.encode_images(images))
    assert counting.digest == clip.digest
    with pytest.raises(AttributeError, match="nonsense"):
        counting.nonsense  # noqa: B018


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
    assert asked[0].startswith("This is a photo of")
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
    pd.testing.assert_frame_equal(done, evaluate(cells(attacks={"clean": None}), tmp_path))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(cells(), tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="device"):
        evaluate(cells(), tmp_path, device="abacus")
    with pytest.raises(FileNotFoundError, match="no result 'abc'"):
        outcomes({"scale": "quick", "key": "abc"}, tmp_path)


def test_a_corrupt_result_stops_the_run_and_stays(tmp_path):
    evaluate(cells(), tmp_path)
    path = next((tmp_path / "quick").iterdir())
    path.write_text("{")
    with pytest.raises(OSError, match=path.name):
        evaluate(cells(), tmp_path)
    assert path.read_text() == "{"


@pytest.mark.parametrize(("name", "again"), [("quick", True), ("full", False)])
def test_stale_results_are_measured_again_at_quick_and_marked_at_full(tmp_path, monkeypatch, name, again):
    wanted = grid(name, {"fake": FakeClip()}, ["cifar10"], ["clean"], n=5)
    engine = sys.modules["robustclip.study.evaluate"]
    monkeypatch.setattr(engine, "code_digest", lambda: "0ld")
    (old,) = evaluate(wanted, tmp_path)["code"]
    monkeypatch.setattr(engine, "code_digest", store.code_digest)
    assert old == "0ld" != store.code_digest()
    result = evaluate(wanted, tmp_path).loc[0]
    assert (result["code"] == store.code_digest()) == again
    assert result["stale"] != again
    assert scale(name).recompute_stale == again


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
from robustclip.study.store import Entry
from test_study_evaluate import killed_grid, Step

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def after(number, work):  # work, but die in its call of that number
    calls = []
    def counted(*arguments, **options):
        calls.append(1)
        return die() if len(calls) == number else work(*arguments, **options)
    return counted

def half_a_line(entry, batch):
    with entry.part.open("a") as file:
        file.write(json.dumps(batch)[:40])
        file.flush()
    die()

def arm(moment):
    append = Entry.append
    if moment == "attack":
        Step.__call__ = after(6, Step.__call__)
    elif moment == "line":
        Entry.append = lambda entry, batch: half_a_line(entry, batch) if batch["start"] == 8 else append(entry, batch)
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
        left = Store(tmp_path / moment).status()
        assert 0 < len(left) < len(undisturbed), moment
        assert "corrupt" not in set(left["state"]), moment
        again = evaluate(killed_grid(), tmp_path / moment, batch_size=4)
        assert again[MEASURED].equals(undisturbed[MEASURED]), moment
        assert set(Store(tmp_path / moment).status()["state"]) == {"done"}, moment


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
    assert Store(tmp_path).status()[["state", "done"]].to_numpy().tolist() == [["partial", 8]]
    evaluate(wanted, tmp_path, batch_size=5)
    assert seen[3:] == [5, 1]


def test_export_is_tidy_has_provenance_and_reads_back_exactly(tmp_path):
    wanted = cells(roles=["cifar10", "dtd"], n=9)
    results = evaluate(wanted, tmp_path / "runs")
    written = export("quick", tmp_path / "runs", tmp_path / "results")
    assert [path.name for path in written] == ["cifar10.csv", "dtd.csv"]
    before = [path.read_bytes() for path in written]
    again = export("quick", tmp_path / "runs", tmp_path / "results")
    assert before == [path.read_bytes() for path in again]
    back = reference("quick", tmp_path / "results").set_index("key")
    columns = ["role", "attack", "eps", "accuracy", "low", "high", "checkpoint", "code", "device", "date"]
    expected = results.set_index("key").loc[back.index, columns]
    assert back[columns].to_dict("records") == expected.to_dict("records")
    assert export("full", tmp_path / "runs", tmp_path / "results") == []
    with pytest.raises(FileNotFoundError, match="robustclip export --scale full"):
        reference("full", tmp_path / "results")


def test_a_record_holds_everything_needed_to_trust_it(tmp_path):
    (row,) = evaluate(cells(attacks={"Step": Step()}), tmp_path).to_dict("records")
    record = json.loads((tmp_path / "quick" / f"{row['key']}.json").read_text())
    needed = {"cell", "correct", "predicted", "checkpoint", "data", "prompts", "code", "commit", "versions", "device"}
    assert needed <= set(record)
    assert len(record["correct"]) == len(record["predicted"]) == 30
    assert record["cell"]["played_by"] == "Step(eps=0.05, seed=0)"
    assert record["checkpoint"] == "fake-0.0"


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
