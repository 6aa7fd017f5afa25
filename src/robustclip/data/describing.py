"""Many texts about a class: its name in templates, its other names, what it is a kind of, what is known about it.

    class_texts("red star", "This is a photo of a red star", 50)

They come from WordNet where it knows the name, else from what Tinyworld says about the words of the name; templates
make up what is missing, so that any class has as many as are wanted.
"""

from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, product

from robustclip.data import grammar, lexicon

TEMPLATES = (  # of our own, in words that both worlds know
    *("a photo of a {}", "a picture of a {}", "a photo of the {}", "this is a {}", "a small photo of a {}"),
    *("a large photo of a {}", "a photo of one {}", "a picture of the {}", "this is a photo of a {}"),
    *("this is a picture of a {}", "there is a {}", "a photo of a {} in the picture", "a photo with a {}"),
    *("here is a {}", "the {} in a photo", "a photo I took of a {}"),
)


@cache
def class_texts(name: str, prompt: str, count: int, told: tuple[str, ...] = ()) -> tuple[str, ...]:
    """`count` different texts about a class, the prompt first, then what is `told` of it.

    Sentences stand behind the prompt, other names in it.
    """
    return tuple(islice(dict.fromkeys(chain([prompt], told, _texts(name, prompt))), count))


def _texts(name: str, prompt: str) -> Iterator[str]:
    """What is known about the class, and then all names in all templates."""
    names = [name, *_other_names(name)]
    yield from (f"{prompt.rstrip('.')}. {sentence}" for sentence in _sentences(name))
    yield from (prompt.replace(name, other) for other in names[1:])
    yield from (template.format(said) for template, said in product(TEMPLATES, names))
    yield from (f"{template.format(name)} and {template.format(name)}" for template in TEMPLATES)
    yield from (f"{first.format(name)}, {second.format(name)}" for first, second in product(TEMPLATES, TEMPLATES))


def _other_names(name: str) -> list[str]:
    """Synonyms and, of names in several words of Tinyworld, the name with one word replaced."""
    known = lexicon.entry(name)
    replaced = [
        " ".join([*words[:place], other, *words[place + 1 :]])
        for words in [name.split()] if not known.synset
        for place, word in enumerate(words) for other in grammar.synonyms(word)
    ]  # fmt: skip
    return [*known.synonyms, *replaced]


def _sentences(name: str) -> Iterator[str]:
    """What WordNet says, or what Tinyworld says about each word of the name."""
    if lexicon.entry(name).synset:
        yield from lexicon.descriptions(name)
        return
    for word in name.split():
        yield from _facts().get(word, ())


@cache
def _facts() -> dict[str, tuple[str, ...]]:
    """Word -> Tinyworld's remark about what it names."""
    forms = {"shape": "{word}, it {fact}.", "color": "{word}, {fact}.", "texture": "{word} {fact}."}
    found = {}
    for attribute, form in forms.items():
        for value, names in enumerate(grammar.words(attribute)):
            fact = grammar.entry(attribute, value)["fact"]
            found |= {
                word: (form.format(word=word, fact=fact),)
                for word in chain(names, grammar.rare_words(attribute)[value])
            }
    return found
