"""The attacker who knows: on planted defenses whose one weakness is known, before a linear classifier."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.attacks.aware import AIMS, Aware, aims_against, is_random, tells, told
from robustclip.attacks.losses import margin
from robustclip.component import component, identity, rebuild, settings
from robustclip.defenses.base import SCORING_DRAW, Defense, as_defense
from robustclip.defenses.baselines import AntiAdversary, Hedge, LowPass, RandomNoise
from robustclip.defenses.cola import COLA
from robustclip.defenses.consistency import SelfConsistency
from robustclip.defenses.counterattack import Counterattack
from robustclip.defenses.views import TTE, Mirrored

EPS, SIDE = 0.05, 8
QUICK = {"eps": EPS, "steps": 20, "draws": 2, "judged": 3}


class Linear(nn.Module):
    """Logits are products of the pixels with fixed patterns."""

    def __init__(self, patterns, bias=0.0):
        super().__init__()
        self.register_buffer("patterns", patterns)
        self.bias, self.seen = bias, 0

    def forward(self, images):
        self.seen += len(images)
        return (images - 0.5).flatten(1) @ self.patterns.T + self.bias


def random_patterns(classes=4, seed=0):
    return torch.randn(classes, 3 * SIDE**2, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def classifier():
    return Linear(random_patterns())


def labelled(classifier, n=12, spread=0.1, seed=1):
    """Images around grey, labelled by what the classifier says."""
    images = 0.5 + spread * torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    images = images.clamp(0.1, 0.9)
    with torch.no_grad():
        return images, classifier(images).argmax(1)


def best_margins(classifier, images, labels, eps=EPS):
    """The highest margin of any wrong class in the ball: x + eps sign(w_j - w_y), where no pixel is clipped."""
    found = []
    for target in range(len(classifier.patterns)):
        ahead = (classifier.patterns[target] - classifier.patterns[labels]).sign().view_as(images)
        logits = classifier(images + eps * ahead)
        found.append(logits[:, target] - logits.gather(1, labels[:, None])[:, 0])
    found = torch.stack(found)
    return found.scatter(0, labels[None], -torch.inf).amax(0)


def broken(classifier, images, labels):
    with torch.no_grad():
        return classifier(images).argmax(1) != labels


# --- where nothing defends --------------------------------------------------------------------------------------------


def test_without_a_defense_it_breaks_what_can_be_broken(classifier):
    images, labels = labelled(classifier, 40, spread=0.2)
    eps = float(best_margins(classifier, images, labels, 0.0).abs().median() / 300)
    can = best_margins(classifier, images, labels, eps)
    assert 5 < (can > 0).sum() < 35
    found = broken(classifier, Aware(eps=eps, steps=40)(classifier, images, labels), labels)
    assert not found[can < 0].any()
    assert found[can > 0.05].all()
    assert not (broken(classifier, PGD(eps=eps, steps=40)(classifier, images, labels), labels) & ~found).any()


@pytest.mark.parametrize("defense", [None, RandomNoise(radius=0.05), Mirrored()], ids=repr)
def test_the_budget_is_kept(classifier, defense):
    images, _ = labelled(classifier)
    images = torch.cat([images, torch.zeros_like(images[:2]), torch.ones_like(images[:2])])
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    seen = defense(classifier).for_attack() if defense else classifier
    found = Aware(**QUICK)(seen, images, labels)
    assert (found - images).abs().max() <= EPS + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad
    assert (found - images).abs().flatten(1).amax(1).gt(0.5 * EPS).any()


# --- images are their own ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defense", [Mirrored(), RandomNoise(radius=0.05), TTE(count=2)], ids=repr)
def test_what_happens_to_an_image_does_not_depend_on_others(classifier, defense):
    images, labels = labelled(classifier, 5)
    seen, attack = defense(classifier).for_attack(), Aware(**QUICK)
    whole, order = attack(seen, images, labels), torch.tensor([3, 0, 4, 2, 1])
    alone = torch.cat([attack(seen, *pair) for pair in zip(images.split(1), labels.split(1), strict=True)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(attack(seen, images[order], labels[order]), whole[order], rtol=0, atol=1e-5)
    assert torch.equal(attack(seen, images, labels), whole)


def test_seeds_differ(classifier):
    images, labels = labelled(classifier, 3, spread=0.4)
    seen = RandomNoise(radius=0.05)(classifier).for_attack()
    first, again, other = (Aware(**QUICK | {"eps": 0.01}, seed=seed)(seen, images, labels) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- planted weaknesses -----------------------------------------------------------------------------------------------


@component
class Masked(Defense):
    """Every draw looks at its own few pixels, the same for all images."""

    share: float = 0.2
    seed: int = 0
    randomised = True

    def logits(self, classifier, images, draw):
        kept = (self.noise(torch.zeros_like(images[:1]), draw) + 1) / 2 < self.share
        return classifier(0.5 + (images - 0.5) * kept / self.share)


def scored(defended, images, labels, draws=12):
    """How often other draws than any attacker's are wrong."""
    wrong = [broken(defended.at(SCORING_DRAW + draw), images, labels) for draw in range(draws)]
    return torch.stack(wrong).float().mean().item()


