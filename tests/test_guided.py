"""Recipes with a guide or with other texts: losses picture by picture, bounds, what each reduces to."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from robustclip import models
from robustclip.component import component
from robustclip.data.roles import role
from robustclip.prompts import Expansion
from robustclip.training import FARE, LAAT, PMGAFT, TGAZSR, TIMA, Pictures, TeCoA, interpolate, train
from robustclip.training.anchored import energy, expansion
from robustclip.training.guided import IMAGENET
from robustclip.training.loop import Run

EPS = 8 / 255
SMALL = {"eps": EPS, "updates": 2, "batch_size": 6, "attack_steps": 1}


@pytest.fixture(scope="module")
def clip():
    return models.load(device="cpu")


@pytest.fixture(scope="module")
def pictures():
    return Pictures.of("cifar10", n=300)


def moved(recipe, clip, pictures):
    """A batch whose CLIP is not its guide any more: the image tower is bent, deterministically."""
    run, random = Run(recipe, clip, pictures), torch.Generator().manual_seed(3)
    for name, weight in run.clip.network.visual.named_parameters():
        if "conv" in name or "proj" in name:
            weight.data += 0.05 * weight.std() * torch.randn(weight.shape, generator=random)
    return run.batch()


def spread(a, b):
    """D_KL(softmax a || softmax b) of one row, from its definition."""
    p, q = a.detach().double().softmax(0), b.detach().double().softmax(0)
    return float((p * (p.log() - q.log())).sum())


def unit(values):
    return values / values.norm(dim=-1, keepdim=True)


def one_by_one(images):
    return [images[row : row + 1] for row in range(len(images))]


# --- PMG-AFT ----------------------------------------------------------------------------------------------------------


def pmg_by_hand(batch, general, clean, towards, total, temperature, colours):
    """The loss picture by picture."""
    scale = batch.clip.logit_scale.item() if temperature is None else 1 / temperature
    mean, deviation = (torch.tensor(part).view(3, 1, 1) for part in IMAGENET)

    def logits(clip, image):
        pixels = (image - mean) / deviation * clip.std + clip.mean if colours == "imagenet" else image
        texts = unit(clip.encode_texts(batch.prompts))
        return scale * (unit(clip.raw_images(pixels)) @ texts.T)[0]

    losses, apart = [], []
    for clean_image, hit, label in zip(
        one_by_one(batch.images), one_by_one(batch.attacked_images), batch.labels, strict=True
    ):
        attacked = logits(batch.clip, hit)
        pairs = [(general, logits(batch.original, hit)), (clean, logits(batch.clip, clean_image))]
        losses.append(-attacked.log_softmax(0)[label].item())
        apart.append(
            sum(w * (spread(one, attacked) if towards == "guide" else spread(attacked, one)) for w, one in pairs)
        )
    return sum(losses) / len(losses) + sum(apart) / (1 if total == "sum" else len(apart))


@pytest.mark.parametrize("towards", ["guide", "tuned"])
@pytest.mark.parametrize(
    ("total", "temperature", "colours", "general", "clean"),
    [("mean", None, "clip", 1.0, 1.0), ("sum", 1.0, "imagenet", 1.0, 1.0), ("mean", 0.07, "clip", 0.5, 3.0)],
)
def test_pmg_aft_is_its_formula_picture_by_picture(
    clip, pictures, towards, total, temperature, colours, general, clean
):
    recipe = PMGAFT.of(**SMALL, towards=towards, reduction=total, temperature=temperature, normalisation=colours,
                       general=general, clean=clean)  # fmt: skip
    batch = moved(recipe, clip, pictures)
    with torch.no_grad():
        expected = pmg_by_hand(batch, general, clean, towards, total, temperature, colours)
    assert recipe.loss(batch).item() == pytest.approx(expected, rel=2e-4)


def test_without_its_guide_pmg_aft_is_tecoa(clip, pictures):
    plain = Run(TeCoA.of(**SMALL), clip, pictures)
    free = Run(PMGAFT.of(**SMALL, general=0.0, clean=0.0), clip, pictures)
    for run in (plain, free):
        run.update()
    assert free.losses == plain.losses
    assert free.clip.digest == plain.clip.digest != clip.digest


def test_a_detached_clean_side_gives_no_gradient(clip, pictures):
    """The gradients differ, the losses do not."""
    batches = [moved(PMGAFT.of(**SMALL, detached=own, general=0.0), clip, pictures) for own in (True, False)]
    losses = [batch.recipe.loss(batch) for batch in batches]
    slopes = [torch.autograd.grad(loss, next(iter(batch.clip.network.visual.parameters())))[0]
              for loss, batch in zip(losses, batches, strict=True)]  # fmt: skip
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert (slopes[0] - slopes[1]).norm() > 1e-3 * slopes[1].norm()


def test_other_colours_are_those_of_the_other_normalisation(clip):
    """What the tower gets is the picture less ImageNet's mean over its deviation."""
    images = torch.rand(2, 3, *clip.image_size)
    shown = clip.preprocess(PMGAFT.of(**SMALL, normalisation="imagenet").shown(clip, images))
    mean, deviation = (torch.tensor(part).view(3, 1, 1) for part in IMAGENET)
    torch.testing.assert_close(shown, (images - mean) / deviation, rtol=1e-4, atol=1e-4)


