"""What words mean: the shipped lexicon, and the tool that writes it from a WordNet folder."""

import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import wordnet
from robustclip.data import lexicon
from robustclip.data.lexicon import Entry, descriptions, entry, is_a, synonyms

ANIMAL, CARNIVORE, FELINE, PLANT = "n00015388", "n02075296", "n02120997", "n00017222"
CLASSES = {
    "cifar10": "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck",
    "cifar100": "aquarium fish, bridge, can, keyboard, maple tree, plain, plate, ray, sweet pepper, turtle, worm",
    "tiny-imagenet": "goldfish, bannister, cash machine, computer keyboard, ice lolly, plate, pop bottle, alp, acorn",
    "imagenet-samples": "ram (adult male sheep), baluster / handrail, geoffroy's spider monkey, tea cup, mountain",
    "caltech101": "centered face, garfield (cartoon cat), sea horse, yin and yang symbol, wild cat, wrench",
    "flowers102": "colt's foot, bishop of llandaff, lotus, black-eyed susan",
    "dtd": "banded, blotchy, braided, bubbly, bumpy, chequered, cobwebbed, cracked, crosshatched, crystalline",
    "scenes15": "inside city, living room, office, open country, store, tall building",
    "eurosat": "annual crop, industrial, sea or lake",
    "covid-xray": "covid-19, no finding, pneumonia",
}
EVERY = [(data, name) for data, names in CLASSES.items() for name in names.split(", ")]


@pytest.fixture(scope="module")
def table() -> dict[str, dict]:
    return json.loads(files("robustclip").joinpath("assets/wordnet.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("data", "name"), EVERY)
def test_classes_of_the_data_sets_are_known(data, name):
    known = entry(name, data)
    assert known.name == name
    assert known.synset
    assert known.gloss
    assert descriptions(name, data)


@pytest.mark.parametrize("kind", [ANIMAL, CARNIVORE, FELINE])
def test_a_cat_is_a(kind):
    assert is_a(entry("cat").synset, kind)


@pytest.mark.parametrize(
    ("name", "kind"), [("cat", PLANT), ("bus", ANIMAL), ("mouse", FELINE), ("car", entry("bus").synset)]
)
def test_what_things_are_not(name, kind):
    assert not is_a(entry(name).synset, kind)


def test_everything_is_of_its_own_kind():
    assert is_a(entry("cat").synset, entry("cat").synset)
    assert not is_a(ANIMAL, entry("cat").synset)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ray", "fish"),
        ("seal", "mammal"),
        ("bass", "fish"),
        ("mouse", "rodent"),
        ("crab", "crustacean"),
        ("orange", "fruit"),
        ("sweet pepper", "vegetable"),
        ("table", "furniture"),
        ("turtle", "reptile"),
        ("whale", "mammal"),
        ("emu", "bird"),
        ("wrench", "tool"),
        ("tacos", "food"),
        ("off-center face", "person"),
        ("bengal cat", "cat"),
    ],
)
def test_the_sense_is_that_of_the_pictures(name, kind):
    assert kind in entry(name).hypernyms


def test_one_name_may_mean_two_things():
    assert "tableware" in entry("plate", "cifar100").hypernyms
    assert "food" in entry("plate", "tiny-imagenet").hypernyms


def test_kinds_are_nearest_first_and_not_vague():
    assert entry("cat").hypernyms == ("feline", "carnivore", "mammal", "animal")
    assert not {"entity", "object", "whole", "artifact"} & {kind for _, name in EVERY for kind in entry(name).hypernyms}


def test_synonyms_are_plain_words_for_nothing_else(table):
    known = [entry(name.rpartition("/")[2], name.rpartition("/")[0]) for name in table["names"]]
    for one in known:
        assert one.name not in one.synonyms
        assert len(set(one.synonyms)) == len(one.synonyms)
        assert all(word.isascii() and word == word.lower() and "_" not in word for word in one.synonyms)
        assert all(entry(word).synset in ("", one.synset) for word in one.synonyms)