def test_random_defenses_are_attacked_on_average():
    """One draw overfits: its pixels are not those of the draw that scores."""
    patterns = torch.stack([torch.ones(3 * SIDE**2), -torch.ones(3 * SIDE**2)])
    classifier, defense = Linear(patterns), Masked(share=0.2)
    images = 0.5 + 0.02 * torch.ones(8, 3, SIDE, SIDE) + 1e-3 * torch.rand(8, 3, SIDE, SIDE)
    labels, defended = torch.zeros(8, dtype=torch.long), defense(classifier)
    assert scored(defended, images, labels) == 0
    one_draw = PGD(eps=EPS, steps=1, start="image", step_size=EPS)(defended.for_attack(), images, labels)
    assert scored(defended, one_draw, labels) < 0.3
    found = Aware(eps=EPS, steps=30, draws=4)(defended.for_attack(), images, labels)
    assert scored(defended, found, labels) == 1


@component
class Coin(Defense):
    """A logit that depends on the draw alone stands on one side or the other."""

    weight: float = 1.0
    seed: int = 0
    randomised = True

    def logits(self, classifier, images, draw):
        side = self.noise(torch.zeros_like(images[:1]), draw, "coin", (1,)).sign()
        return classifier(images) + self.weight * side * torch.tensor([1.0, -1.0])


def test_images_that_some_draws_get_right_are_not_left_alone():
    """Wrong on average is not broken: the draw that scores may be one of those that are right."""
    classifier = Linear(torch.stack([torch.ones(3 * SIDE**2), -torch.ones(3 * SIDE**2)]))
    images = torch.full((4, 3, SIDE, SIDE), 0.5 - 0.5 / (3 * SIDE**2))  # the true class is 1 behind, or 1 - 1
    labels, defended = torch.zeros(4, dtype=torch.long), Coin(weight=2.0)(classifier)
    draws = range(500_000, 500_005)
    answers = torch.stack([defended.at(draw)(images).softmax(1) for draw in draws])
    assert (answers.mean(0).argmax(1) != labels).all()
    assert (answers.argmax(2) == labels).any()
    assert 0.2 < scored(defended, images, labels) < 0.8
    found = Aware(eps=EPS, steps=10)(defended.for_attack(), images, labels)
    assert scored(defended, found, labels) == 1


def halves():
    """Two classes told apart by half of the pixels, by a pattern that has no brightness."""
    pattern = torch.zeros(3 * SIDE**2)
    pattern[::4], pattern[2::4] = 1.0, -1.0
    return torch.stack([pattern, -pattern])


