"""The Square attack: what a proposal changes, that it needs no gradient, and parity with torchattacks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robustclip import _torchvision, models
from robustclip.attacks import PGD, Square, UniformNoise, square
from robustclip.attacks.square import HALVINGS, L2Squares, LinfSquares, bumps, window
from robustclip.data.roles import role, tinyworld_samples

_torchvision.prepare()
import torchattacks  # noqa: E402  torchvision has to be prepared first


def some(n: int, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def linear(classes: int = 4, side: int = 8) -> nn.Sequential:
    layer = nn.Linear(3 * side * side, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1)))
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    return nn.Sequential(nn.Flatten(), layer).eval()


def predicted(classifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier(images).argmax(1)


# --- proposals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "sides"), [(1, (4, 4)), (3, (8, 5)), (4, (4, 6))])
def test_a_window_is_a_square_anywhere_in_the_image(side, sides):
    """All places are taken, the last row and column too, about equally often."""
    inside = window(noise(4000, 2), side, sides)
    assert inside.shape == (4000, 1, *sides)
    assert (inside.sum((1, 2, 3)) == side * side).all()
    assert (inside.any(3).sum((1, 2)) == side).all()
    corners = inside.flatten(1).int().argmax(1)
    places = (sides[0] - side + 1) * (sides[1] - side + 1)
    counts = corners.bincount()
    counts = counts[counts > 0]
    assert len(counts) == places
    assert counts.min() > 0.6 * 4000 / places
    assert window(torch.ones(1, 2), side, sides)[0, 0, -1, -1]


@pytest.mark.parametrize("side", range(2, 14))
def test_bumps_are_those_of_the_original(side):
    """Up to the way they lie, which the original draws at random."""
    theirs = torchattacks.Square(nn.Linear(1, 1))
    with torch.random.fork_rng():
        shape = theirs.eta(side)
    assert any(torch.allclose(bumps(side), other, atol=1e-6) for other in (shape, shape.T))
    assert bumps(side).norm() == pytest.approx(1)


def test_stripes_come_first():
    images = 0.2 + 0.6 * some(5)
    start = LinfSquares(images, 0.1).start(images, noise(5, 3, 1, 8))
    assert torch.allclose((start - images).abs(), torch.full_like(images, 0.1), atol=1e-6)
    assert ((start - images).std(2) < 1e-6).all(), "one sign for each column"
    assert 0.3 < (start > images).float().mean() < 0.7


@given(share=st.floats(0.001, 1), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_linf_proposal_changes_one_square(share, seed):
    images, drawn = some(6, seed=seed), noise(6, 5, seed=seed)
    squares = LinfSquares(images, 0.1)
    best = squares.start(images, noise(6, 3, 1, 8, seed=seed + 1))
    new = squares.propose(images, best, drawn, torch.full((6,), share).double())
    side = min(max(round((share * 64) ** 0.5), 1), 8)
    inside = window(drawn[:, :2], side, (8, 8)).expand_as(images)
    assert torch.equal(new[~inside], best[~inside])
    sign = drawn[:, 2:].sign()[:, :, None, None]
    assert torch.equal(new[inside], (images + 0.1 * sign).clamp(0, 1)[inside])


@given(share=st.floats(0.001, 1), seed=st.integers(0, 99), side=st.integers(3, 9))
@settings(max_examples=20, deadline=None)
def test_an_l2_proposal_keeps_the_length_and_the_rest_of_the_pattern(share, seed, side):
    images = 0.3 + 0.4 * some(6, side, seed)  # eps is too small to reach the pixel bounds
    squares = L2Squares(images, 0.1)
    best = squares.start(images, noise(6, *squares.at_start, seed=seed))
    assert torch.allclose((best - images).flatten(1).norm(dim=1), torch.tensor(0.1), atol=1e-5)
    drawn = noise(6, squares.each, seed=seed + 1)
    new = squares.propose(images, best, drawn, torch.full((6,), share).double())
    assert torch.allclose((new - images).flatten(1).norm(dim=1), torch.tensor(0.1), atol=1e-5)
    length = min(max(round((share * side * side) ** 0.5), 3) | 1, side)
    places = [window(drawn[:, k : k + 2], length, (side, side)).expand_as(images) for k in (0, 2)]
    for image, old, inside, emptied in zip(new - images, best - images, *places, strict=True):
        assert (image[emptied & ~inside].abs() < 1e-6).all()
        rest = ~inside & ~emptied
        if old[rest].norm() > 1e-3:  # outside, the pattern is only rescaled
            assert torch.cosine_similarity(image[rest], old[rest], dim=0) > 0.999


def test_squares_shrink_as_queries_are_spent():
    attack = Square(eps=0.1, queries=10_000, p_init=0.8)
    for count, query in enumerate(HALVINGS):
        shares = attack.shares(torch.tensor([query, query + 1])).tolist()
        assert shares == pytest.approx([0.8 / 2**count, 0.4 / 2**count])
    assert Square(eps=0.1, queries=100).shares(torch.tensor([50])) == attack.shares(torch.tensor([5000]))


# --- the search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", pytest.param("l2", marks=pytest.mark.slow)])
def test_margins_only_rise_and_the_highest_is_returned(norm, monkeypatch):
    """Asked one by one, each image is shown what each query changes, and what comes back is the best of that."""
    monkeypatch.setattr(square, "TOGETHER", 1)
    classifier, images, seen = linear(), some(8), []
    attack = Square(eps=0.003, norm=norm, queries=150, restarts=2)
    labels = predicted(classifier, images)
    stands = predicted(classifier, attack(classifier, images, labels)) == labels
    images, labels = images[stands], labels[stands]
    assert len(images) > 5
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        seen.clear()

        def watched(points: torch.Tensor, label=label, seen=seen) -> torch.Tensor:
            logits = classifier(points).detach()
            seen.append((logits.scatter(1, label[:, None], -torch.inf).amax(1) - logits[:, label[0]])[0])
            return logits

        adversarial = attack(watched, image, label)
        shown = torch.stack(seen[1:])  # the first call only asks which images are right
        assert 200 < len(shown) <= 300
        watched(adversarial)
        assert torch.allclose(seen[-1], shown.amax(), atol=1e-5)
        assert shown.amax() > shown[0] + 1e-3, "the search gets further than its start"


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("n", [1, 5])
def test_showing_several_squares_together_changes_nothing(norm, n, monkeypatch):
    """The same images in a fraction of the calls: 300 queries cross chunks and halvings of the square."""
    classifier, images = linear(), some(40)[-n:]
    labels = predicted(classifier, images)
    attack, found, calls = Square(eps=0.002 if norm == "linf" else 0.03, norm=norm, queries=300), [], []
    for together in (1, 7, 64):
        monkeypatch.setattr(square, "TOGETHER", together)
        sizes = []
        found.append(attack(lambda x, sizes=sizes: sizes.append(len(x)) or classifier(x), images, labels))
        calls.append(len(sizes))
    assert (predicted(classifier, found[0]) == labels).all(), "it has to spend all its queries"
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert torch.allclose(found[0], found[2], atol=1e-6)
    assert 200 < calls[0] <= 301, "squares that change nothing are not shown"
    assert calls[2] < calls[1] <= calls[0]
    assert calls[2] < 150


def test_broken_images_leave_at_once(monkeypatch):
    monkeypatch.setattr(square, "TOGETHER", 1)
    sizes, classifier, images = [], linear(), some(64)
    labels = predicted(classifier, images)
    adversarial = Square(eps=0.03, queries=200)(lambda x: sizes.append(len(x)) or classifier(x), images, labels)
    left = (predicted(classifier, adversarial) == labels).sum()
    assert sizes[0] == 64
    assert max(sizes[-20:]) <= left


def test_the_passes_counted_do_not_depend_on_the_batch():
    """What is shown to fill a batch and used by nobody does not count."""
    classifier = models.zero_shot(models.load(device="cpu"), role("cifar10"))
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 6)
    images, attack, counts = images.float() / 255, Square(eps=8 / 255, queries=30), []
    for size in (6, 1, 4):
        with models.count_passes() as passes:
            for part in zip(images.split(size), labels.split(size), strict=True):
                attack(classifier, *part)
        counts.append(passes.forward)
    assert counts == counts[:1] * 3
    assert counts[0] <= 6 * attack.passes(10)[0]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_squares_belong_to_the_image_and_the_seed(norm):
    """Also when neighbors have long left, and beyond the numbers drawn at once."""
    classifier, images = linear(), some(20)
    labels = predicted(classifier, images)
    attack = Square(eps=0.02 if norm == "linf" else 0.2, norm=norm, queries=300)
    whole = attack(classifier, images, labels)
    few = torch.tensor([17, 3])
    assert torch.allclose(attack(classifier, images[few], labels[few]), whole[few], atol=1e-6)


def test_it_breaks_what_hides_its_gradient():
    """Rounding inside the classifier stops every gradient attack, not this one; inference mode does not stop it."""
    classifier, images = linear(), some(64)

    def rounded(points: torch.Tensor) -> torch.Tensor:
        return classifier((points * 64).round() / 64)

    labels = predicted(rounded, images)
    with torch.inference_mode():
        found = Square(eps=0.06, queries=300)(rounded, images, labels)
    blind = PGD(eps=0.06, steps=30, start="image")(rounded, images, labels)
    assert (predicted(rounded, found) == labels).sum() < 8
    assert (predicted(rounded, blind) == labels).sum() > 48


def test_more_queries_and_restarts_only_add():
    """The schedule stretches with the queries, so only restarts are strictly nested."""
    classifier, images = linear(), some(200)
    labels = predicted(classifier, images)

    def left(**setting: int) -> torch.Tensor:
        return predicted(classifier, Square(eps=0.02, **setting)(classifier, images, labels)) == labels

    few, many, again = left(queries=10), left(queries=200), left(queries=10, restarts=3)
    assert many.sum() < few.sum()
    assert (few | ~again).all()
    assert again.sum() < few.sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": 0}, "queries=0 .* at least 1"),
        ({"p_init": 1.5}, r"p_init=1\.5 .* between 0 and 1"),
        ({"restarts": 0}, "restarts=0 .* at least 1"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"eps": 2}, "eps=2 .* between 0 and 1"),
        ({"seed": 0.5}, r"seed=0\.5 .* whole number"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Square(**{"eps": 0.1} | settings)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 12 / 255), ("l2", 2.0)])
def test_as_strong_as_torchattacks(norm, eps):
    """100 queries on 16 images: at most two more stand than with theirs, and at most three fewer.

    Theirs shows all images the same squares, never reaches the last row and column, and asks one query more.
    """
    classifier = models.zero_shot(models.load(device="cpu"), role("cifar10"))
    images, labels, _, _ = tinyworld_samples("cifar10", "test", 16)
    images = images.float() / 255
    theirs = torchattacks.Square(classifier, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, n_queries=100)
    with torch.random.fork_rng():
        rival = (predicted(classifier, theirs(images, labels)) == labels).sum().item()
    found = predicted(classifier, Square(eps=eps, norm=norm, queries=100)(classifier, images, labels)) == labels
    assert rival - 3 <= found.sum() <= rival + 2
    assert 2 < rival < 14, "a budget at which attacks can differ"
    if norm == "linf":
        noise = predicted(classifier, UniformNoise(eps=eps)(classifier, images, labels)) == labels
        assert found.sum() < noise.sum()
