"""Classes: names, prompts and descriptions of what a classifier chooses between."""

import pytest

from robustclip.classes import Classes
from robustclip.data.roles import role
from robustclip.data.sources import load_samples

TWO = Classes(("star", "disc"), ("a star", "a disc"), (("five points",), ()))


def test_classes_behave_like_the_tuple_of_their_names():
    assert len(TWO) == 2
    assert (TWO[1], TWO[:1], [*TWO], TWO.index("disc")) == ("disc", ("star",), ["star", "disc"], 1)
    assert "star" in TWO
    assert "a star" not in TWO


def test_other_prompts_leave_the_rest():
    attacked = TWO.with_prompts(["a stir", "a disk"])
    assert attacked.prompts == ("a stir", "a disk")
    assert (attacked.names, attacked.descriptions) == (TWO.names, TWO.descriptions)
    with pytest.raises(ValueError, match="got 1 prompts for 2 classes; give one per class"):
        TWO.with_prompts(["a star"])


def test_lists_become_tuples_and_classes_can_be_keys():
    again = Classes(["star", "disc"], ["a star", "a disc"], [["five points"], []])
    assert again == TWO
    assert {again: 1}[TWO] == 1


def test_digest_knows_every_text():
    others = [
        Classes(("stars", "disc"), TWO.prompts, TWO.descriptions),
        TWO.with_prompts(["a star", "one disc"]),
        Classes(TWO.names, TWO.prompts),
        Classes(TWO.names, TWO.prompts, ((), ("five points",))),
    ]
    assert len({one.digest for one in [TWO, *others]}) == 5
    assert len(TWO.digest) == 16
    assert Classes(["star", "disc"], ["a star", "a disc"], [["five points"], []]).digest == TWO.digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a photo of a cat", ["a"]), "names='a photo of a cat' is not allowed; give a list, of one entry per class"),
        ((["a"], "a photo of a cat"), "prompts='a photo of a cat' is not allowed; give a list"),
        ((["a"], ["b"], "c"), "descriptions='c' is not allowed"),
        ((["a"], ["b"], ["c"]), "descriptions='c' is not allowed"),
        ((["a", "b"], ["a"]), "got 1 prompts for 2 classes; give one per class"),
        ((["a"], ["b"], [["c"], ["d"]]), "got 2 descriptions for 1 classes; give one per class"),
        (([], []), "classes are empty; give one name and one prompt per class"),
        (([1], ["a"]), "names must be texts, got 1; give strings"),
        ((["a"], [None]), "prompts must be texts, got None"),
    ],
)
def test_what_is_not_classes_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Classes(*arguments)


def test_roles_and_samples_carry_them():
    entry, samples = role("cifar10"), load_samples("cifar10", n=4)
    assert samples.classes == entry.classes
    assert samples.prompts == entry.prompts == entry.classes.prompts
    assert entry.prompts[3] == entry.template.format(entry.classes[3])
    assert hash(entry) == hash(role("cifar10"))
