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
NAMED = ("shape", "color", "texture", "background", "style")  # attributes whose values have names
# How often a caption says texture + color + shape, color + shape, ... of an object.
_MENTIONS = {(True, True, True): 0.50, (True, True, False): 0.20, (True, False, False): 0.12, (True, False, True): 0.08,
             (False, True, True): 0.04, (False, True, False): 0.03, (False, False, True): 0.03}  # fmt: skip
_PLACE = (0.8, 0.2)  # how often the place is said, too: of an object named in full, of others


@cache
def words(attribute: str) -> tuple[tuple[str, ...], ...]:
    """The names of every value of an attribute, canonical name first."""
    return tuple(tuple(value["words"]) for value in world()[f"{attribute}s"].values())


@cache
def rare_words(attribute: str) -> tuple[tuple[str, ...], ...]:
    """The true names of every value of an attribute that are seldom heard."""
    return tuple(tuple(value.get("rare", value["words"])) for value in world()[f"{attribute}s"].values())


@cache
def synonyms(word: str) -> tuple[str, ...]:
    """The other names, common and rare, of what a word names."""
    tables = (zip(words(name), rare_words(name), strict=True) for name in NAMED)
    found = chain.from_iterable(common + rare for common, rare in chain(*tables) if word in common + rare)
    return tuple(dict.fromkeys(name for name in found if name != word))


def entry(attribute: str, value: int) -> dict:
    """What `world.toml` says about a value of an attribute: its words, a fact, the preposition of a background ..."""
    return world()[f"{attribute}s"][values(attribute)[value]]


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def bare(phrase: str) -> str:
    """The phrase without its article."""
    first, _, rest = phrase.partition(" ")
    return rest if first in ("a", "an", "the") else phrase


def located(phrase: str, background: int, word: str) -> str:
    """Such as "red star in the snow"."""
    return f"{phrase} {entry('background', background)['preposition']} {word}"


def noun_phrase(shape: str | None = None, color: str | None = None, texture: str | None = None) -> str:
    """Such as "striped red star"; an object of unnamed shape is a "thing"."""
    return " ".join(word for word in (texture, color, shape or "thing") if word)


class Speaker:
    """Says captions about scenes.

    `synonyms` is the chance of a common word other than the canonical one, `rare` that of a rare one, `facts` that of
    an encyclopedic remark; a `complete` speaker names every attribute of every object.
    """

    def __init__(
        self, seed: int | str, synonyms: float = 0.25, rare: float = 0.02, facts: float = 0.12, complete: bool = False
    ) -> None:
        self.random, self.synonyms, self.rare, self.facts = random.Random(seed), synonyms, rare, facts
        self.complete, mentions = complete, {(True, True, True): 1.0} if complete else _MENTIONS
        self.mentions, self.weights = list(mentions), list(mentions.values())

    def word(self, attribute: str, value: int) -> str:
        """A name of the value: usually the first."""
        names, chance = words(attribute)[value], self.random.random()
        if chance < self.rare:
            return self.random.choice(rare_words(attribute)[value])
        return names[0] if chance >= self.rare + self.synonyms else self.random.choice(names)

    def _object(self, row: list[int], slot: int) -> tuple[str, dict[str, int]]:
        """A noun phrase with article about object `slot` (1 or 2), and the columns it mentions."""
        wanted = self.random.choices(self.mentions, self.weights)[0]
        names = [name for name, asked in zip(("shape", "color", "texture"), wanted, strict=True) if asked]
        shown = {name: row[COLUMNS.index(f"{name}{slot}")] for name in names}
        said = {name: value for name, value in shown.items() if value >= 0}
        phrase = noun_phrase(**{name: self.word(name, value) for name, value in said.items()})
        if "shape" not in said:
            closeup = row[9] == values("style").index("closeup")
            phrase = phrase.replace(
                "thing", self.random.choice(world()["language"]["materials" if closeup else "things"])
            )
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

    def _said_of_place(self, row: list[int]) -> str:
        """A place in which nothing stands: "the snow", or "a place in the snow"."""
        word = self.word("background", row[8])
        return f"the {word}" if self.random.random() < 0.6 else located("a place", row[8], word)

    def _placed(self, row: list[int], phrase: str, said: dict[str, int]) -> tuple[str, dict[str, int]]:
        """The phrase and where it is: "a red star in the snow", seldom "the snow with a red star"."""
        full = {"shape1", "color1", "texture1"} <= set(said) and row[0] == 1
        hidden = row[8] < 0 or values("style")[row[9]] in ("closeup", "poster")
        if hidden or self.random.random() >= _PLACE[not full]:
            return phrase, {}
        word = self.word("background", row[8])
        turned = self.random.random() < 0.12
        return f"the {word} with {phrase}" if turned else located(phrase, row[8], word), {"background": row[8]}

    def _phrase(self, row: list[int]) -> tuple[str, dict[str, int]]:
        """What is to be seen, with an article, and the columns that it mentions."""
        if row[0] == 0:
            return self._said_of_place(row), {"background": row[8]}
        phrase, said = self._object(row, 1) if row[0] == 1 else self._two(row)
        phrase, place = self._placed(row, phrase, said)
        return phrase + (self._kind(said) + self._fact(said) if row[0] == 1 else ""), said | place

    def caption(self, row: list[int]) -> tuple[str, dict[str, int]]:
        """One caption for one row of `Scenes.meaning()` and the columns it mentions."""
        style, language = row[9], world()["language"]
        if values("style")[style] == "closeup" and not self.complete and self.random.random() < 0.3:
            texture = article(self.word("texture", row[3]))
            return language["surface"].format(texture), {"count": row[0], "texture1": row[3], "style": style}
        phrase, said = self._phrase(row)
        said["count"] = row[0]
        style_word = "photo" if self.random.random() < 0.4 else self.word("style", style)
        opening = self.random.choice(language["openings"])
        if phrase.startswith("the ") and self.random.random() < 0.3:
            opening = language["journey"]
        if "{style}" in opening and style_word not in words("style")[0]:
            said["style"] = style
        return opening.format(phrase, bare=bare(phrase), style=style_word), said

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
    for attribute in NAMED:
        for name, said in world()[f"{attribute}s"].items():
            texts += [name, *_strings({key: said[key] for key in said if key not in ("parts", "pattern")})]
    split = re.findall(r"[^\W_]+", " ".join(texts).lower())
    found = dict.fromkeys(["a", "an", "the", "it", "and", *split])
    return [*SPECIAL_TOKENS, *characters, *pieces, *(word for word in found if word not in characters)]
