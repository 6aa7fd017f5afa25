"""Learned prompts: where they sit, what they leave alone, and that they survive copies, saving and the fast twin."""

import copy

import pytest
import torch
from torch.nn import functional as F

from robustclip import models
from robustclip.data.roles import role, tinyworld_samples
from robustclip.fast import fast, fast_classifier
from robustclip.prompts import Expansion, LinearMap, add_context, add_frame, learned, make_room

TEXTS = ["a photo of a red fish", "a red tree"]


@pytest.fixture(scope="module")
def plain():
    return models.load(device="cpu")


@pytest.fixture
def clip(plain):
    return copy.deepcopy(plain)


@pytest.fixture(scope="module")
def images():
    return tinyworld_samples("cifar10", "test", 6)[0].float() / 255


def tokens_of(clip, texts):
    return models.tokenize(clip.tokenizer, texts)


def test_the_context_sits_between_the_start_token_and_the_words(plain, clip):
    """By hand: look tokens up, put the context in, walk through the whole text tower, read the first token."""
    add_context(clip, 3, seed=5)
    context = learned(clip.network)["token_embedding.context"]
    assert context.shape == (3, 64)
    tokens, network = tokens_of(plain, TEXTS), plain.network
    table = network.token_embedding.weight[tokens]
    rows = torch.cat([table[:, :1], context.expand(2, -1, -1), table[:, 1:-3]], 1) + network.positional_embedding
    for block in network.transformer.resblocks:
        rows = block(rows)
    by_hand = F.normalize(network.ln_final(rows[:, 0]) @ network.text_projection, dim=-1)
    torch.testing.assert_close(clip.encode_texts(TEXTS), by_hand, rtol=1e-4, atol=1e-5)
    assert (by_hand - plain.encode_texts(TEXTS)).abs().max() > 1e-3


def test_room_is_made_with_the_texts_own_tokens(clip):
    tokens = tokens_of(clip, TEXTS)
    assert make_room(tokens, clip.network) is tokens
    add_context(clip, 2)
    moved = make_room(tokens, clip.network)
    assert moved.shape == tokens.shape
    for before, after in zip(tokens.tolist(), moved.tolist(), strict=True):
        assert after == [before[0], before[1], before[1], *before[1:-2]]


@pytest.mark.parametrize("vectors", [1, 2, 5])
def test_a_text_that_does_not_fit_is_an_error(clip, vectors):
    """No word and no end token is ever cut off in silence."""
    add_context(clip, vectors)
    length = clip.tokenizer.context_length
    fits, refused = 0, 0
    for words in range(1, length):
        text = " ".join(["red"] * words)
        tokens = tokens_of(clip, [text])[0]
        spare = length - (words + 2)
        if spare > vectors:
            assert make_room(tokens[None], clip.network)[0].tolist().count(tokens[1].item()) == words + vectors
            fits += 1
        elif spare < vectors:
            with pytest.raises(ValueError, match=f"too long for {vectors} context vectors; use shorter prompts"):
                clip.encode_texts([text])
            refused += 1
    assert fits == length - 3 - vectors
    assert refused > vectors


def test_the_frame_is_zero_inside(plain, clip, images):
    """A frame of 1 on a black normalised picture shows where it acts; the rest of the tower sees the sum."""
    add_frame(clip, 5)
    clip.network.visual.frame.data.fill_(1.0)  # inside, too: the mask has to hold it back
    seen = []
    clip.network.visual.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    clip.encode_images(images)
    added = seen[0] - plain.preprocess(images)
    height, width = clip.image_size
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[5 : height - 5, 5 : width - 5] = True
    assert (added[..., inside] == 0).all()
    torch.testing.assert_close(added[..., ~inside], torch.ones_like(added[..., ~inside]))


def test_gradients_reach_the_prompt_only(clip, images):
    add_frame(add_context(clip, 2), 4)
    frame, context = clip.network.visual.frame, clip.network.token_embedding.context
    assert not any(weight.requires_grad for weight in clip.parameters())
    frame.requires_grad_()
    context.requires_grad_()
    (clip.encode_images(images[:2]) * clip.encode_texts(TEXTS)).sum().backward()
    assert {name for name, weight in clip.network.named_parameters() if weight.grad is not None} == {
        "visual.frame", "token_embedding.context"}  # fmt: skip
    assert (frame.grad[:, 4:-4, 4:-4] == 0).all()
    assert (frame.grad[:, :4] != 0).any()
    assert (context.grad != 0).any(1).all()