def test_the_attack_climbs_the_logits_that_the_recipe_has(clip, pictures):
    """At temperature 1 cosines are climbed, whose slopes have other signs than those of a hundred times as much."""
    found = [moved(PMGAFT.of(**(SMALL | {"attack_steps": 3}), temperature=t), clip, pictures).attacked_images
             for t in (None, 1.0, 1.0)]  # fmt: skip
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], found[1])


# --- TGA-ZSR ----------------------------------------------------------------------------------------------------------


def map_by_hand(clip, image, text, unit_over, side):
    """Where a text finds itself in one picture: by a hook on the attention pool of a tower that pools no more."""
    clip, seen = copy.deepcopy(clip), []
    for block in clip.network.visual.layer4:
        block.avgpool = torch.nn.Identity()
        if block.downsample is not None:
            block.downsample[0] = torch.nn.Identity()
    pool = clip.network.visual.attnpool
    pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with pytest.raises(RuntimeError), torch.no_grad():  # the pool knows one place only
        clip.encode_images(image)
    grid = seen[0][0]
    places = []
    for row in range(grid.shape[1]):
        for column in range(grid.shape[2]):
            place = grid[:, row, column] + pool.positional_embedding[1]
            places.append(pool.c_proj(pool.v_proj(place)))
    places = torch.stack(places).detach()
    places = places / places.norm(dim=1 if unit_over == "channels" else 0, keepdim=True)
    fits = torch.stack([place @ text for place in places])
    fits = (fits - fits.min()) / (fits.max() - fits.min())
    return F.interpolate(fits.view(1, 1, *grid.shape[1:]), size=(side, side), mode="bilinear").flatten()


@pytest.mark.parametrize("unit_over", ["channels", "places"])
@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
def test_tga_zsr_is_its_formula_picture_by_picture(clip, pictures, unit_over, distance):
    recipe = TGAZSR.of(**SMALL, unit=unit_over, distance=distance, attacked=0.3, clean=0.7, side=20)
    batch = moved(recipe, clip, pictures)
    measure = {
        "l2": lambda one, two: (one - two).square().sum().sqrt(), "l1": lambda one, two: (one - two).abs().mean(),
        "cosine": lambda one, two: 1 - (unit(one) * unit(two)).sum(),
    }[distance]  # fmt: skip
    rows = []
    for image, hit, label in zip(
        one_by_one(batch.images), one_by_one(batch.attacked_images), batch.labels, strict=True
    ):
        text = batch.class_texts[label]
        before = map_by_hand(batch.original, image, text, unit_over, 20)
        own, attacked = (map_by_hand(batch.clip, one, text, unit_over, 20) for one in (image, hit))
        logits = batch.clip.logit_scale * batch.clip.encode_images(hit) @ batch.class_texts.T
        ce = F.cross_entropy(logits, label[None])
        rows.append(ce + 0.3 * measure(attacked, before) + 0.7 * measure(own, before))
    assert recipe.loss(batch).item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-4)


