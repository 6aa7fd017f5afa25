"""Attacks and defenses by the names of papers."""

import math

import pytest

from robustclip.attacks import PGD, FeaturePGD
from robustclip.attacks.aware import AIMS, Aware
from robustclip.component import identity
from robustclip.defenses.base import Defense
from robustclip.defenses.cola import COLA
from robustclip.defenses.views import Views
from robustclip.study import grid, scale
from robustclip.study.named import DEFENSES, named_attack, named_defense

KNOWN = {"keep": 0.1, "reverse": 0.3, "cosine": 0.05}
SCALES = ("quick", "full", "photo")
NOT_PIXELS = ("CLIPure", "CLIPureDiff", "TPT", "RTPT")  # whose steps go through features or prompts
GAUGED = {
    "TTC-calibrated": "keep", "TTC-reversed": "reverse", "TTC-zero": "keep", "DOC": "cosine", "SCC-calibrated": "keep",
}  # fmt: skip


# --- defenses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", SCALES)
def test_every_defense_is_there_at_every_scale(chosen):
    found = {name: scale(chosen).defense(name) for name in DEFENSES}
    assert all(isinstance(defense, Defense) for defense in found.values())
    assert scale(chosen).defense("none") is None
    assert not {name for name, defense in found.items() if "lambda" in repr(defense)}


def test_names_stand_for_different_defenses():
    found = {name: str(identity(named_defense(name, 1 / 255, KNOWN))) for name in DEFENSES}
    same = {(one, other) for one in found for other in found if one < other and found[one] == found[other]}
    assert same <= {("TTC", "TTC-pixels")}  # which differ in worlds whose unit is another one