@component
class Gated(Defense):
    """Dark images get their class back, by a constant."""

    threshold: float = 0.5

    def logits(self, classifier, images, draw):
        acts = self.gate(classifier, images, draw).detach() > 0
        return classifier(images) + 20 * acts[:, None] * torch.tensor([1.0, 0.0])

    def gate(self, classifier, images, draw):
        return (self.threshold - images.mean((1, 2, 3))) / self.threshold


def test_gates_are_climbed_out_of():
    classifier, defended = Linear(halves()), Gated()(Linear(halves()))
    generator = torch.Generator().manual_seed(0)
    images = 0.485 + 0.002 * torch.randn(6, 3, SIDE, SIDE, generator=generator)
    images = images + 0.005 * classifier.patterns[0].view(3, SIDE, SIDE)
    labels = torch.zeros(6, dtype=torch.long)
    assert not broken(defended, images, labels).any()
    for aim, expected in (("answer", False), ("margin", False), ("gate", True)):
        found = Aware(eps=EPS, steps=50, aims=(aim,))(defended.for_attack(), images, labels)
        assert (broken(defended, found, labels) == expected).all(), aim
    found = Aware(eps=EPS, steps=50)(defended.for_attack(), images, labels)
    assert broken(defended, found, labels).all()


@component
class Rounded(Defense):
    """Few levels of grey: no slope anywhere."""

    levels: int = 12

    def logits(self, classifier, images, draw):
        return classifier((images * self.levels).round() / self.levels)


@component
class RoundedKnown(Rounded):
    def surrogate(self, classifier, images, draw):
        return classifier(images)


@component
class RoundedNoisy(Rounded):
    """Rounded after noise, whose answers differ by draw."""

    seed: int = 0
    randomised = True

    def logits(self, classifier, images, draw):
        return super().logits(classifier, images + self.noise(images, draw) / 24, draw)

    def surrogate(self, classifier, images, draw):
        return classifier(images)


def test_surrogates_are_climbed(classifier):
    images, labels = labelled(classifier, 12, spread=0.05)
    images, labels = images[keep := ~broken(Rounded()(classifier), images, labels)], labels[keep]
    assert len(images) > 4
    plain, known = (kind()(classifier) for kind in (Rounded, RoundedKnown))
    attack = Aware(**QUICK, aims=("answer", "margin"))
    assert broken(known, attack(known.for_attack(), images, labels), labels).all()
    assert not broken(plain, attack(plain.for_attack(), images, labels), labels).all()
    noisy = RoundedNoisy()(classifier)
    assert scored(noisy, attack(noisy.for_attack(), images, labels), labels) > 0.95
    assert scored(noisy, images, labels) < 0.5


@component
class Deaf(Defense):
    """Answers without a slope, as votes are."""

    def logits(self, classifier, images, draw):
        votes = F.one_hot(classifier(images).argmax(1), len(classifier.patterns))
        return 20.0 * votes + 0 * classifier(images)


def telling(part):
    """`Deaf`, with one part through which it can be heard."""
    return component(type(f"Telling_{part}", (Deaf,), {"__annotations__": {}, part: {
        "smooth": lambda self, classifier, images, draw: classifier(images),
        "guess": lambda self, classifier, images, draw: classifier(images),
        "views": lambda self, classifier, images, draw: torch.stack([classifier(images)] * 2),
    }[part]}))()  # fmt: skip


@pytest.mark.parametrize("part", ["smooth", "guess", "views"])
def test_what_a_defense_tells_is_used(classifier, part):
    images, labels = labelled(classifier, spread=0.05)
    defended = telling(part)(classifier)
    assert list(aims_against(defended)) == [aim for aim in AIMS if aim in (part, "plain", "answer", "margin")]
    for aims, expected in (((part,), True), (("answer", "margin"), False), ((), True)):
        found = Aware(**QUICK, aims=aims)(defended.for_attack(), images, labels)
        assert broken(defended, found, labels).all() == expected


