"""Fine-tuned models of a scale: trained once, found again, described, and planned."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from robustclip import models
from robustclip.component import rebuild, settings
from robustclip.data.roles import role
from robustclip.study import (
    evaluate,
    fine_tuned,
    grid,
    is_stale,
    plan_training,
    played_shots,
    scale,
    then,
    training_facts,
    tuned_by_shots,
)
from robustclip.study import trained as module
from robustclip.study.provenance import commit
from robustclip.study.trained import FACTS, Soup, model_name, retrace
from robustclip.training.checkpoint import CHECKPOINT
from robustclip.training.loop import Run

SMALL = """
source = "tinyworld"
reference_eps = "8/255"
images = 12
batch_size = 6
recompute_stale = false
[models]
clip = "tinyworld-clip"
[training]
pictures = 120
updates = 2
batch_size = 8
attack_steps = 1
[training.MMCoA]
rate = 1e-4
"""


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    return scale(str(tmp_path / "small.toml"))


@pytest.fixture
def updates(monkeypatch):
    """Every update that is really computed leaves a mark here."""
    marks, update = [], Run.update
    monkeypatch.setattr(Run, "update", lambda run: (marks.append(run.done), update(run))[1])
    return marks


def test_names():
    assert model_name("MMCoA", "imagenet") == "MMCoA/imagenet"
    assert model_name("MMCoA", "imagenet", 5) == "MMCoA/imagenet-5"


RECIPES = ["TeCoA", "FT-standard"]


def one(small, tmp_path, recipe="FT-standard", **more):
    return fine_tuned(small, [recipe], "cifar10", store=tmp_path, device="cpu", **more)[f"{recipe}/cifar10"]


def test_nothing_is_trained_before_weights_are_needed(small, tmp_path, updates):
    found = fine_tuned(small, [*RECIPES, "MMCoA"], "cifar10", [None, 3], store=tmp_path / "runs", device="cpu")
    assert list(found)[:4] == ["TeCoA/cifar10", "FT-standard/cifar10", "MMCoA/cifar10", "TeCoA/cifar10-3"]
    assert len({model.digest for model in found.values()}) == len(set(found.values())) == 6
    for model in found.values():
        assert json.loads(json.dumps(model.identity)) == model.identity
        assert model.provenance()
        assert not model.finished()
        assert rebuild(settings(model)) == model
    assert not updates
    assert not (tmp_path / "runs").exists()
    again = fine_tuned(small, RECIPES, "cifar10", store=tmp_path / "other", device="cpu")
    assert [model.digest for model in again.values()] == [found[name].digest for name in again]


def test_a_soup_is_the_mean_of_its_members_in_any_order(small, tmp_path, updates):
    members = tuple(fine_tuned(small, [*RECIPES, "FARE"], "cifar10", store=tmp_path, device="cpu").values())
    soup, again = Soup("soup", members), Soup("other name", members[::-1])
    assert soup.digest == again.digest != Soup("two", members[:2]).digest
    assert rebuild(settings(soup)) == soup
    assert soup.base == members[0].base
    assert not updates
    mixed = models.load(os.fspath(soup), device="cpu")
    assert os.fspath(soup) == os.fspath(again)
    states = [models.load(os.fspath(member), device="cpu").network.state_dict() for member in members]
    for name, value in mixed.network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, sum(state[name] for state in states) / 3, rtol=1e-4, atol=1e-6)
    (row,) = evaluate(grid(small, {"soup": soup}, ["cifar10"], ["clean"]), tmp_path, device="cpu").to_dict("records")
    assert not row["stale"]
    with pytest.raises(ValueError, match=r"soup 'none' are none; give at least one"):
        Soup("none", ())


def test_models_are_trained_once_and_described(small, tmp_path, updates):
    found = fine_tuned(small, RECIPES, "cifar10", [None, 3], store=tmp_path, device="cpu")
    folders = {name: os.fspath(model) for name, model in found.items()}
    assert len(set(folders.values())) == 4
    assert len(updates) == 8
    begin = time.perf_counter()
    again = fine_tuned(small, RECIPES, "cifar10", [None, 3], store=tmp_path, device="cpu")
    assert {name: os.fspath(model) for name, model in again.items()} == folders
    assert time.perf_counter() - begin < 2
    facts = training_facts(found.values())
    assert len(updates) == 8
    assert facts["model"].tolist() == list(found)
    assert facts["digest"].tolist() == [model.digest for model in found.values()]
    for (_, fact), folder in zip(facts.iterrows(), folders.values(), strict=True):
        clip = models.load(folder, device="cpu")
        assert fact["checkpoint"] == clip.digest != fact["base"]
        assert (fact["updates"], fact["batch_size"], fact["pictures"]) == (2, 8, 16)
        assert len(fact["losses"]) == 2
        assert fact["losses"] == fact["first_losses"]
        assert fact["forward"] == fact["backward"] == 16 * (2 if "TeCoA" in fact["model"] else 1)
        assert 0 < fact["seconds"] <= fact["wall"] + 0.1
        assert not (Path(folder) / CHECKPOINT).exists()
    assert facts["per_epoch"].tolist() == [120, 120, 30, 30]
    assert facts["base"].unique().tolist() == [models.load(device="cpu").digest]


def test_models_between_the_base_and_a_tuned_one(small, tmp_path, updates):
    """Named without weights, made once from the finished model, and its code is that of the training and the mixing."""
    tuned = one(small, tmp_path)
    half = tuned.between(0.5)
    assert tuned.between(1) == tuned
    assert len({model.digest for model in (tuned, half, tuned.between(0.25))}) == 3
    assert rebuild(settings(half)) == half
    assert not updates
    assert set(half.provenance()) - set(tuned.provenance())
    ends = [models.load(name, "cpu").network.state_dict() for name in ("tinyworld-clip", os.fspath(tuned))]
    mixed = models.load(os.fspath(half), "cpu").network.state_dict()
    for name, value in mixed.items():
        if value.is_floating_point():
            assert torch.allclose(value, (ends[0][name] + ends[1][name]) / 2, atol=1e-6)
    assert any(not torch.equal(*(end[name] for end in ends)) for name in mixed)
    stamp = Path(half).stat().st_mtime_ns
    assert Path(os.fspath(tuned.between(0.5))).stat().st_mtime_ns == stamp
    assert half.facts() == tuned.facts()
    assert len(updates) == 2
    with pytest.raises(ValueError, match="weight=2"):
        tuned.between(2)


def test_updates_follow_the_shots_or_are_equal(small):
    names = ["TeCoA", "MMCoA"]
    own = replace(small, training=small.training | {"shots": {"epochs": 2}, "equal": {"updates": 7}})
    found = tuned_by_shots(own, names, "cifar10", ["1", "5", "50", "full"], seed=3, stages=2)
    assert list(found)[:3] == ["TeCoA 1-shot", "MMCoA 1-shot", "TeCoA 5-shot"]
    assert list(found)[-1] == "MMCoA full"
    assert [model.recipe.shots for model in found.values()] == [1, 1, 5, 5, 12, 12, None, None]  # 12 are all there are
    assert {(model.recipe.seed, model.stages) for model in found.values()} == {(3, 2)}
    pictures = [10 * (model.recipe.shots or 12) for model in found.values()]
    updates = [m.recipe.optimisation.updates_on(count) for m, count in zip(found.values(), pictures, strict=True)]
    assert updates == [-(-2 * count // 8) for count in pictures]
    equal = tuned_by_shots(own, names, "cifar10", ["1", "full"], equal=True)
    assert list(equal)[-1] == "MMCoA full, equal updates"
    assert {model.recipe.optimisation.updates_on(10) for model in equal.values()} == {7}
    assert tuned_by_shots(small, names, "cifar10", ["1"], equal=True) == {}
    assert played_shots("paper", "cifar10", "50") == 50


def test_settings_of_the_scale_reach_the_recipes(small, tmp_path):
    """The scale's table, then the recipe's own one, then what the call says; another seed is another model."""
    recipe = small.recipe("MMCoA", seed=2, rate=3e-5)
    assert (recipe.optimisation.rate, recipe.optimisation.updates, recipe.attack.steps) == (3e-5, 2, 1)
    assert (recipe.seed, recipe.eps) == (2, 8 / 255)
    assert small.recipe("MMCoA").optimisation.rate == 1e-4
    assert small.recipe("TeCoA").optimisation.rate != 1e-4
    assert one(small, tmp_path).digest != one(small, tmp_path, seed=1).digest
    assert one(small, tmp_path).digest != one(small, tmp_path, rate=1e-5).digest
    with pytest.raises(ValueError, match="'speed' does not fit TeCoA"):
        small.recipe("TeCoA", speed=3)


def test_updates_follow_the_shots_or_are_fixed(small, tmp_path):
    """The scale's number of updates is the most there are; set aside, the epochs alone count."""

    def updates(**how):
        found = fine_tuned(small, ["TeCoA"], "cifar10", [1, 2, 12], store=tmp_path, device="cpu", **how).values()
        sizes = {model: len(role("cifar10").classes) * model.recipe.shots for model in found}
        return [model.recipe.optimisation.updates_on(size) for model, size in sizes.items()]

    assert updates() == [2, 2, 2]
    assert updates(epochs=4) == [2, 2, 2]
    assert updates(epochs=4, updates=None) == [5, 10, 60]


