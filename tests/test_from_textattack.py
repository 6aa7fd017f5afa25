"""TextAttack as a reference and a door: the same swaps as ours, its recipes on prompts, no traces in the process."""

import logging
import os
import random
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from robustclip import models
from robustclip.attacks.from_textattack import FromTextAttack, ReferenceBertAttack, import_textattack
from robustclip.attacks.text import BertAttack, TextAttack, stop_words
from robustclip.data.roles import role


def process_state() -> dict:
    """What an import should leave alone."""
    return {
        "environment": {name: os.environ[name] for name in os.environ if not name.startswith("KMP_")},
        "level": logging.root.manager.disable,
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # noqa: NPY002
    }


@pytest.fixture(scope="module")
def first_import(tmp_path_factory):
    """Imports TextAttack in an empty home, without network; the process before and after."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("TextAttack reached for the network"))
        before = process_state()
        import_textattack()
        after = process_state()
    return before, after, home


@pytest.fixture(scope="module")
def clip(first_import):
    return models.load(device="cpu")


def changed(before: str, after: str) -> list[int]:
    pairs = zip(before.split(" "), after.split(" "), strict=True)
    return [place for place, (one, two) in enumerate(pairs) if one != two]


# --- the import -------------------------------------------------------------------------------------------------------


def test_importing_textattack_leaves_no_traces(first_import):
    before, after, home = first_import
    assert after["environment"] == before["environment"]
    assert after["random"] == before["random"]
    assert after["level"] == before["level"]
    assert not (home / ".cache" / "textattack").exists()
    assert not (home / "nltk_data").exists()
    assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)


def test_caches_of_other_libraries_stay_where_they_were(first_import):
    import datasets
    import huggingface_hub
    import matplotlib

    folders = (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE, matplotlib.get_cachedir())
    assert not any(part.startswith("robustclip-") for folder in folders for part in Path(folder).parts)


def test_the_import_happens_once_and_finds_our_stop_words(first_import):
    import nltk

    assert import_textattack() is import_textattack()
    assert set(nltk.corpus.stopwords.words("english")) == stop_words()


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("cifar10", 10), ("cifar100", 100), ("tinyimagenet", 60)])
def test_the_same_swaps_as_textattack(clip, name, count):
    prompts = role(name).prompts[:count]
    ours = BertAttack()(clip, prompts)
    assert ReferenceBertAttack()(clip, prompts) == ours
    assert all(len(changed(*pair)) == 1 for pair in zip(prompts, ours, strict=True))


@pytest.mark.parametrize("settings", [{"objective": "cosine"}, {"candidates": 3}], ids=str)
def test_the_same_swaps_under_other_settings_and_with_capitals(clip, settings):
    prompts = [prompt.title() for prompt in role("cifar100").prompts[:20]]
    assert ReferenceBertAttack(**settings)(clip, prompts) == BertAttack(**settings)(clip, prompts)


def test_differences_to_textattack_are_words_with_punctuation(clip):
    prompts = [*role("food101").prompts[:4], *(f"A photo of a cup, {color}." for color in ("red", "blue", "green"))]
    ours, theirs = BertAttack()(clip, prompts), ReferenceBertAttack()(clip, prompts)
    differing = [row for row, prompt in enumerate(prompts) if ours[row] != theirs[row]]
    assert 0 < len(differing) < len(prompts)
    for row in differing:
        pairs = zip(prompts[row].split(" "), ours[row].split(" "), strict=False)
        assert next(before for before, after in pairs if before != after).endswith((",", "."))


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["DeepWordBugGao2018", "Pruthi2019"])
def test_recipes_misspell_one_word_of_each_prompt(clip, recipe):
    prompts = role("cifar10").prompts[:4]
    attack = FromTextAttack(recipe=recipe)
    state = process_state()
    attacked = attack(clip, prompts)
    assert process_state() == state
    for before, after in zip(prompts, attacked, strict=True):
        ((place,),) = [changed(before, after)]
        old, new = before.split(" ")[place], after.split(" ")[place]
        assert old.lower() not in stop_words()
        assert abs(len(old) - len(new)) <= 1
        assert len(set(old) & set(new)) >= len(set(old)) - 1
    moved = (clip.encode_texts(prompts) * clip.encode_texts(attacked)).sum(1)
    assert (moved < 0.999).all()


def test_what_happens_to_a_prompt_depends_on_it_and_the_seed_only(clip):
    prompts = role("cifar100").prompts[:12]
    attacked = FromTextAttack()(clip, prompts)
    assert FromTextAttack()(clip, [prompts[5], prompts[2], prompts[5]]) == [attacked[5], attacked[2], attacked[5]]
    assert FromTextAttack(seed=1)(clip, prompts) != attacked


def test_two_words_are_two_words(clip):
    prompts = role("cifar10").prompts[:3]
    attacked = FromTextAttack(words=2)(clip, prompts)
    assert [len(changed(*pair)) for pair in zip(prompts, attacked, strict=True)] == [2, 2, 2]


@pytest.mark.parametrize("attack", [FromTextAttack(), ReferenceBertAttack()], ids=repr)
def test_texts_without_anything_to_change_come_back(clip, attack):
    assert attack(clip, []) == []
    assert attack(clip, ["this is of the", "This Is"]) == ["this is of the", "This Is"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"recipe": "TextBuggerLi2018"},
            "unknown recipe 'TextBuggerLi2018'; choose one of: DeepWordBug",
        ),
        ({"words": 0}, "words=0 is not allowed"),
        ({"seed": -1}, "seed=-1 is not allowed"),
        ({"objective": "l2"}, "unknown objective 'l2'"),
    ],
)
def test_invalid_settings_name_value_and_range(settings, message):
    with pytest.raises(ValueError, match=message):
        FromTextAttack(**settings)


@pytest.mark.parametrize("attack", [FromTextAttack(recipe="Pruthi2019", seed=3), ReferenceBertAttack(candidates=4)])
def test_repr_pastes_back(attack):
    assert eval(repr(attack)) == attack
    assert isinstance(attack, TextAttack)