def test_prompts_are_random_by_seed_and_small(plain):
    one, same, other = (add_frame(add_context(copy.deepcopy(plain), 2, seed), 4, seed) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest
    assert plain.digest not in (one.digest, other.digest)
    for value in (one.network.visual.frame, one.network.token_embedding.context):
        assert 0 < value.abs().max() < 0.2


def test_prompts_survive_saving(clip, images, tmp_path):
    add_frame(add_context(clip, 4, 1), 3, 2)
    models.save(clip, tmp_path)
    again = models.load(tmp_path, device="cpu")
    assert again.digest == clip.digest
    assert torch.equal(again.encode_images(images), clip.encode_images(images))
    assert torch.equal(again.encode_texts(TEXTS), clip.encode_texts(TEXTS))
    twice = models.load(models.save(again, tmp_path / "again"), device="cpu")
    assert twice.digest == clip.digest


def test_a_plain_model_in_the_folder_of_a_prompted_one_is_plain(plain, clip, tmp_path):
    models.save(add_frame(clip, 3), tmp_path)
    models.save(plain, tmp_path)
    assert models.load(tmp_path, device="cpu").digest == plain.digest


def test_the_fast_twin_has_the_frame(clip, images):
    add_frame(clip, 4)
    clip.network.visual.frame.data.mul_(20)
    classifier = models.zero_shot(clip, role("cifar10"))
    twin = fast_classifier(classifier, "float32")
    with torch.no_grad():
        torch.testing.assert_close(twin(images), classifier(images), rtol=1e-4, atol=1e-3)
        before = fast(clip, "float32").encode_images(images)
        clip.network.visual.frame.add_(1.0)  # as an optimizer does: the twin is made anew
        after = fast(clip, "float32").encode_images(images)
        torch.testing.assert_close(after, clip.encode_images(images), rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_prompts_are_read_anew_after_a_change(clip):
    add_context(clip, 2)
    before = clip.text_features(TEXTS)
    with torch.no_grad():
        clip.network.token_embedding.context.mul_(-20)
    assert (clip.text_features(TEXTS) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("add", "name", "wrong", "high"), [(add_context, "vectors", 31, 30), (add_frame, "width", 25, 24)]
)
def test_sizes_that_do_not_fit_are_named(clip, add, name, wrong, high):
    for value in (0, wrong, 1.5):
        with pytest.raises(ValueError, match=f"{name}={value} is not allowed"):
            add(clip, value)
    with pytest.raises(ValueError, match=f"between 1 and {high}"):
        add(clip, 0)


# --- transforms of text features --------------------------------------------------------------------------------------


def unit(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(64, generator=torch.Generator().manual_seed(seed)), dim=0)


TRANSFORMS = [LinearMap(torch.linalg.qr(torch.randn(64, 64))[0]), Expansion(unit(1), 1.5)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["linear", "expansion"])
def test_a_transform_acts_wherever_texts_are_encoded(plain, clip, images, transform, tmp_path):
    before = plain.encode_texts(TEXTS)
    assert torch.equal(clip.text_features(TEXTS), before)  # now known by heart
    digest = clip.digest
    clip.text_transform = transform
    expected = F.normalize(transform(before), dim=-1)
    assert (expected - before).abs().max() > 1e-2
    assert torch.equal(clip.encode_texts(TEXTS), expected)
    assert torch.equal(clip.text_features(TEXTS), expected)
    assert torch.equal(models.ZeroShotClassifier(clip, TEXTS).text_features, expected)
    assert torch.equal(fast(clip).text_features(TEXTS), expected)
    assert torch.equal(clip.encode_images(images), plain.encode_images(images))
    assert clip.digest != digest == plain.digest
    again = models.load(models.save(clip, tmp_path), device="cpu")
    assert again.digest == copy.deepcopy(clip).digest == clip.digest
    torch.testing.assert_close(again.encode_texts(TEXTS), expected)
    assert type(again.text_transform) is type(transform)
    clip.text_transform = None
    assert clip.digest == digest


def test_a_trained_transform_is_read_anew(clip):
    clip.text_transform = LinearMap(torch.eye(64))
    before, digest = clip.text_features(TEXTS), clip.digest
    with torch.no_grad():
        clip.text_transform.matrix.add_(torch.ones(64, 64))
    assert (clip.text_features(TEXTS) - before).abs().max() > 1e-3
    assert clip.digest != digest


def test_the_expansion_multiplies_angles_to_the_centre():
    centre, others = unit(0), torch.stack([unit(1), unit(2), unit(0)])
    moved = Expansion(centre, 0.5)(others)
    before, after = ((features[:2] @ centre).acos() for features in (others, moved))
    torch.testing.assert_close(after, 0.5 * before)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(moved[2], centre)
    planes = torch.stack([centre, others[0], moved[0]])
    assert torch.linalg.matrix_rank(planes, atol=1e-4) == 2, "it stays in the plane of the two"
    torch.testing.assert_close(Expansion(centre, 1.0)(others), others)


def test_a_transform_that_cannot_be_stored_is_refused(clip, tmp_path):
    clip.text_transform = torch.nn.Identity()
    for use in (lambda: clip.digest, lambda: models.save(clip, tmp_path)):
        with pytest.raises(ValueError, match=r"text_transform=Identity\(\) cannot be stored; give a LinearMap or Exp"):
            use()
    with pytest.raises(TypeError, match="text_transform"):
        clip.text_transform = torch.eye(64)