def test_attention_is_in_zero_one_and_its_loss_reaches_the_tower(clip, pictures):
    recipe = TGAZSR.of(**SMALL)
    batch = moved(recipe, clip, pictures)
    _, maps = recipe.attention(batch.clip, batch.images, batch.class_texts[batch.labels])
    assert maps.shape == (6, 224 * 224)
    assert maps.min() >= 0
    assert maps.max() <= 1
    weight = batch.clip.network.visual.attnpool.v_proj.weight
    (slope,) = torch.autograd.grad(recipe.apart(maps, maps.detach().flip(0)), weight)
    assert slope.norm() > 0


# --- FARE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("clean", [0.0, 0.5])
def test_fare_is_its_formula_picture_by_picture(clip, pictures, distance, clean):
    recipe = FARE.of(**SMALL, distance=distance, clean=clean)
    batch, rows = moved(recipe, clip, pictures), []
    for image, hit in zip(one_by_one(batch.images), one_by_one(batch.attacked_images), strict=True):
        goal = batch.original.raw_images(image)[0]
        for weight, points in ((1, hit), (clean, image)):
            moves = (batch.clip.raw_images(points)[0] - goal).tolist()
            rows.append(weight * sum(one**2 if distance == "l2" else abs(one) for one in moves))
    assert recipe.loss(batch).item() == pytest.approx(sum(rows) / len(batch.images), rel=1e-4)


def test_fare_needs_no_labels(clip, pictures):
    batch = moved(FARE.of(**SMALL), clip, pictures)
    before = batch.recipe.loss(batch)
    other = type(batch)(batch.recipe, batch.clip, batch.images, (batch.labels + 1) % 10, batch.prompts, batch.noise,
                        EPS, batch.original)  # fmt: skip
    assert torch.equal(before, other.recipe.loss(other))


def bound(new, old, constant):
    """What FARE's theorem allows cosines to change."""
    return constant * (new - old).norm(dim=1) / torch.maximum(new.norm(dim=1), old.norm(dim=1))


def test_the_bound_of_fares_theorem_holds_with_two_and_not_with_one(clip, pictures):
    """|cos(new, t) - cos(old, t)| <= 2 |new - old| / max(|new|, |old|), on features and at the worst."""
    batch = moved(FARE.of(**SMALL), clip, pictures)
    with torch.no_grad():
        new, old = batch.clip.raw_images(batch.images), batch.original.raw_images(batch.images)
    changes = ((unit(new) - unit(old)) @ batch.class_texts.T).abs().amax(1)
    assert (changes > 0.01).any()
    assert (changes <= bound(new, old, 2)).all()
    new, old, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1e-3]]), unit(torch.tensor([1.0, -1.0]))
    change = ((unit(new) - unit(old)) @ text).abs()
    assert bound(new, old, 1) < change <= bound(new, old, 2)


# --- LAAT -------------------------------------------------------------------------------------------------------------


def rotated_away(texts, angles_of):
    """Texts after a change of the angle to their mean, found by turning the mean to the first axis, plane by plane."""
    centre = unit(texts.mean(0))
    turn = torch.eye(texts.shape[1], dtype=texts.dtype)
    for axis in range(texts.shape[1] - 1, 0, -1):  # each turn in one plane takes one coordinate of the centre away
        here = turn @ centre
        length = torch.hypot(here[0], here[axis])
        cosine, sine = here[0] / length, here[axis] / length
        plane = torch.eye(texts.shape[1], dtype=texts.dtype)
        plane[0, 0], plane[0, axis], plane[axis, 0], plane[axis, axis] = cosine, sine, -sine, cosine
        turn = plane @ turn
    assert (turn @ centre)[0] == pytest.approx(1)
    around = texts @ turn.T
    polar = around[:, 0].clamp(-1, 1).acos()
    wide = angles_of(polar)
    rest = around[:, 1:] / polar.sin()[:, None]
    return torch.cat([wide.cos()[:, None], rest * wide.sin()[:, None]], 1) @ turn


@pytest.mark.parametrize(("count", "width"), [(4, 3), (20, 16), (64, 40)])
def test_the_closed_form_is_laats_chain_of_rotations(count, width):
    random = torch.Generator().manual_seed(count)
    texts = unit(torch.randn(count, width, generator=random).double() + 3 * torch.eye(width)[0])
    expected = rotated_away(texts, lambda polar: math.pi / 2 * polar / polar.max())
    torch.testing.assert_close(expansion(texts)(texts), expected, rtol=1e-9, atol=1e-9)
    assert (expected @ unit(texts.mean(0))).min().abs() < 1e-9  # the farthest lies at a right angle


