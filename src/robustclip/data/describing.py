"""Many texts about a class: its name in templates, its other names, what it is a kind of, what is known about it.

    class_texts("golden retriever", "a photo of a golden retriever", 50)
    class_texts("red star", "This is a photo of a red star", 50, lexicon="tinyworld")

They come from WordNet, or from what Tinyworld says about the words of the name; templates make up what is missing, so
that any class has as many as are wanted.
"""

from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, product

from robustclip.checks import check_choice
from robustclip.data import grammar
from robustclip.data import lexicon as wordnet

LEXICONS = ("wordnet", "tinyworld")
TEMPLATES = (  # of our own, in words that both worlds know
    *("a photo of a {}", "a picture of a {}", "a photo of the {}", "this is a {}", "a small photo of a {}"),
    *("a large photo of a {}", "a photo of one {}", "a picture of the {}", "this is a photo of a {}"),
    *("this is a picture of a {}", "there is a {}", "a photo of a {} in the picture", "a photo with a {}"),
    *("the {} in a photo", "the {} in the picture", "a photo with one {}"),
)


@cache
def class_texts(
    name: str, prompt: str, count: int, told: tuple[str, ...] = (), lexicon: str = LEXICONS[0]
) -> tuple[str, ...]:
    """`count` texts about a class, different whatever their case: the prompt, what is `told` of it, and the rest.

    Sentences stand behind the prompt, other names in it.
    """
    check_choice("lexicon", lexicon, LEXICONS)
    different: dict[str, str] = {}
    for text in chain([prompt], told, _texts(name, prompt, lexicon)):
        different.setdefault(text.lower(), text)
    found = tuple(islice(different.values(), count))
    if len(found) < count:
        raise ValueError(f"texts={count} is more than can be said of {name!r}; give {len(found)} at most")
    return found


def _texts(name: str, prompt: str, lexicon: str) -> Iterator[str]:
    """What is known about the class, and then all names in all templates."""
    others, sentences = (_from_wordnet if lexicon == "wordnet" else _from_tinyworld)(name)
    names = [name, *others]
    yield from (f"{prompt.rstrip('.')}. {sentence}" for sentence in sentences)
    yield from (prompt.replace(name, other) for other in others)
    yield from (template.format(said) for template, said in product(TEMPLATES, names))
    yield from (f"{first.format(name)} and {second.format(name)}" for first, second in product(TEMPLATES, TEMPLATES))


def _from_wordnet(name: str) -> tuple[list[str], list[str]]:
    """Synonyms, and sentences."""
    return [*wordnet.entry(name).synonyms], [*wordnet.descriptions(name)]


def _from_tinyworld(name: str) -> tuple[list[str], list[str]]:
    """The name with one word replaced, and remarks about its words."""
    words = name.split()
    others = [
        " ".join([*words[:place], other, *words[place + 1 :]])
        for place, word in enumerate(words)
        for other in grammar.synonyms(word)
    ]
    return others, [sentence for word in words for sentence in _facts().get(word, ())]


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