def pixels(value, path=()):
    """Every setting that counts pixels, by its path."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from pixels(part, (*path, name))
    elif path and path[-1] in ("step_size", "radius", "deviation") and isinstance(value, float):
        yield path, value


@pytest.mark.parametrize("name", DEFENSES)
def test_pixels_are_in_units_of_the_reference_budget(name):
    one, three = (identity(named_defense(name, unit, KNOWN)) for unit in (1 / 255, 3 / 255))
    before, after = dict(pixels(one)), dict(pixels(three))
    fixed = {"TTC-pixels": {"radius", "step_size"}, "LPF": {"radius"}}.get(name, set())
    for path, value in before.items():
        of_views = one["class"] == "SelfConsistency" and path == ("deviation",)  # noise of views, not of an attack
        plain = path[-1] in fixed or of_views or one["class"] in NOT_PIXELS
        factor = 1 if plain else 3
        assert math.isclose(after[path], factor * value), path


def test_the_units_of_the_papers_give_the_settings_of_the_papers():
    told = {
        name: named_defense(name, 1 / 255, KNOWN) for name in ("RN", "TTC", "SCC", "Noise anchor", "MAC", "DOC", "HD")
    }
    assert math.isclose(told["RN"].radius, 4 / 255)
    ttc = told["TTC"]
    assert (ttc.steps, ttc.threshold, ttc.beta) == (2, 0.2, 2.0)
    assert math.isclose(ttc.step_size, 1 / 255)
    assert math.isclose(ttc.radius, 4 / 255)
    assert identity(told["SCC"].warmup) == identity(ttc)
    assert math.isclose(told["Noise anchor"].deviation, 8 / 255)
    assert math.isclose(told["MAC"].radius, 8 / 255)
    assert math.isclose(told["DOC"].step_size, 3 / 255)
    assert math.isclose(told["HD"].radius, 4 / 255)


def test_thresholds_are_those_of_the_world():
    for name, field in GAUGED.items():
        defense = named_defense(name, 1 / 255, KNOWN)
        assert getattr(defense, "warmup", defense).threshold == KNOWN[field], name
    chosen = scale("photo")
    assert chosen.defense("TTC-reversed").threshold == chosen.defenses["reverse"]
    assert chosen.defense("TTC-reversed").reverse
    assert chosen.defense("TTC-open").threshold is None


@pytest.mark.parametrize(("name", "field"), GAUGED.items())
def test_a_missing_threshold_says_where_it_comes_from(name, field):
    known = {key: value for key, value in KNOWN.items() if key != field}
    with pytest.raises(ValueError, match=rf"{name} needs \[defenses\] '{field}' .*tools/calibrate.py"):
        named_defense(name, 1 / 255, known)


@pytest.mark.parametrize("name", ["TTCC", "ttc", "", "PGD-10"])
def test_unknown_defenses_are_told_what_there_is(name):
    with pytest.raises(ValueError, match=rf"unknown defense '{name}'; choose one of: RN, .*COLA"):
        scale("quick").defense(name)


def test_colas_differ_in_one_part():
    plain = {"projection": "off", "solver": "independent", "view_weights": "uniform", "text_weights": "uniform"}
    expected = {
        "COLA": COLA(), "COLA-no-projection": COLA(projection="off"), "COLA-random": COLA(projection="random"),
        "COLA-independent": COLA(solver="independent"), "COLA-printed": COLA(view_weights="printed"),
        "COLA-means": COLA(**plain), "COLA-one-view": COLA(**plain, crops=Views(count=1)),
    }  # fmt: skip
    assert {name: named_defense(name, 1 / 255, {}) for name in expected} == expected


def test_defenses_fit_into_a_grid():
    chosen = scale("quick")
    own = {name: chosen.defense(name) for name in DEFENSES}
    cells = grid(chosen, roles=["cifar10"], attacks=["clean"], defenses=own, seeds=(3,))
    assert [cell.defense_name for cell in cells] == list(DEFENSES)
    assert {cell.defense.seed for cell in cells if hasattr(cell.defense, "seed")} == {3}
    assert all(cell.made_by() for cell in cells)


# --- attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "loss"), [("PGD-10:last", "ce"), ("CW-10:last", "margin"), ("PGD-7:last", "ce")])
def test_attacks_of_the_test_time_papers_go_on_to_the_end(name, loss):
    attack = named_attack(name, 6 / 255, {"PGD-10": 3}, seed=5)
    steps = int(name.split("-")[1].split(":")[0])
    assert attack == PGD(eps=6 / 255, steps=steps, step_size=6 / 255, keep="last", stop=False, loss=loss, seed=5)
    assert attack.targets == 0


def test_targeted_attacks_go_to_the_runner_up():
    attack = named_attack("PGD-10:target", 6 / 255, {})
    assert (attack.targets, attack.steps, attack.step_size, attack.keep) == (1, 10, 6 / 255, "last")
    assert not attack.stop


def test_the_label_free_attack_follows_features():
    attack = named_attack("label-free", 6 / 255, {}, seed=2)
    assert isinstance(attack, FeaturePGD)
    assert (attack.eps, attack.steps, attack.seed) == (6 / 255, 10, 2)


@pytest.mark.parametrize("chosen", SCALES)
def test_the_attacker_who_knows_is_there_at_every_scale(chosen):
    found = scale(chosen).attack("aware", seed=1)
    assert isinstance(found, Aware)
    assert (found.eps, found.aims, found.seed) == (scale(chosen).reference_eps, (), 1)
    for aim in AIMS:
        assert scale(chosen).attack(f"aware:{aim}").aims == (aim,)
        assert scale(chosen).attack(f"aware:{aim}").steps == found.steps


def test_steps_of_the_attacker_who_knows_are_the_scales():
    assert named_attack("aware", 0.01, {}).steps == named_attack("aware:gate", 0.01, {}).steps == 50
    assert named_attack("aware", 0.01, {"aware": 7}).steps == named_attack("aware:gate", 0.01, {"aware": 7}).steps == 7


@pytest.mark.parametrize("name", ["aware:", "aware:soft"])
def test_unknown_aims_are_told_what_there_is(name):
    with pytest.raises(ValueError, match=r"unknown aim .*choose one of: plain, guess, smooth"):
        named_attack(name, 0.01, {})


@pytest.mark.parametrize("name", ["PGD-10:first", "PGD-0:last", "CW:last", "label", "Aware", "APGD-CE:last"])
def test_unknown_attacks_are_told_what_there_is(name):
    with pytest.raises(ValueError, match=f"unknown attack '{name}'; choose one of"):
        named_attack(name, 0.01, {})


def test_other_budgets_keep_the_length_of_steps():
    chosen = scale("quick")
    eps = 4 * chosen.reference_eps
    for name in ("PGD-10:last", "CW-10:last", "PGD-10:target"):
        (cell,) = grid(chosen, roles=["cifar10"], attacks=[name], eps=[eps], precision="float32")
        assert cell.attack.eps == pytest.approx(eps)
        assert cell.attack.step_size == chosen.reference_eps
    (cell,) = grid(chosen, roles=["cifar10"], attacks=["aware"], eps=[eps], attackers=["aware"], precision="float32")
    assert (cell.attack.eps, cell.attack.step_size) == (pytest.approx(eps), None)