def test_template_words_have_synonyms():
    assert {"picture", "photograph", "image"} <= set(synonyms("Photo"))
    assert "kind" in synonyms("type")
    assert synonyms(" Automobile ") == ("car", "auto", "motorcar")


@pytest.mark.parametrize("word", ["", "of", "xyzzy", "a photo of"])
def test_unknown_words_have_no_synonyms(word):
    assert synonyms(word) == ()


def test_unknown_classes_are_known_by_name_alone():
    assert entry(" Zaphod ") == Entry("zaphod")
    assert descriptions("zaphod") == ()
    assert not is_a("", ANIMAL)


def test_empty_names_are_refused():
    with pytest.raises(ValueError, match="give the name of a class"):
        entry(" ")


def test_descriptions_are_about_the_class():
    texts = descriptions("cat")
    assert "cat, a kind of feline." in texts
    assert all(text.startswith("cat") and text.endswith(".") for text in texts)
    assert len(set(texts)) == len(texts) <= 5


def test_the_licence_travels_along():
    notice = files("robustclip").joinpath("assets/wordnet-license.txt").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice
    assert not re.search(r"^\s*\d", notice, re.MULTILINE)


def test_the_table_is_closed(table):
    synsets = table["synsets"]
    assert set(table["names"].values()) <= set(synsets)
    assert {parent for _, _, parents in synsets.values() for parent in parents} <= set(synsets)


# --- the tool ---------------------------------------------------------------------------------------------------------

LICENCE = "  1 Free to use.  \n  2   \n  3 Even so.  \n"
NOUNS = """\
00000001 03 n 01 thing 0 000 | that which is  
00000002 05 n 02 beast 0 Animal 0 001 @ 00000001 n 0000 | it moves; "a beast"  
00000003 05 n 03 cat 0 true_cat 0 Felis_catus 0 001 @ 00000002 n 0000 | a beast (small) that purrs; "a cat"  
00000004 18 n 02 cat 0 gossip 0 001 @ 00000001 n 0000 | somebody who talks  
00000005 05 n 02 lynx 0 true_cat 0 002 @ 00000002 n 0000 ~ 00000003 n 0000 | a beast with tufted ears  
"""  # noqa: W291 (as the database has it)
ADJECTIVES = "00000009 00 s 02 bumpy 0 rough(a) 0 001 & 00000008 a 0000 | full of bumps  \n"
NOUN_INDEX = """\
animal n 1 1 @ 1 0 00000002
beast n 1 1 @ 1 0 00000002
cat n 2 1 @ 2 1 00000003 00000004
felis_catus n 1 1 @ 1 0 00000003
gossip n 1 1 @ 1 0 00000004
lynx n 1 1 @ 1 0 00000005
true_cat n 2 2 @ ~ 2 0 00000005 00000003
"""
ADJECTIVE_INDEX = "bumpy a 1 1 & 1 0 00000009\nrough a 1 1 & 1 0 00000009\n"
SENSES = """
vague = ["thing"]
[senses]
"zoo/puss" = "cat"
"bumpy" = "a:bumpy"
[cut]
[wrong]
"beast" = ["animal"]
[glosses]
"lynx" = "a cat of the woods"
[words]
"moving" = ["beast"]
[own]
"tom (cartoon cat)" = { kinds = ["cat"], gloss = "a cat that is drawn" }
"""