def test_new_classes_are_moved_by_the_centre_and_factor_of_the_old_ones(clip, pictures):
    known, new = role("cifar10").prompts, role("caltech101").prompts
    run = Run(LAAT.of(**SMALL), clip, pictures)
    transform = run.clip.text_transform
    assert isinstance(transform, Expansion)
    texts = clip.text_features(new)
    torch.testing.assert_close(run.clip.text_features(new), unit(transform(texts)))
    closeness = [(found @ found.T).mean() for found in (run.clip.text_features(known), clip.text_features(known))]
    assert closeness[0] < closeness[1] - 0.05


@pytest.mark.parametrize(("temperature", "smoothness"), [(1.0, 1.0), (0.07, 0.0), (None, 2.0)])
@pytest.mark.parametrize("anchors", ["expanded", "raw"])
def test_laat_is_its_formula_picture_by_picture(clip, pictures, anchors, temperature, smoothness):
    recipe = LAAT.of(**SMALL, anchors=anchors, temperature=temperature, smoothness=smoothness)
    batch, rows = moved(recipe, clip, pictures), []
    texts = clip.text_features(batch.prompts)
    texts = expansion(texts)(texts) if anchors == "expanded" else texts
    scale = clip.logit_scale if temperature is None else 1 / temperature
    for image, hit, label in zip(
        one_by_one(batch.images), one_by_one(batch.attacked_images), batch.labels, strict=True
    ):
        clean, attacked = (unit(batch.clip.raw_images(one))[0] for one in (image, hit))
        loss = (scale * attacked @ texts.T).logsumexp(0) - scale * attacked @ texts[label]
        rows.append(loss - smoothness * clean @ attacked)
    assert recipe.loss(batch).item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-4, abs=1e-5)


def test_raw_anchors_at_the_clips_temperature_are_tecoa(clip, pictures):
    runs = [Run(recipe, clip, pictures) for recipe in (
        TeCoA.of(**SMALL), LAAT.of(**SMALL, anchors="raw", temperature=None, smoothness=0.0)
    )]  # fmt: skip
    for run in runs:
        run.update()
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)  # sums in another order round otherwise


# --- TIMA -------------------------------------------------------------------------------------------------------------


def test_tima_without_its_parts_is_tecoa(clip, pictures):
    none = {"margin": 0.0, "distil_images": 0.0, "energy": 0.0, "distil_texts": 0.0}
    runs = [Run(recipe, clip, pictures) for recipe in (TeCoA.of(**SMALL), TIMA.of(**SMALL, **none))]
    for run in runs:
        run.update()
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)  # sums in another order round otherwise
    assert runs[1].clip.text_transform is None


def margin_by_hand(texts, label, other, widened, margin):
    """m g(t_y, t_k) from all pairs."""
    pairs = {(i, j): float(texts[i] @ texts[j]) for i in range(len(texts)) for j in range(len(texts)) if i != j}
    low, high = min(pairs.values()), max(pairs.values())
    share = (pairs[label, other] - low) / (high - low) if label != other else 0.0
    return margin * (share if widened == "similar" or label == other else 1 - share)


@pytest.mark.parametrize("widened", ["similar", "distant"])
def test_tima_is_its_formula_picture_by_picture(clip, pictures, widened):
    recipe = TIMA.of(**SMALL, margin=0.2, widened=widened, distil_images=0.5, energy=0.3, distil_texts=2.0)
    batch = moved(recipe, clip, pictures)
    with torch.no_grad():
        random = torch.Generator().manual_seed(9)
        batch.clip.text_transform.matrix += 0.1 * torch.randn(batch.clip.text_transform.matrix.shape, generator=random)
    scale, before = clip.logit_scale, clip.text_features(batch.prompts)
    texts = unit(before @ batch.clip.text_transform.matrix.detach())
    rows = []
    for image, hit, label in zip(
        one_by_one(batch.images), one_by_one(batch.attacked_images), batch.labels.tolist(), strict=True
    ):
        attacked, own = (unit(batch.clip.raw_images(one))[0] for one in (hit, image))
        guide = clip.encode_images(image)[0]
        bent = [attacked @ text + margin_by_hand(before, label, k, widened, 0.2) for k, text in enumerate(texts)]
        bent = scale * torch.stack(bent)
        kept = spread(scale * guide @ texts.T, scale * own @ texts.T)
        same = spread(scale * guide @ before.T, scale * guide @ texts.T)
        rows.append(bent.logsumexp(0).item() - bent[label].item() + 0.5 * kept + 2.0 * same)
    pairs = [1 / float((texts[i] - texts[j]).square().sum()) for i in range(10) for j in range(10) if i != j]
    expected = sum(rows) / len(rows) + 0.3 * sum(pairs) / len(pairs)
    assert recipe.loss(batch).item() == pytest.approx(expected, rel=1e-3)