@pytest.mark.parametrize("recompute", [False, True])
def test_new_code_trains_anew_only_where_the_scale_says_so(small, tmp_path, updates, monkeypatch, recompute):
    small = replace(small, recompute_stale=recompute)
    first = one(small, tmp_path)
    first.folder()
    assert not first.stale
    monkeypatch.setattr(module, "digests", lambda *parts: {"code": "another"})
    second = one(small, tmp_path)
    assert (second.digest, second.stale) == (first.digest, not recompute)
    assert (second.folder() != first.folder()) == recompute
    assert len(updates) == (4 if recompute else 2)


def test_a_change_that_was_confirmed_makes_no_model_stale(small, tmp_path, monkeypatch):
    tuned = one(small, tmp_path)
    tuned.folder()
    old = tuned.provenance()
    monkeypatch.setattr(module, "digests", lambda *parts: dict.fromkeys(old, "new"))
    assert tuned.stale
    same = {f"trained by {name}": {digest: {"new": "new"}} for name, digest in old.items()}
    monkeypatch.setattr(sys.modules[is_stale.__module__], "confirmed", lambda scale: same)
    assert not tuned.stale


def test_an_interrupted_training_goes_on(small, tmp_path, updates, monkeypatch):
    train = module.train
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda *a, **k: train(*a, **k, every=1))
        patch.setattr(Run, "update", lambda run, update=Run.update: update(run) if not run.done else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one(small, tmp_path).folder()
    assert updates == [0]
    found = one(small, tmp_path).folder()
    assert updates == [0, 1]
    straight = one(small, tmp_path / "other").folder()
    assert models.load(found, device="cpu").digest == models.load(straight, device="cpu").digest


def _train(path, store, results):
    torch.set_num_threads(1)
    update, marks = Run.update, []
    Run.update = lambda run: (marks.append(run.done), update(run))[1]
    found = fine_tuned(scale(path), ["FT-standard"], "cifar10", store=store, device="cpu")
    results.put((str(found["FT-standard/cifar10"].folder()), len(marks)))


def test_two_processes_that_ask_at_once_train_once(small, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = (str(tmp_path / "small.toml"), tmp_path / "runs", results)
    both = [context.Process(target=_train, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    (first, one), (second, two) = results.get(), results.get()
    for process in both:
        process.join()
    assert first == second
    assert sorted([one, two]) == [0, 2]
    assert json.loads((Path(first) / FACTS).read_text())["updates"] == 2


def test_cells_train_a_model_when_they_are_measured_and_not_again(small, tmp_path, updates):
    cells = grid(small, fine_tuned(small, RECIPES, "cifar10", store=tmp_path, device="cpu"), ["cifar10"], ["clean"])
    measured = evaluate(cells, store=tmp_path, device="cpu")
    assert len(updates) == 4
    for folder in (tmp_path / "small" / "models").iterdir():
        shutil.rmtree(folder)
    assert evaluate(cells, store=tmp_path, device="cpu")["accuracy"].tolist() == measured["accuracy"].tolist()
    assert len(updates) == 4


def test_stages_are_kept(small, tmp_path, updates):
    tuned = one(small, tmp_path, stages=2)
    first, last = tuned.stage(1), tuned.stage(2)
    assert (first.digest != tuned.digest, last) == (True, tuned)
    assert os.fspath(first) == f"{tuned.folder()}/stage-1"
    stage = models.load(first.folder(), device="cpu")
    assert stage.digest != models.load(tuned.folder(), device="cpu").digest
    assert first.facts() == tuned.facts()
    one(small, tmp_path, stages=2).folder()
    assert len(updates) == 2


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_damaged_weights_are_noticed(small, tmp_path, how):
    """A flipped bit leaves a file that loads; only its digest tells."""
    path = one(small, tmp_path).folder() / models.WEIGHTS
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.unlink()
    if how == "flipped":
        path.write_bytes(whole)
        models.load(path.parent, device="cpu")
    tuned = one(small, tmp_path)
    for ask in (tuned.folder, tuned.facts, lambda: models.load(tuned, device="cpu")):
        with pytest.raises(OSError, match=rf"its {models.WEIGHTS} was changed or damaged after the training.*mv "):
            ask()


@pytest.mark.parametrize("garbage", ["", "{", "[]", "{}", '{"files": {}}'])
def test_garbage_in_the_facts_is_named(small, tmp_path, garbage):
    path = one(small, tmp_path).folder() / FACTS
    path.write_text(garbage)
    with pytest.raises(OSError, match=rf"cannot use '{path.parent}': its {FACTS} .*Nothing was deleted"):
        one(small, tmp_path).folder()


def test_a_finished_model_is_read_where_nothing_can_be_written(small, tmp_path, monkeypatch):
    folder = one(small, tmp_path).folder()
    for function in ("check_folder", "locked", "write_whole"):
        monkeypatch.setattr(module, function, lambda *a, **k: pytest.fail("wrote"))
    assert one(small, tmp_path).folder() == folder


# --- shipped results --------------------------------------------------------------------------------------------------


def test_facts_come_from_shipped_results_before_a_training(small, tmp_path, updates, monkeypatch):
    facts = one(small, tmp_path).facts()
    monkeypatch.setattr(module, "shipped_models", lambda scale: pd.DataFrame([facts] * (scale == "small")))
    elsewhere = one(small, tmp_path / "elsewhere")
    assert training_facts([elsewhere])["losses"].tolist() == [facts["losses"]]
    assert len(updates) == 2
    assert not (tmp_path / "elsewhere").exists()


def test_identity_is_as_shipped_where_weights_and_pictures_are_missing(small, tmp_path, updates, monkeypatch):
    facts = one(small, tmp_path).facts()
    monkeypatch.setattr(module, "shipped_models", lambda scale: pd.DataFrame([facts]))
    away = replace(small, models={"clip": str(tmp_path / "nothing")}, source="parquet")
    assert one(away, tmp_path).digest == facts["digest"]
    with pytest.raises(FileNotFoundError, match="nothing"):
        one(away, tmp_path, seed=1).digest  # noqa: B018  another model


@pytest.mark.parametrize("recipe", ["FT-standard", "TeCoA"])
def test_retracing_tells_other_training_from_the_same(small, tmp_path, recipe):
    tuned = one(small, tmp_path, recipe)
    facts = tuned.facts()
    assert retrace(tuned, facts["first_losses"])
    assert retrace(tuned, [loss * (1 + 1e-7) for loss in facts["first_losses"]])
    assert not retrace(tuned, [loss * (1 + 1e-5) for loss in facts["first_losses"]])
    assert not retrace(replace(tuned, recipe=replace(tuned.recipe, seed=1)), facts["first_losses"])
    assert not retrace(tuned, None)


@pytest.mark.slow
@pytest.mark.skipif(not commit(), reason="no checkout: old code is not at hand")
def test_the_code_of_a_commit_trains_with_the_losses_it_had(small, tmp_path, monkeypatch):
    """A process of its own runs it; what it told once is what it tells again."""
    tuned, run_then, told = one(small, tmp_path), then.run_then, {}

    def once(*asked):
        key = json.dumps(asked)
        told[key] = told[key] if key in told else run_then(*asked)
        return told[key]

    monkeypatch.setattr(then, "run_then", once)
    (cell,) = grid(small, {"tuned": tuned}, ["cifar10"], ["clean"])
    (first,) = then.run_then(commit(), then.LOSSES, [cell.made_by(), 2])
    assert first["losses"] == pytest.approx(list(tuned.facts()["first_losses"])[:2], rel=1e-4)
    facts = dict(tuned.facts()) | {"commit": commit(), "provenance": first["provenance"]}
    assert then.losses_then(cell.made_by(), facts, 2) == first["losses"]
    assert then.losses_then(cell.made_by(), facts | {"provenance": {}}, 2) is None


def test_plans_count_the_passes_of_an_epoch(small):
    costs = plan_training(small, ["TeCoA", "MMCoA", "FT-standard", "AdvPT"], ["cifar10", "dtd"]).set_index(
        ["role", "recipe"]
    )
    assert costs.loc[("cifar10", "TeCoA"), ["pictures", "forward", "backward"]].tolist() == [120, 240, 240]
    assert costs.loc[("cifar10", "MMCoA"), ["forward", "backward"]].tolist() == [360, 360]
    assert costs.loc[("dtd", "FT-standard"), ["forward", "backward"]].tolist() == [120, 120]
    assert costs.loc[("dtd", "AdvPT"), ["forward", "backward"]].tolist() == [480, 240]
    assert costs["seconds"].isna().all()
    few = plan_training(small, ["TeCoA"], ["cifar10"], shots=5)
    assert few[["pictures", "updates"]].to_numpy().tolist() == [[50, 2]]
    paper = plan_training("paper", ["TeCoA"], ["imagenet"]).iloc[0]
    assert paper["pictures"] == 1_281_167
    assert paper["seconds"] == pytest.approx(1_281_167 * 6 / 1100)
    assert paper["updates"] == -(-10 * 1_281_167 // 256)


def test_a_scale_that_does_not_count_its_pictures_says_so():
    with pytest.raises(ValueError, match=r"scale 'photo' does not say how many pictures cifar10 has; give shots"):
        plan_training("photo", ["TeCoA"], ["cifar10"])
    assert plan_training("photo", ["TeCoA"], ["cifar10"], shots=2)["pictures"].tolist() == [20]