@pytest.fixture
def built(tmp_path):
    """Builds a lexicon from a tiny database and the class names of some sets."""

    def build(**sets: list[str]) -> wordnet.Lexicon:
        for name, text in {"data.noun": NOUNS, "data.adj": ADJECTIVES, "index.noun": NOUN_INDEX}.items():
            (tmp_path / name).write_text(LICENCE + text)
        (tmp_path / "index.adj").write_text(LICENCE + ADJECTIVE_INDEX)
        for name, classes in sets.items():
            folder = tmp_path / "data" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "classes.json").write_text(json.dumps(classes))
            if name == "zoo":
                (folder / "wnids.json").write_text(json.dumps(["n00000004" for _ in classes]))
        database = wordnet.Database(tmp_path)
        return wordnet.build(database, tmp_path / "data", tomllib.loads(SENSES))

    return build


def test_names_become_synsets(built):
    made = built(some=["cats", "bumpy", "tom (cartoon cat)", "lynx"], zoo=["puss", "cat"])
    assert made.names["cats"] == "n00000003"
    assert made.names["bumpy"] == "a00000009"
    assert made.names["puss"] == "n00000003"
    assert made.names["cat"] == "n00000004"
    assert made.synsets["tom (cartoon cat)"] == [[], "a cat that is drawn", ["n00000003"]]
    assert made.unknown == []


def test_sets_that_mean_different_things_are_told_apart(built):
    made = built(zoo=["lynx", "bumpy"], some=["lynx", "bumpy"])
    assert made.names == {"lynx": "n00000004", "bumpy": "a00000009", "zoo/bumpy": "n00000004"} | {
        "tom (cartoon cat)": "tom (cartoon cat)"
    }


def test_synsets_say_what_the_database_says(built):
    made = built(some=["cat", "lynx", "bumpy"])
    assert made.synsets["n00000003"] == [["cat", "felis catus"], "a beast that purrs", ["n00000002"]]
    assert made.synsets["n00000005"] == [["lynx", "true cat"], "a cat of the woods", ["n00000002"]]
    assert made.synsets["a00000009"] == [["bumpy", "rough"], "full of bumps", []]
    assert made.synsets["n00000002"] == [["beast"], "", ["n00000001"]]
    assert made.synsets["n00000001"] == [[], "", []]
    assert made.words() == {"moving": ["beast"]}


@pytest.mark.parametrize("classes", [["cat", "lynx", "true cat"], ["cat", "lynx"]])
def test_a_word_of_two_classes_belongs_to_one(built, classes):
    made = built(some=classes)
    assert [synset for synset, (words, *_) in made.synsets.items() if "true cat" in words] == ["n00000005"]


def test_writing_twice_gives_the_same_bytes(built):
    assert built(some=["lynx", "cat"]).text() == built(some=["cat", "lynx"]).text()
    assert set(json.loads(built(some=["cat", "lynx"]).text())) == {"names", "synsets", "words"}


def test_the_licence_is_copied_without_its_numbers(built):
    assert built(some=["lynx"]).database.licence == "Free to use.\n\nEven so.\n"


def test_names_that_wordnet_lacks_are_told(built):
    assert built(some=["lynx", "blorb"]).unknown == ["some/blorb"]


def test_folders_without_a_database_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.noun"):
        wordnet.Database(tmp_path)


def test_long_glosses_end_after_a_clause(built):
    database = built(some=["lynx"]).database
    database.synsets["n00000009"] = "00000009 05 n 00 | " + "a beast of many words, " * 20
    assert database.gloss("n00000009").endswith("a beast of many words")
    assert len(database.gloss("n00000009")) <= wordnet.LONGEST


def test_senses_file_is_in_order():
    senses = tomllib.loads(Path(wordnet.SENSES).read_text(encoding="utf8"))
    assert senses["vague"] == sorted(senses["vague"])
    assert all(set(own) == {"kinds", "gloss"} for own in senses["own"].values())
    assert not set(senses["own"]) & set(senses["senses"])


def test_kinds_of_a_loop_end(monkeypatch):
    monkeypatch.setattr(lexicon, "_wordnet", lambda: {"synsets": {"a": [[], "", ["b"]], "b": [[], "", ["a"]]}})
    assert is_a("a", "b")
    assert not is_a("a", "c")
