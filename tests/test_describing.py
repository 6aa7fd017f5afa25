"""Texts about classes of both worlds."""

import pytest

from robustclip import models
from robustclip.data.describing import class_texts
from robustclip.data.roles import role

DRAWN = ("cifar10", "stl10", "food101", "pets", "dtd", "eurosat", "caltech101", "kneexray", "digits", "sun397")
PHOTOGRAPHED = ("airplane", "tench", "carrot cake", "off-center face", "abyssinian cat", "annual crop", "banded")
UNKNOWN = ("flurbelwock", "0", "axis 17", "a {curly} name", "Übergrößenträger", "x" * 200)


def in_prompt(name):
    return name, f"This is a photo of a {name}"


def named(*roles):
    found = [(name, prompt) for one in roles for name, prompt in zip(role(one).classes, role(one).classes.prompts)]  # noqa: B905
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return models.load(device="cpu").tokenizer


@pytest.mark.parametrize("name", [*PHOTOGRAPHED, *UNKNOWN])
@pytest.mark.parametrize("count", [1, 7, 50, 200])
def test_as_many_different_texts_as_wanted(name, count):
    texts = class_texts(*in_prompt(name), count)
    assert len(texts) == len(set(texts)) == count
    assert texts[0] == f"This is a photo of a {name}"
    assert all(isinstance(text, str) for text in texts)


@pytest.mark.parametrize("one", DRAWN)
def test_drawn_classes_have_as_many_different_texts(one):
    for name, prompt in named(one):
        texts = class_texts(name, prompt, 50)
        assert len(set(texts)) == len(texts) == 50
        assert texts[0] == prompt


def test_fewer_are_the_first_of_more():
    name, prompt = in_prompt("tench")
    assert class_texts(name, prompt, 50)[:9] == class_texts(name, prompt, 9)


def test_what_is_told_follows_the_prompt():
    name, prompt = in_prompt("tench")
    told = ("a green fish", "it lives in ponds")
    texts = class_texts(name, prompt, 50, told)
    assert texts[:3] == (prompt, *told)
    assert texts[3:] == class_texts(name, prompt, 48)[1:]
    assert class_texts(name, prompt, 2, told) == (prompt, told[0])
    assert len(set(class_texts(name, prompt, 50, (prompt, "twice", "twice")))) == 50


def test_knowledge_comes_before_templates():
    texts = class_texts(*in_prompt("airplane"), 50)
    assert any("aircraft" in text for text in texts[1:8])
    assert "This is a photo of a aeroplane" in texts[:10]
    name, prompt = named("cifar10")[0]
    assert all(text.startswith(prompt + ". ") for text in class_texts(name, prompt, 4, lexicon="tinyworld")[1:])


def test_every_text_but_sentences_names_the_class():
    for text in class_texts(*in_prompt("flurbelwock"), 200):
        assert "flurbelwock" in text
    for text in class_texts(*in_prompt("axis {0}"), 50):
        assert "axis {0}" in text


def test_a_prompt_that_an_attack_changed_is_kept():
    texts = class_texts("tench", "This is a photo of a ranch", 50)
    assert texts[0] == "This is a photo of a ranch"
    assert len(set(texts)) == 50


def test_texts_are_the_same_again():
    name, prompt = named("cifar10")[1]
    first = class_texts(name, prompt, 50)
    class_texts.cache_clear()
    assert class_texts(name, prompt, 50) == first


@pytest.mark.parametrize("one", DRAWN)
def test_drawn_classes_are_told_in_words_that_the_small_world_knows(one, tokenizer):
    """No word is unknown to its tokenizer, or has to be spelled in pieces that no text it learned from has."""
    strange = {}
    for name, prompt in named(one):
        own = set(tokenizer.tokenizer.tokenize(prompt))
        for text in class_texts(name, prompt, 50, lexicon="tinyworld"):
            tokens = set(tokenizer.tokenizer.tokenize(text)) - own
            if any(token == "[UNK]" or token.startswith("##") for token in tokens):
                strange.setdefault(name, []).append(text)
    assert not strange


@pytest.mark.parametrize("one", DRAWN)
def test_different_texts_are_different_to_the_model(one, tokenizer):
    for name, prompt in named(one):
        texts = class_texts(name, prompt, 50, lexicon="tinyworld")
        tokens = {tuple(row) for row in tokenizer(list(texts)).tolist()}
        assert len(tokens) == len(texts), name


def test_classes_share_no_text():
    texts = [text for pair in named("caltech101") for text in class_texts(*pair, 50)]
    assert len(set(texts)) == len(texts)