def test_who_knows_a_defense_can_also_leave_it_alone(classifier):
    """What tells nothing is attacked through what stands behind it, as by somebody who is blind, and to the end."""
    images, labels = labelled(classifier, spread=0.05)
    defended = Deaf()(classifier)
    for aims, expected in (((), True), (("plain",), True), (("answer", "margin"), False)):
        found = Aware(**QUICK, aims=aims)(defended.for_attack(), images, labels)
        assert broken(defended, found, labels).all() == expected
    alone = Aware(**QUICK, aims=("plain",))(defended, images[:1], labels[:1])
    assert margin(classifier(alone), labels[:1]) > 0.9 * best_margins(classifier, images[:1], labels[:1])


@component
class Follows(Defense):
    """The answer is a pseudo-label's, with a slope that leads elsewhere."""

    def guess(self, classifier, images, draw):
        return classifier(images)

    def logits(self, classifier, images, draw):
        found = F.one_hot(self.guess(classifier, images, draw).argmax(1), 2)
        return 20.0 * found + 5 * images[:, :, ::2].mean((1, 2, 3))[:, None] * torch.tensor([1.0, -1.0])


def test_wrong_pseudo_labels_make_the_defense_work_for_the_attacker():
    classifier = Linear(torch.stack([pattern := halves()[0].view(3, SIDE, SIDE).clone(), -pattern]).flatten(1))
    classifier.patterns.view(2, 3, SIDE, SIDE)[:, :, ::2] = 0  # the guess looks at the other rows
    images = 0.5 + 0.01 * classifier.patterns[:1].view(1, 3, SIDE, SIDE).expand(5, -1, -1, -1)
    images = images + 1e-3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    labels, defended = torch.zeros(5, dtype=torch.long), Follows()(classifier)
    assert not broken(defended, images, labels).any()
    for aim, expected in (("answer", False), ("margin", False), ("guess", True)):
        found = Aware(**QUICK, aims=(aim,))(defended.for_attack(), images, labels)
        assert (broken(defended, found, labels) == expected).all(), aim


def test_the_image_that_most_draws_get_wrong_comes_back():
    """No climb makes it worse than where it started, as seen by draws that no step has used."""
    classifier = Linear(random_patterns(3, seed=4))
    images, labels = labelled(classifier, 8, spread=0.3, seed=5)
    defended = RandomNoise(radius=0.3)(classifier)
    both = Aware(eps=0.01, steps=10, judged=20)
    shares = []
    for aims in ((), ("plain",)):
        found = Aware(eps=0.01, steps=10, judged=20, aims=aims)(defended.for_attack(), images, labels)
        shares.append(torch.stack([broken(defended.at(500_000 + k), found, labels) for k in range(20)]).float().mean(0))
    assert both.judged == 20
    assert (shares[0] >= shares[1]).all()


# --- what defenses declare --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defense", "aims"),
    [
        (RandomNoise(), {"plain", "answer", "margin"}),
        (LowPass(), {"plain", "answer", "margin"}),
        (Hedge(), {"plain", "answer", "margin", "guess"}),
        (AntiAdversary(), {"plain", "answer", "margin", "guess"}),
        (Mirrored(), {"plain", "answer", "margin", "views"}),
        (TTE(), {"plain", "answer", "margin", "views"}),
        (COLA(), {"plain", "answer", "margin", "views", "smooth"}),
        (Counterattack(), {"plain", "answer", "margin", "smooth", "gate"}),
        (Counterattack(threshold=None), {"plain", "answer", "margin", "smooth"}),
        (SelfConsistency(), {"plain", "answer", "margin", "smooth", "gate", "views", "guess"}),
        (SelfConsistency(count=1), {"plain", "answer", "margin", "smooth", "gate", "guess"}),
        (SelfConsistency(steps=0), {"plain", "answer", "margin", "smooth", "gate", "views"}),
        (
            SelfConsistency(warmup=Counterattack(threshold=None)),
            {"plain", "answer", "margin", "smooth", "views", "guess"},
        ),
        (as_defense(lambda inner: inner), {"plain", "answer", "margin"}),
    ],
)
def test_aims_are_those_that_a_defense_leaves_open(classifier, defense, aims):
    found = list(aims_against(defense(classifier).for_attack()))
    assert (set(found), len(found)) == (aims, len(aims))
    assert found == list(aims_against(defense(classifier)))
    assert list(aims_against(defense(classifier), ("gate", "views"))) == [
        one for one in found if one in ("gate", "views")
    ]