def test_energy_parts_texts_and_the_map_is_what_learns(clip, pictures):
    recipe = TIMA.of(**(SMALL | {"updates": 3}), energy=10.0, distil_texts=0.0, rate=1e-2)
    tuned, prompts = train(recipe, clip, pictures).clip, role("cifar10").prompts
    assert energy(tuned.text_features(prompts)) < energy(clip.text_features(prompts))
    assert not torch.equal(tuned.text_transform.matrix, torch.eye(len(tuned.text_transform.matrix)))
    names = {name for name, value in tuned.network.state_dict().items() if not name.startswith("visual.")}
    assert all(torch.equal(tuned.network.state_dict()[name], clip.network.state_dict()[name]) for name in names)


# --- all --------------------------------------------------------------------------------------------------------------


@component
class Mapped(TeCoA):
    """A recipe of one's own: a loss is all it needs."""

    def loss(self, batch):
        return F.cross_entropy(batch.logits(batch.features(batch.attacked_images), batch.class_texts), batch.labels)


@pytest.mark.parametrize("kind", [PMGAFT, TGAZSR, FARE, LAAT, TIMA, Mapped])
def test_recipes_train_and_their_models_load(clip, pictures, tmp_path, kind):
    start = clip.digest
    run = train(kind.of(**SMALL), clip, pictures)
    assert all(map(math.isfinite, run.losses))
    assert run.batch().original is clip
    assert clip.digest == start != run.clip.digest
    loaded, prompts = models.load(models.save(run.clip, tmp_path), device="cpu"), role("cifar10").prompts
    assert loaded.digest == run.clip.digest
    torch.testing.assert_close(loaded.text_features(prompts), run.clip.text_features(prompts))
    assert torch.equal(loaded.text_features(prompts), clip.text_features(prompts)) == (kind not in (LAAT, TIMA))
    assert interpolate(run.clip, run.clip, 0.5).digest == run.clip.digest


def test_without_a_budget_only_the_cross_entropy_is_left(clip, pictures):
    """What compares with the guide is zero before the first update."""
    for kind in (PMGAFT, TGAZSR):
        run = Run(kind.of(**(SMALL | {"eps": 0.0})), clip, pictures)
        batch = run.batch()
        plain = F.cross_entropy(batch.logits(batch.features(batch.images), batch.class_texts), batch.labels)
        assert run.recipe.loss(batch).item() == pytest.approx(plain.item(), abs=1e-3)
    run = Run(FARE.of(**(SMALL | {"eps": 0.0})), clip, pictures)
    assert run.recipe.loss(run.batch()).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (PMGAFT, {"towards": "both"}, "towards 'both'"),
        (PMGAFT, {"reduction": "max"}, "reduction 'max'"),
        (PMGAFT, {"normalisation": "none"}, "normalisation 'none'"),
        (PMGAFT, {"general": -1}, "general=-1"),
        (PMGAFT, {"temperature": 0}, "temperature=0"),
        (TGAZSR, {"unit": "rows"}, "unit 'rows'"),
        (TGAZSR, {"distance": "l3"}, "distance 'l3'"),
        (TGAZSR, {"attacked": -1}, "attacked=-1"),
        (FARE, {"distance": "l3"}, "distance 'l3'"),
        (FARE, {"clean": -1}, "clean=-1"),
        (LAAT, {"anchors": "bent"}, "anchors 'bent'"),
        (LAAT, {"temperature": 0}, "temperature=0"),
        (TIMA, {"widened": "all"}, "widened 'all'"),
        (TIMA, {"energy": -1}, "energy=-1"),
    ],
)
def test_wrong_settings_are_named(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind.of(**SMALL, **wrong)
