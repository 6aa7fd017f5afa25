"""The small language of Tinyworld: captions, paraphrases and facts, and the vocabulary that covers them.

A caption mentions some of the attributes of a scene and leaves others open. `caption` returns the words together with
what they mean, in the same ten columns as `Scenes.meaning`, so that training knows which pictures a caption fits.
"""

import random
import re
import string
from collections.abc import Iterator
from functools import cache
from itertools import chain

import torch
from torch import Tensor

from robustclip.data.tinyworld import ANY, Scenes, values, world

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
COLUMNS = ("count", "shape1", "color1", "texture1", "shape2", "color2", "texture2", "relation", "background", "style")
# How often a caption says texture + color + shape, color + shape, ... of an object.
_MENTIONS = {(True, True, True): 0.46, (True, True, False): 0.24, (True, False, False): 0.12, (True, False, True): 0.08,
             (False, True, True): 0.04, (False, True, False): 0.03, (False, False, True): 0.03}  # fmt: skip


@cache
def words(attribute: str) -> tuple[tuple[str, ...], ...]:
    """The names of every value of an attribute, canonical name first."""
    return tuple(tuple(value["words"]) for value in world()[f"{attribute}s"].values())


def entry(attribute: str, value: int) -> dict:
    """What `world.toml` says about a value of an attribute: its words, a fact, the preposition of a background ..."""
    return world()[f"{attribute}s"][values(attribute)[value]]


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def noun_phrase(shape: str | None = None, color: str | None = None, texture: str | None = None) -> str:
    """Such as "striped red star"; an object of unnamed shape is a "thing"."""
    return " ".join(word for word in (texture, color, shape or "thing") if word)


class Speaker:
    """Says captions about scenes.

    `synonyms` is the chance of a word other than the canonical one, `facts` that of an encyclopedic remark; a
    `complete` speaker names every attribute of every object.
    """

    def __init__(self, seed: int | str, synonyms: float = 0.25, facts: float = 0.12, complete: bool = False) -> None:
        self.random, self.synonyms, self.facts = random.Random(seed), synonyms, facts
        mentions = {(True, True, True): 1.0} if complete else _MENTIONS
        self.mentions, self.weights = list(mentions), list(mentions.values())

    def word(self, attribute: str, value: int) -> str:
        """A name of the value: usually the first."""
        names = words(attribute)[value]
        return names[0] if self.random.random() >= self.synonyms else self.random.choice(names)

    def _object(self, row: list[int], slot: int) -> tuple[str, dict[str, int]]:
        """A noun phrase with article about object `slot` (1 or 2), and the columns it mentions."""
        wanted = self.random.choices(self.mentions, self.weights)[0]
        names = [name for name, asked in zip(("shape", "color", "texture"), wanted, strict=True) if asked]
        shown = {name: row[COLUMNS.index(f"{name}{slot}")] for name in names}
        said = {name: value for name, value in shown.items() if value >= 0}
        phrase = noun_phrase(**{name: self.word(name, value) for name, value in said.items()})
        if self.random.random() < 0.5 and "shape" not in said:
            phrase = phrase.replace("thing", "object")
        return article(phrase), {f"{attribute}{slot}": value for attribute, value in said.items()}

    def _two(self, row: list[int]) -> tuple[str, dict[str, int]]:
        """Two noun phrases and their relation, said from either end."""
        (one, said_one), (two, said_two) = self._object(row, 1), self._object(row, 2)
        relation = row[COLUMNS.index("relation")]
        pairs = world()["language"]["relations"]
        forward, backward = pairs[2 * relation], pairs[2 * relation + 1]
        said = said_one | said_two | {"relation": relation}
        if self.random.random() < 0.15:
            del said["relation"]
            return f"{one} and {two}", said
        if self.random.random() < 0.5:
            return f"{one} {self.random.choice(forward)} {two}", said
        return f"{two} {self.random.choice(backward)} {one}", said

    def _fact(self, said: dict[str, int]) -> str:
        """An encyclopedic remark about something already mentioned; it adds no meaning."""
        forms = {"shape": ", it {}", "color": ", {}", "texture": " {}"}
        mentioned = [name for name in forms if f"{name}1" in said]
        if not mentioned or self.random.random() >= self.facts:
            return ""
        name = self.random.choice(mentioned)
        return forms[name].format(entry(name, said[f"{name}1"])["fact"])

    def caption(self, row: list[int]) -> tuple[str, dict[str, int]]:
        """One caption for one row of `Scenes.meaning()` and the columns it mentions."""
        count, background, style = row[0], row[8], row[9]
        name = values("style")[style]
        said = {"count": count}
        if count == 0:
            phrase = f"the {self.word('background', background)}"
            said["background"] = background
        elif count == 2:
            phrase, mentioned = self._two(row)
            said |= mentioned
        else:
            phrase, mentioned = self._object(row, 1)
            said |= mentioned
            phrase += self._kind(said) + self._fact(said)
        if count and background >= 0 and name not in ("closeup", "poster") and self.random.random() < 0.22:
            phrase += f" {entry('background', background)['preposition']} {self.word('background', background)}"
            said["background"] = background
        style_word = self.word("style", style)
        if self.random.random() < 0.4:
            style_word = "photo"
        opening = self.random.choice(world()["language"]["openings"])
        if "{style}" in opening and style_word not in words("style")[0] + words("style")[3]:
            said["style"] = style
        return opening.format(phrase, style=style_word), said

    def _kind(self, said: dict[str, int]) -> str:
        """Ends like ", a type of pet" for some shapes, as the papers' prompt templates have it."""
        if "shape1" not in said or self.random.random() > 0.2:
            return ""
        kind = world()["language"]["kinds"].get(values("shape")[said["shape1"]])
        return f", a type of {kind}" if kind else ""

    def captions(self, scenes: Scenes) -> tuple[list[str], Tensor]:
        """A caption per scene, and (n, 10) what each mentions (`ANY` where it is silent)."""
        pairs = [self.caption(row) for row in scenes.meaning().tolist()]
        meanings = torch.tensor([[said.get(column, ANY) for column in COLUMNS] for _, said in pairs])
        return [text for text, _ in pairs], meanings


def _strings(table: object) -> Iterator[str]:
    """All texts of a table, at any depth."""
    if isinstance(table, str):
        yield table
    elif isinstance(table, dict | list):
        yield from chain.from_iterable(map(_strings, table.values() if isinstance(table, dict) else table))


def vocabulary() -> list[str]:
    """Tokens of the shared word-piece vocabulary: special tokens, single characters and pieces, then every word."""
    characters = list(string.ascii_lowercase + string.digits + string.punctuation)
    pieces = [f"##{character}" for character in string.ascii_lowercase + string.digits]
    texts = [*_strings(world()["language"])]
    for table in ("shapes", "colors", "textures", "backgrounds", "styles"):
        for name, said in world()[table].items():
            texts += [name, *_strings({key: said[key] for key in said if key not in ("parts", "pattern")})]
    split = re.findall(r"[^\W_]+", " ".join(texts).lower())
    found = dict.fromkeys(["a", "an", "the", "it", "and", *split])
    return [*SPECIAL_TOKENS, *characters, *pieces, *(word for word in found if word not in characters)]