def test_without_a_defense_only_the_answer_is_there(classifier):
    assert list(aims_against(classifier)) == ["answer", "margin"]
    assert not is_random(classifier)


def test_what_is_lacking_is_not_told():
    @component
    class Silent(Gated):
        lacks = ("gate",)

    assert tells(Gated(), "gate")
    assert not tells(Silent(), "gate")
    assert not tells(Rounded(), "surrogate")
    assert tells(RoundedKnown(), "surrogate")


def test_randomness_inside_counts(classifier):
    assert is_random(Mirrored()(RandomNoise()(classifier)).for_attack())
    assert is_random(RandomNoise()(Mirrored()(classifier)))
    assert not is_random(Mirrored()(Rounded()(classifier)))


def test_parts_are_told_by_the_outermost_at_its_draw(classifier):
    images, _ = labelled(classifier, 3)
    nested = Mirrored()(RandomNoise(radius=0.1)(classifier)).at(7)
    expected = torch.stack([RandomNoise(radius=0.1)(classifier).at(7)(one) for one in (images, images.flip(-1))])
    torch.testing.assert_close(told(nested.for_attack(), "views", images), expected)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("defense", [RandomNoise(radius=1e-3), Mirrored()], ids=repr)
def test_passes_are_those_declared(classifier, defense):
    images, labels = labelled(classifier, 4, spread=0.4)
    attack = Aware(eps=1e-4, steps=6, draws=3, judged=2, aims=("answer", "margin"))
    classifier.seen = 0
    attack(defense(classifier).for_attack(), images, labels)
    forward = classifier.seen / len(images) / defense.passes(4)[0]
    if isinstance(defense, RandomNoise):
        assert attack.passes(4) == (forward, 2 * 6 * 3)
    assert forward <= attack.passes(4)[0]


@pytest.mark.parametrize(
    ("field", "value", "told_of"),
    [
        ("eps", 2, "eps=2 is not allowed"),
        ("steps", 0, "steps=0 is not allowed"),
        ("draws", 0, "draws=0 is not allowed"),
        ("judged", 0, "judged=0 is not allowed"),
        ("step_size", -1, "step_size=-1 is not allowed"),
        ("gate_weight", -1, "gate_weight=-1 is not allowed"),
        ("slack", -0.1, "slack=-0.1 is not allowed"),
        ("seed", -1, "seed=-1 is not allowed"),
        (
            "aims",
            ("answer", "soft"),
            "unknown aim 'soft'; choose one of: plain, guess, smooth, answer, margin, views, gate",
        ),
    ],
)
def test_bad_settings_are_named(field, value, told_of):
    with pytest.raises(ValueError, match=told_of):
        Aware(**{"eps": EPS, field: value})


def test_settings_paste_back_and_identify():
    found = [Aware(eps=EPS), Aware(eps=EPS, aims=["gate"]), Aware(eps=EPS, draws=5), Aware(eps=EPS, seed=1)]
    assert len({str(identity(one)) for one in found}) == len(found)
    assert all(eval(repr(one)) == one == rebuild(settings(one)) for one in found)
    assert repr(found[1]) == f"Aware(eps={EPS}, aims=('gate',))"


def test_no_images_are_no_work(classifier):
    empty = torch.zeros(0, 3, SIDE, SIDE)
    assert Aware(eps=EPS)(classifier, empty, torch.zeros(0, dtype=torch.long)).shape == empty.shape


def test_margins_are_those_of_the_answer(classifier):
    images, labels = labelled(classifier)
    assert (margin(classifier(images), labels) <= 0).all()
