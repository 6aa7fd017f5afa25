"""Scales, attacks by name, cells and grids."""

from dataclasses import dataclass, make_dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustclip import _torchvision
from robustclip.attacks import (
    APGD,
    FGSM,
    PGD,
    AutoAttack,
    BertAttack,
    Fast,
    FromTorchattacks,
    SepAttack,
    UniformNoise,
)  # fmt: skip
from robustclip.classes import Classes
from robustclip.data.roles import role_names
from robustclip.defenses.base import as_defense
from robustclip.defenses.broken import Noisy
from robustclip.study import Cell, grid, parse_eps, scale, scale_names, training_seeds
from study_fakes import Darken, FakeClip, Paste, Step

SMALL = """
source = "tinyworld"
reference_eps = "4/255"
images = 30
batch_size = 10
recompute_stale = true
roles = ["cifar10", "dtd"]
role_images = { dtd = 12 }
steps = { "PGD-100" = 3 }
[models]
clip = "tinyworld-clip"
mine = "${MY_CLIP:-runs/mine}"
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


def test_the_four_scales_load_and_know_their_model():
    assert scale_names() == ("full", "paper", "photo", "quick")
    for name in scale_names():
        chosen = scale(name)
        assert chosen.name == name
        assert chosen.model("clip")
        assert set(chosen.roles) <= set(role_names())
        assert scale(chosen) is chosen


def test_quick_is_smaller_than_full_and_both_have_every_role():
    quick, full = scale("quick"), scale("full")
    assert quick.roles == full.roles == role_names()
    assert quick.images < full.images
    assert quick.attack("PGD-100").steps < full.attack("PGD-100").steps == 100
    assert quick.reference_eps == full.reference_eps


def test_the_world_of_photographs_says_what_it_lacks(tmp_path):
    photo, paper = scale("photo"), scale("paper")
    assert {*photo.roles, *photo.missing} == set(role_names())
    assert not set(photo.roles) & set(photo.missing)
    assert photo.role_names("source") == ("cifar10", "cifar100", "tinyimagenet")
    assert [photo.hides("cifar10"), photo.hides("caltech101"), scale("quick").hides("cifar10")] == [True, False, False]
    assert photo.role_names("transfer")[0] == "imagenet"  # which has no training part there
    assert paper.role_names("source") == role_names("source")
    assert (photo.role_names(), paper.missing) == (photo.roles, {})
    with pytest.raises(ValueError, match="unknown group 'sauce'"):
        photo.role_names("sauce")
    with pytest.raises(ValueError, match=r"no set plays role 'cars' at scale 'photo': there is no small copy"):
        grid("photo", roles=["cifar10", "cars"])
    (tmp_path / "own.toml").write_text(SMALL.replace("roles = ", 'world = "photo"\nroles = '))
    assert scale(str(tmp_path / "own.toml")).roles == ("cifar10", "dtd")


@settings(deadline=None)
@given(st.integers(0, 255))
def test_eps_text_is_exact(numerator):
    assert parse_eps(f"{numerator}/255") == numerator / 255
    assert parse_eps(numerator / 255) == numerator / 255
    assert parse_eps(str(float(Fraction(numerator, 255)))) == numerator / 255


@pytest.mark.parametrize("text", ["", "one", "1/0", "8\\255"])
def test_eps_that_is_no_number(text):
    with pytest.raises(ValueError, match=r"eps=.* is not a number; write it like 8/255"):
        parse_eps(text)


def test_attacks_go_by_the_names_of_the_papers(small):
    chosen = scale(small)
    eps = 4 / 255
    assert chosen.attack("clean") is None
    assert chosen.attack("noise", seed=3) == UniformNoise(eps=eps, seed=3)
    assert chosen.attack("FGSM", eps="1/255") == FGSM(eps=1 / 255)
    assert chosen.attack("PGD-100") == PGD(eps=eps, steps=3)
    assert chosen.attack("PGD-37", seed=1) == PGD(eps=eps, steps=37, seed=1)
    assert chosen.attack("CW-10", seed=1) == PGD(eps=eps, steps=10, seed=1, loss="margin")
    assert chosen.attack("CW-100") == PGD(eps=eps, steps=3, loss="margin"), "played by as many steps as PGD-100"
    assert chosen.attack("APGD-T", eps=0.1) == APGD(eps=0.1, steps=100, loss="dlr", targets=9)
    assert chosen.attack("AutoAttack") == AutoAttack(eps=eps, steps=100, queries=5000)
    assert chosen.attack("BERT-Attack") == BertAttack(offset="shifted", end_token=False)
    both = chosen.attack("PGD-100+BERT-Attack-aligned:worst", seed=2)
    assert both == SepAttack(image=PGD(eps=eps, steps=3, seed=2), text=BertAttack(), reading="worst")


def test_budgets_and_seeds_reach_the_parts_of_an_attack():
    names = ["PGD-10+BERT-Attack", "BERT-Attack", "clean"]
    cells = grid("quick", roles=["cifar10"], attacks=names, eps=[0.1, 0.2], seeds=[5])
    assert [cell.attack_name for cell in cells] == [names[0], *names]
    assert [cell.attack and getattr(cell.attack, "image", None) for cell in cells] == [
        PGD(eps=0.1, steps=10, seed=5), PGD(eps=0.2, steps=10, seed=5), None, None,
    ]  # fmt: skip


def test_torchattacks_instances_are_attacks_of_a_grid():
    _torchvision.prepare()
    import torchattacks

    (cell,) = grid("quick", roles=["cifar10"], attacks={"theirs": torchattacks.FGSM(torch.nn.Linear(1, 1), eps=0.03)})
    assert cell.attack == FromTorchattacks(name="FGSM", eps=0.03)
    assert cell.eps == 0.03


@pytest.mark.parametrize(
    "name", ["PGD", "PGD-0", "pgd-10", "Autoattack", "", "PGD-10+PGD-10", "clean+BERT-Attack", "CW-1x"]
)
def test_an_unknown_attack_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown attack.*clean, noise, FGSM, APGD-CE.*PGD-10"):
        scale("quick").attack(name)


@pytest.mark.parametrize("eps", [-0.01, 1.5, "256/255"])
def test_eps_outside_its_range(eps):
    with pytest.raises(ValueError, match=r"eps=.*between 0 and 1"):
        scale("quick").attack("FGSM", eps=eps)
    with pytest.raises(ValueError, match=r"eps=.*between 0 and 1"):
        grid("quick", roles=["cifar10"], eps=[eps])


def test_an_l2_budget_may_exceed_one():
    (cell,) = grid("quick", roles=["cifar10"], attacks={"L2": PGD(eps=0.5, norm="l2")}, eps=[3])
    assert cell.eps == 3


def test_a_scale_of_ones_own(small, monkeypatch):
    chosen = scale(small)
    assert (chosen.name, chosen.images_of("cifar10"), chosen.images_of("dtd")) == ("small", 30, 12)
    assert chosen.model("mine") == "runs/mine"
    monkeypatch.setenv("MY_CLIP", "elsewhere")
    assert chosen.model("mine") == "elsewhere"
    for wrong in (lambda: chosen.model("other"), lambda: chosen.images_of("pets")):
        with pytest.raises(ValueError, match="at scale small"):
            wrong()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('source = "tinyworld"', "", "source missing or unknown"),
        ("images = 30", "images = 30\ncolour = 1", "colour missing or unknown"),
        ('source = "tinyworld"', 'source = "moon"', "unknown source 'moon'"),
        ('"4/255"', '"400/255"', "reference_eps=.*between 0 and 1"),
        ("images = 30", "images = 0", "images of scale small=0"),
        ("dtd = 12", "dtd = -1", "dtd of scale small=-1"),
        ('"PGD-100" = 3', '"PGD-100" = 0', "PGD-100 of scale small=0"),
        ('"PGD-100" = 3', '"PGD100" = 3', "unknown attack 'PGD100'"),
        ("dtd = 12", "pets = 12", "unknown role in role_images of scale small 'pets'"),
        ("recompute_stale = true", 'recompute_stale = "no"', "recompute_stale='no' .*write true or false"),
        ("images = 30", 'images = 30\nprecision = "float8"', "unknown precision 'float8'"),
        ('"dtd"]', '"moon"]', "unknown role 'moon'"),
        ("images = 30", 'images = 30\nworld = "moon"', "unknown world 'moon'; choose one of: tinyworld, photo, paper"),
        ("[models]", "[models", "not valid TOML"),
    ],
)
def test_a_wrong_scale_file_says_what_is_wrong(tmp_path, old, new, message):
    path = tmp_path / "small.toml"
    assert old in SMALL
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError, match=message):
        scale(str(path))


def test_a_missing_scale_lists_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"nowhere.toml.*full, paper, photo, quick"):
        scale("nowhere.toml")
    with pytest.raises(ValueError, match=r"unknown scale 'huge'.*full, paper, photo, quick"):
        scale("huge")


def test_a_grid_has_all_combinations_and_repeats_nothing_clean(small):
    cells = grid(
        small,
        models={"a": FakeClip(), "b": FakeClip(1.0)},
        roles=["cifar10", "dtd"],
        attacks=["clean", "FGSM"],
        defenses={"none": None, "dark": Darken()},
        attackers=["blind", "aware"],
        seeds=[0, 1],
        eps=["1/255", "2/255"],
    )
    clean, attacked = ([cell for cell in cells if (cell.attack is None) == wanted] for wanted in (True, False))
    assert len(clean) == 2 * 2 * 2 * 2  # models, roles, defenses, seeds
    assert len(attacked) == len(clean) * 4  # eps, attackers
    assert len(set(cells)) == len(cells)
    assert {cell.attacker for cell in clean} == {"none"}
    assert {cell.eps for cell in clean} == {0.0}
    assert {cell.eps for cell in attacked} == {1 / 255, 2 / 255}
    assert {cell.n for cell in cells if cell.role == "dtd"} == {12}


def test_seeds_reach_attacks_and_budgets_stay_unless_replaced():
    cells = grid("quick", roles=["cifar10"], attacks={"Step": Step(eps=0.2)}, seeds=[5, 6])
    assert [cell.attack.inner for cell in cells] == [Step(eps=0.2, seed=5), Step(eps=0.2, seed=6)]
    assert "Step(eps=0.2, seed=5)" in cells[0].describe()["played_by"]


def test_every_role_with_classes_by_default():
    assert {cell.role for cell in grid("quick")} == set(role_names()) - set(role_names("retrieval"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"roles": ["cifar11"]}, "unknown role to classify at scale quick 'cifar11'.*cifar10"),
        ({"roles": ["coco"]}, "unknown role to classify at scale quick 'coco'"),
        ({"task": "retrieve"}, "unknown role to retrieve at scale quick 'cifar10'.*coco"),
        ({"task": "guess"}, "unknown task 'guess'"),
        ({"models": ["clap"]}, "unknown model at scale quick 'clap'.*clip"),
        ({"attacks": ["PDG"]}, "unknown attack 'PDG'"),
        ({"attackers": ["psychic"]}, "unknown attacker 'psychic'.*blind, aware"),
        ({"n": 0}, "n=0"),
        ({"n": -5}, "n=-5"),
        ({"n": "many"}, "n='many'"),
        ({"eps": [2]}, "eps=2.0"),
        ({"eps": ["x"]}, "eps='x'"),
        ({"template": "a photo"}, "template='a photo' has no {}"),
        ({"scale": "huge"}, "unknown scale 'huge'"),
        ({"defenses": {"TTE": None}}, "defense 'TTE' is None; give the defense itself, or call it 'none'"),
    ],
)
def test_a_wrong_grid_is_refused_before_any_work(wrong, message):
    with pytest.raises(ValueError, match=message):
        grid(**{"scale": "quick", "roles": ["cifar10"]} | wrong)


def test_an_attack_must_show_its_settings():
    @dataclass(frozen=True, repr=False)
    class Secret:
        eps: float = 0.1

    with pytest.raises(ValueError, match="frozen dataclass"):
        grid("quick", roles=["cifar10"], attacks={"secret": Secret()})


STAR, MOON = (Classes(("one",), (prompt,)) for prompt in ("a star", "a moon"))


def test_a_key_changes_with_everything_that_matters_and_nothing_else():
    cell, other = grid("quick", {"a": None, "b": None}, ["cifar10"], ["PGD-10"], [Darken()])
    key = cell.key("weights", "pixels", STAR, {})
    assert key == other.key("weights", "pixels", STAR, {})  # a model's name is not the model
    assert key == replace(cell, scale=scale("full")).key("weights", "pixels", STAR, {})  # nor the scale what it says
    changed = [
        cell.key("other", "pixels", STAR, {}),
        cell.key("weights", "other", STAR, {}),
        cell.key("weights", "pixels", MOON, {}),
        cell.key("weights", "pixels", Classes(("two",), ("a star",)), {}),
        cell.key("weights", "pixels", Classes(("one",), ("a star",), (("bright",),)), {}),
        *(
            replace(cell, **{name: value}).key("weights", "pixels", STAR, {})
            for name, value in [
                ("role", "dtd"),
                ("task", "retrieve"),
                ("attack", None),
                ("attack", replace(cell.attack, steps=11)),
                ("attack", replace(cell.attack, eps=0.5)),
                ("attacker", "aware"),
                ("defense", None),
                ("defense", as_defense(Darken(factor=0.1))),
                ("n", 7),
                ("seed", 1),
            ]
        ),
    ]
    assert len({key, *changed}) == len(changed) + 1


def test_a_changed_default_changes_the_key(monkeypatch):
    (cell,) = grid("quick", roles=["cifar10"], attacks={"PGD": PGD(eps=0.1)})
    before = cell.key("w", "d", STAR, {})
    changed = make_dataclass("PGD", [("steps", int, 21)], bases=(PGD,), frozen=True, kw_only=True)
    assert replace(cell, attack=changed(eps=0.1)).key("w", "d", STAR, {}) != before


def test_auto_is_resolved_before_it_enters_a_key():
    (cell,) = grid("quick", roles=["cifar10"], attacks=["BERT-Attack"])
    named = replace(cell, attack=replace(cell.attack, language_model="tinyworld-mlm"))
    resolve = {"language_model": lambda name: {"auto": "a digest", "tinyworld-mlm": "a digest"}[name]}
    assert cell.key("w", "d", STAR, resolve) == named.key("w", "d", STAR, resolve)
    assert cell.key("w", "d", STAR, {"language_model": lambda name: "other"}) != cell.key("w", "d", STAR, resolve)


def test_patches_that_print_alike_are_different_cells():
    patches = torch.zeros(2, 3, 32, 32)
    patches[1, 0, 16, 16] = 1
    first, second = grid("quick", roles=["cifar10"], attacks={str(k): Paste(patch=patches[k]) for k in (0, 1)})
    assert repr(first.attack) == repr(second.attack)
    assert first.key("w", "d", STAR, {}) != second.key("w", "d", STAR, {})


def test_without_a_defense_both_attackers_are_one_cell():
    blind, aware = grid("quick", roles=["cifar10"], attacks=["FGSM"], attackers=["blind", "aware"])
    assert blind.key("w", "d", STAR, {}) == aware.key("w", "d", STAR, {})


def test_a_cell_is_made_again_from_json(small):
    import json

    cells = grid(small, roles=["cifar10"], attacks=["clean", "PGD-100+BERT-Attack", "AutoAttack"], defenses=[Noisy()])
    for cell in cells:
        assert Cell.again(json.loads(json.dumps(cell.made_by()))) == cell


def test_cells_of_loaded_models_and_of_scripts_cannot_be_made_again():
    (loaded,) = grid("quick", {"fake": FakeClip()}, ["cifar10"], ["clean"])
    (patch,) = grid("quick", roles=["cifar10"], attacks={"patch": Paste(patch=torch.zeros(2))})
    assert loaded.made_by() is patch.made_by() is None


def test_the_precision_of_a_scale_is_that_of_its_attacks(tmp_path):
    path = tmp_path / "half.toml"
    path.write_text('precision = "bfloat16"\n' + SMALL)
    clean, image, both, text = grid(
        str(path), roles=["dtd"], attacks=["clean", "FGSM", "PGD-10+BERT-Attack", "BERT-Attack"]
    )
    assert clean.attack is None
    assert image.attack == Fast(attack=FGSM(eps=4 / 255))
    assert both.attack.image.inner == PGD(eps=4 / 255, steps=10)
    assert both.attack != scale(str(path)).attack("PGD-10+BERT-Attack")
    assert text.attack == scale(str(path)).attack("BERT-Attack")


def test_sizes_of_tables_are_those_of_the_scale_unless_said(tmp_path):
    path = tmp_path / "sized.toml"
    path.write_text(SMALL + "[sizes]\n'mmcoa/I' = 7\n")
    chosen = scale(str(path))
    assert [chosen.size("mmcoa/I"), chosen.size("mmcoa/I", 3), chosen.size("mmcoa/II")] == [7, 3, 30]


def test_training_seeds_of_a_table_are_those_of_the_scale_unless_said(tmp_path):
    path = tmp_path / "seeded.toml"
    path.write_text("seeds = 2\n" + SMALL + "[sizes]\n'mmcoa/I seeds' = 3\n")
    assert [training_seeds(scale(str(path)), table) for table in ("mmcoa/I", "mmcoa/II")] == [3, 2]
