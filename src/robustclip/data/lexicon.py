"""What words mean: synonyms, kinds and definitions of class names, from WordNet.

`assets/wordnet.json` is written by `tools/wordnet.py`; its licence lies beside it. Classes that it lacks, such as those
of a set of your own, are known by their name alone: no synonyms, no kinds, nothing to describe.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

KINDS = 5  # hypernyms of an entry


@dataclass(frozen=True)
class Entry:
    """What is known about a class."""

    name: str
    synset: str = ""  # such as "n02121620"; "" if unknown
    synonyms: tuple[str, ...] = ()
    hypernyms: tuple[str, ...] = ()  # what it is a kind of, nearest first
    gloss: str = ""


@cache
def _wordnet() -> dict[str, dict]:
    return json.loads(files("robustclip").joinpath("assets/wordnet.json").read_text(encoding="utf-8"))


def _kinds(synset: str) -> Iterator[str]:
    """The synset and all above it, nearest first."""
    level = [synset] if synset in _wordnet()["synsets"] else []
    seen = set(level)
    while level:
        yield from level
        above = dict.fromkeys(parent for one in level for parent in _wordnet()["synsets"][one][2])
        level = [parent for parent in above if parent not in seen]
        seen.update(level)


@cache
def entry(name: str, data: str = "") -> Entry:
    """What is known about a class; `data` is its data set, where a name means different things in different sets."""
    name, names = name.strip().lower(), _wordnet()["names"]
    if not name:
        raise ValueError(f"name={name!r} is empty; give the name of a class")
    synset = names.get(f"{data}/{name}") or names.get(name, "")
    if not synset:
        return Entry(name)
    words, gloss, _ = _wordnet()["synsets"][synset]
    above = [_wordnet()["synsets"][kind][0][:1] for kind in _kinds(synset) if kind != synset]
    hypernyms = dict.fromkeys(word for words in above for word in words if word != name)
    others = tuple(word for word in words if word != name)
    return Entry(name, synset, others, tuple(hypernyms)[:KINDS], gloss)


@cache
def is_a(synset: str, ancestor: str) -> bool:
    """Whether everything of the first kind is also of the second, as every cat is an animal."""
    return ancestor in _kinds(synset)


@cache
def descriptions(name: str, data: str = "") -> tuple[str, ...]:
    """A handful of English sentences about a class; none for an unknown one."""
    known = entry(name, data)
    told = [f"{known.name}: {known.gloss}."] if known.gloss else []
    told += [f"{known.name}, also called {other}." for other in known.synonyms[:2]]
    told += [f"{known.name}, a kind of {kind}." for kind in known.hypernyms[:2]]
    return tuple(told)


def synonyms(word: str) -> tuple[str, ...]:
    """Other words for a word or a short phrase, in lower case; none if there are none, or if it is unknown."""
    word = word.strip().lower()
    return tuple(_wordnet()["words"].get(word, ())) or (entry(word).synonyms if word else ())
