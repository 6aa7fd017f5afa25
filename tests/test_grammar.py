"""The language of Tinyworld: captions say what they mean, and the vocabulary covers every word."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drawings
import pretraining
from robustclip.data import grammar, tinyworld
from robustclip.data.grammar import (
    COLUMNS,
    SPECIAL_TOKENS,
    Speaker,
    article,
    noun_phrase,
    rare_words,
    vocabulary,
    words,
)
from robustclip.data.roles import role, role_names
from robustclip.data.tinyworld import ANY, Scenes, world

OBJECT = ("shape", "color", "texture")
RELATIONS = {"above": (0, 1), "over": (0, 1), "below": (0, 2), "under": (0, 2), "left of": (1, 1), "right of": (1, 2)}


def mixed_scenes(seed: int | str, n: int = 128) -> Scenes:
    """Every style, with none, one or two objects where the style allows."""
    random = tinyworld.generator(f"grammar/{seed}")
    style = tinyworld.randint(random, len(tinyworld.values("style")), (n,))
    count = 1 + tinyworld.randint(random, 2, (n,)) * (style != tinyworld.index("style", "closeup"))
    empty = (tinyworld.randint(random, 4, (n,)) == 0) & (style == tinyworld.index("style", "photo"))
    count[empty | (style == tinyworld.index("style", "aerial"))] = 0
    return tinyworld.sample_scenes(random, torch.full((n, 4), ANY), count, style)


def named(attribute: str, text: str, synonyms: bool = True) -> set[int]:
    """Values of the attribute that the text names."""
    found = set()
    everything = zip(words(attribute), rare_words(attribute), strict=True)
    for value, (names, rare) in enumerate(everything):
        for name in {*names, *rare} if synonyms else names[:1]:
            if re.search(rf"\b{name}\b", text):
                found.add(value)
    return found


def parse(text: str, synonyms: bool) -> dict[str, int]:
    """What an independent reader understands: one value a column, from words alone."""
    said: dict[str, int] = {}
    text = re.sub(r"the (\w+) with (an? .*)", r"\2 in the \1", text)  # said the other way around
    text = text.replace("a surface with", "a closeup of")
    for style in named("style", text, synonyms) - {0}:
        said["style"] = style
        for word in words("style")[style]:  # "a texture of ..." is no texture
            text = re.sub(rf"\b{word}\b", "", text, count=1)
    body, *place = re.split(r" (?:in|on) the (?!photo|picture|image)", text)
    relation = re.search(rf" ({'|'.join(RELATIONS)}) ", body)
    if relation:
        said["relation"], first = RELATIONS[relation[1]]
        parts = [body[: relation.start()], body[relation.end() :]]
        objects = parts if first == 1 else parts[::-1]
    else:
        objects = body.split(" and ")
    for slot, phrase in enumerate(objects, start=1):
        for attribute in OBJECT:
            for value in named(attribute, phrase, synonyms):
                assert f"{attribute}{slot}" not in said, f"two values of {attribute} in {phrase!r}"
                said[f"{attribute}{slot}"] = value
    for value in named("background", " ".join(place) if place else text, synonyms):
        said["background"] = value
    return said


# --- captions mean what they say --------------------------------------------------------------------------------------


@pytest.mark.parametrize("synonyms", [0.0, 0.5])
def test_a_reader_understands_what_was_meant(synonyms):
    seen = dict.fromkeys(COLUMNS, 0)
    for seed in range(12):
        texts, meanings = Speaker(seed, synonyms=synonyms, rare=synonyms / 2, facts=0).captions(mixed_scenes(seed))
        for text, meaning in zip(texts, meanings.tolist(), strict=True):
            said = {column: value for column, value in zip(COLUMNS, meaning, strict=True) if value != ANY}
            del said["count"]
            assert parse(text, synonyms > 0) == said, text
            for column in said:
                seen[column] += 1
    assert all(times > 30 for column, times in seen.items() if column != "count"), seen


@given(st.integers(0, 2**20), st.booleans())
@settings(max_examples=15, deadline=None)
def test_captions_are_true_of_their_own_scene(seed, complete):
    scenes = mixed_scenes(seed, 64)
    _, said = Speaker(seed, complete=complete).captions(scenes)
    assert ((said == ANY) | (said == scenes.meaning())).all()
    assert (said[:, 0] == scenes.count).all(), "the number of objects is always said"


def test_complete_speakers_name_everything():
    scenes = mixed_scenes("complete", 256)
    _, said = Speaker("complete", complete=True).captions(scenes)
    meaning = scenes.meaning()
    visible = meaning[:, 1:7] >= 0
    assert torch.equal(said[:, 1:7][visible], meaning[:, 1:7][visible])


def test_most_captions_leave_something_open():
    _, said = Speaker("open").captions(mixed_scenes("open", 512))
    assert 0.2 < (said[:, 2] == ANY).float().mean() < 0.7


def test_facts_are_about_what_was_said():
    """Every remark belongs to a value that the caption mentions of its first object, and adds no meaning."""
    tables = {"shape1": "shapes", "color1": "colors", "texture1": "textures"}
    remarks = 0
    for seed in range(6):
        texts, meanings = Speaker(seed, facts=1.0).captions(mixed_scenes(seed))
        for text, meaning in zip(texts, meanings.tolist(), strict=True):
            for column, table in tables.items():
                for value, entry in enumerate(world()[table].values()):
                    if entry["fact"] in text:
                        remarks += 1
                        assert meaning[COLUMNS.index(column)] == value, text
    assert remarks > 100


def test_scans_have_no_color():
    scenes = mixed_scenes("scan")
    scan = scenes[scenes.style == tinyworld.index("style", "scan")]
    for text in Speaker(1, complete=True, facts=1.0).captions(scan)[0]:
        assert not named("color", text), text


def test_same_seed_same_words():
    scenes = mixed_scenes("same")
    assert Speaker("a").captions(scenes)[0] == Speaker("a").captions(scenes)[0]
    assert Speaker("a").captions(scenes)[0] != Speaker("b").captions(scenes)[0]


def test_kinds_follow_their_shape():
    kinds = world()["language"]["kinds"]
    texts = [
        text
        for seed in range(20)
        for text in Speaker(seed, synonyms=0, rare=0, facts=0).captions(mixed_scenes(seed))[0]
    ]
    typed = [text for text in texts if ", a type of " in text]
    assert len(typed) > 10
    for text in typed:
        before, after = text.split(", a type of ")
        assert any(re.search(rf"\b{shape}\b", before) and after.startswith(kind) for shape, kind in kinds.items()), text


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [("red star", "a red star"), ("orange star", "an orange star"), ("emerald cup", "an emerald cup")],
)
def test_article(phrase, expected):
    assert article(phrase) == expected


def test_noun_phrase():
    assert noun_phrase("star", "red", "striped") == "striped red star"
    assert noun_phrase("star") == "star"
    assert noun_phrase(None, "red") == "red thing"


# --- vocabulary -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return drawings.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def assert_whole_words(tokenizer, texts):
    """No unknown token, no word in pieces, nothing cut off."""
    for text in texts:
        tokens = tokenizer.tokenize(text)
        assert "[UNK]" not in tokens, text
        assert not [token for token in tokens if token.startswith("##")], (text, tokens)
        assert len(tokens) + 2 <= pretraining.CONTEXT, f"{len(tokens) + 2} tokens: {text}"


def test_vocabulary():
    tokens = vocabulary()
    assert tuple(tokens[:5]) == SPECIAL_TOKENS
    assert len(tokens) == len(set(tokens))
    assert all(token == token.lower() for token in tokens[5:])
    assert all(token in tokens for token in "abcxyz0189.,")


def test_words_name_one_thing_only():
    """A word never has two meanings, rare ones included."""
    owners: dict[str, set] = {}
    for attribute in (*OBJECT, "background", "style"):
        for value, names in enumerate(words(attribute)):
            assert len(set(names)) == len(names)
            for name in {*names, *world()[f"{attribute}s"][tinyworld.values(attribute)[value]].get("rare", ())}:
                owners.setdefault(name, set()).add((attribute, value))
    assert not {name for name, owner in owners.items() if len(owner) > 1}
    assert all(" " not in name for name, owner in owners.items() if {attribute for attribute, _ in owner} != {"style"})


def test_captions_are_made_of_whole_words(tokenizer):
    for seed in range(20):
        assert_whole_words(tokenizer, Speaker(seed, synonyms=0.5, facts=0).captions(mixed_scenes(seed))[0])


def test_captions_with_facts_are_never_unknown(tokenizer):
    for seed in range(20):
        for text in Speaker(seed, synonyms=0.5, facts=1.0).captions(mixed_scenes(seed))[0]:
            tokens = tokenizer.tokenize(text)
            assert not [token for token in tokens if token == "[UNK]" or token.startswith("##")], text


@pytest.mark.parametrize("name", role_names())
def test_role_prompts_are_made_of_whole_words(tokenizer, name):
    assert_whole_words(tokenizer, role(name).prompts)


def test_tokens_survive_the_round_trip(tokenizer):
    text = "this is a photo of a striped red star."
    tokens = pretraining.tokenize(tokenizer, [text])
    assert tokens.shape == (1, pretraining.CONTEXT)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True).replace(" .", ".") == text
    assert (tokens[0][tokens[0] < 5] != SPECIAL_TOKENS.index("[UNK]")).all()
    assert grammar.vocabulary()[tokens[0, 1]] == "this"
