"""What identifies a component: every field, whatever its value; and how it is made again."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robustclip.attacks import PGD, SepAttack
from robustclip.component import component, identity, rebuild, settings


@component
class Holder:
    """Something with one field of any kind."""

    value: object = None


def test_a_default_counts_like_any_other_value():
    described = identity(PGD(eps=0.1))
    assert (described["class"], described["steps"]) == ("PGD", 20)
    assert described == identity(PGD(eps=0.1, steps=20)) != identity(PGD(eps=0.1, steps=21))


@pytest.mark.parametrize(
    "value", [None, 3, 0.5, math.inf, "text", (1, ("a", None)), [1, 2], {"b": 1, "a": (2,)}, Path("a/b"), PGD(eps=0.1)]
)
def test_settings_are_json_that_makes_the_component_again(value):
    import json

    described = json.loads(json.dumps(settings(Holder(value=value))))
    assert rebuild(described) == Holder(value=value)


def test_components_inside_components_are_made_again():
    attack = SepAttack(image=PGD(eps=0.1, steps=3), reading="worst")
    assert rebuild(settings(attack)) == attack


def test_large_tensors_that_print_alike_are_told_apart():
    first, second = torch.zeros(3, 32, 32), torch.zeros(3, 32, 32)
    second[1, 16, 16] = 1
    assert repr(Holder(value=first)) == repr(Holder(value=second))
    assert identity(Holder(value=first)) != identity(Holder(value=second))
    assert identity(Holder(value=first.numpy())) != identity(Holder(value=second.numpy()))
    assert identity(Holder(value=first)) == identity(Holder(value=first.clone()))


def test_modules_count_by_their_weights_and_functions_by_their_source():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert identity(Holder(value=one)) != identity(Holder(value=two))
    makers = [lambda x: x + 1, lambda x: x + 2]
    assert identity(Holder(value=makers[0])) != identity(Holder(value=makers[1]))

    def shifted(by):
        return lambda x: x + by

    assert identity(Holder(value=shifted(1))) != identity(Holder(value=shifted(2)))


def test_numbers_of_numpy_are_the_same_numbers():
    assert identity(PGD(eps=0.1)) == identity(Holder(value=PGD(eps=float(np.float64(0.1)))))["value"]
    assert identity(Holder(value=np.int64(3))) == identity(Holder(value=3))


def test_fields_can_be_resolved():
    found = identity(SepAttack(image=PGD(eps=0.1)), {"language_model": lambda name: f"digest of {name}"})
    assert found["text"]["language_model"] == "digest of auto"


@pytest.mark.parametrize("value", [object(), np.array([object()])])
def test_what_cannot_be_identified_is_an_error(value):
    with pytest.raises(ValueError, match=r"cannot be identified|no settings that tell it"):
        identity(Holder(value=value))


def test_what_is_known_by_its_digest_only_cannot_be_made_again():
    with pytest.raises(ValueError, match="cannot be made again; run what made it"):
        rebuild(settings(Holder(value=torch.zeros(2))))
    with pytest.raises(ValueError, match="is not to be had here; run the notebook"):
        rebuild({"class": "__main__:Mine"})
