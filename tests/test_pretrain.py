"""Training CLIPs from nothing: the losses, the stream, folders that open_clip loads, and an adversary on the way."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

import adversary
import photographs
import pretraining
from adversary import Adversary
from drawings import STEPS, Drawings, fits
from pretraining import contrastive_loss, learning_rate, train_clip
from robustclip import models
from robustclip.data import tinyworld
from robustclip.data.grammar import Speaker, vocabulary
from robustclip.data.tinyworld import ANY, is_held_out
from robustclip.study import scale
from robustclip.study.grown import grown
from robustclip.training import checkpoint

models._torchvision.prepare()
from open_clip.loss import ClipLoss  # noqa: E402  torchvision has to be prepared first

WORDS = len(vocabulary())


def unit_rows(n: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- the contrastive loss ---------------------------------------------------------------------------------------------


@given(n=st.integers(2, 12), seed=st.integers(0, 1000), scale=st.floats(1, 100))
@settings(max_examples=30, deadline=None)
def test_loss_is_that_of_clip_when_captions_fit_one_picture(n, seed, scale):
    images, texts, scale = unit_rows(n, seed), unit_rows(n, seed + 1), torch.tensor(scale)
    assert torch.allclose(contrastive_loss(images, texts, scale, torch.eye(n)), ClipLoss()(images, texts, scale))


def test_loss_spreads_targets_over_all_that_fit():
    """Checked against the sums written out."""
    images, texts, scale = unit_rows(3, 1), unit_rows(3, 2), 5.0
    fit = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 1, 1]])
    logits = (scale * images @ texts.T).tolist()
    total = 0.0
    for matrix, true in ((logits, fit.tolist()), (list(zip(*logits, strict=True)), fit.T.tolist())):
        for row, targets in zip(matrix, true, strict=True):
            normaliser = math.log(sum(math.exp(value) for value in row))
            rights = [normaliser - value for value, target in zip(row, targets, strict=True) if target]
            total += sum(rights) / len(rights) / 3 / 2
    assert contrastive_loss(images, texts, torch.tensor(scale), fit).item() == pytest.approx(total, rel=1e-5)


def test_what_nothing_fits_does_not_count():
    images, texts, scale = unit_rows(4, 1), unit_rows(3, 2), torch.tensor(5.0)
    fit = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]])
    rows = F.cross_entropy(scale * images[:2] @ texts.T, torch.tensor([0, 1]))
    columns = F.cross_entropy((scale * images @ texts.T).T[:2], torch.tensor([0, 1]))
    expected = ((rows + columns) / 2).item()
    assert contrastive_loss(images, texts, scale, fit).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_true_but_not_meant_is_no_choice_of_a_picture():
    """The first picture is a poodle, the second a dog; "a dog" is true of both and meant for the second."""
    images, texts, scale = unit_rows(2, 1), unit_rows(3, 2), torch.tensor(5.0)
    fit, meant = torch.tensor([[1.0, 1, 0], [0, 1, 0]]), torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    logits = scale * images @ texts.T
    poodle = F.cross_entropy(logits[:1, [0, 2]], torch.tensor([0]), label_smoothing=0.1)
    dog = F.cross_entropy(logits[1:], torch.tensor([1]), label_smoothing=0.1)
    columns = F.cross_entropy(logits.T[:2], torch.tensor([[1.0, 0], [0.5, 0.5]]))
    expected = ((poodle + dog) / 2 + columns) / 2
    loss = contrastive_loss(images, texts, scale, fit, meant, smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_smoothing_is_that_of_torch():
    images, texts, scale = unit_rows(3, 1), unit_rows(3, 2), torch.tensor(5.0)
    logits, rows = scale * images @ texts.T, torch.arange(3)
    expected = (F.cross_entropy(logits, rows, label_smoothing=0.1) + F.cross_entropy(logits.T, rows)) / 2
    assert contrastive_loss(images, texts, scale, torch.eye(3), smoothing=0.1).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_loss_treats_equal_captions_alike():
    """CLIP's own loss calls the second of two equal captions a mistake; this one does not."""
    images, twice = unit_rows(3, 5), unit_rows(3, 6)[[0, 0, 1]]
    both = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    difference = []
    for fit in (both, torch.eye(3)):
        texts = twice.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(contrastive_loss(images, texts, torch.tensor(10.0), fit), texts)
        difference.append((gradient[0] - gradient[1]).norm().item())
    assert difference[0] < 1e-6
    assert difference[1] > 1e-2


def test_fits_by_hand():
    pictures = torch.tensor([[1, 3, 5], [1, 3, 6], [1, 4, 5]])
    said = torch.tensor([[1, 3, ANY], [ANY, ANY, 5], [1, 4, 6], [ANY, ANY, ANY]])
    assert fits(pictures, said).tolist() == [[1, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1]]


def test_every_caption_fits_its_own_picture_and_few_others():
    for batch in range(3):
        scenes = tinyworld.training_scenes(batch)
        meaning, said = scenes.meaning(), Speaker(batch).captions(scenes)[1]
        fit = fits(meaning, said)
        assert (fit.diagonal() == 1).all()
        assert 1 < fit.sum(0).mean() < 10
        row, column = 17, 40
        agrees = [s in (ANY, m) for m, s in zip(meaning[row].tolist(), said[column].tolist(), strict=True)]
        assert fit[row, column] == all(agrees)


# --- what the models see ----------------------------------------------------------------------------------------------


def test_training_never_shows_a_held_out_pair():
    pairs = set()
    for batch in range(20):
        scenes = tinyworld.training_scenes(batch)
        assert not is_held_out(scenes.shape, scenes.color).any()
        pairs |= set(zip(scenes.shape[:, 0].tolist(), scenes.color[:, 0].tolist(), strict=True))
    shapes, colors = (range(len(tinyworld.values(name))) for name in ("shape", "color"))
    everything = {(shape, color) for shape in shapes for color in colors}
    assert pairs == {pair for pair in everything if not is_held_out(*pair)}, "and shows all others"


def test_training_styles_follow_their_shares():
    style = torch.cat([tinyworld.training_scenes(batch).style for batch in range(20)])
    assert sum(tinyworld.STYLE_SHARES.values()) == pytest.approx(1)
    for name, share in tinyworld.STYLE_SHARES.items():
        measured = (style == tinyworld.index("style", name)).float().mean()
        assert measured == pytest.approx(share, abs=4 * (share / len(style)) ** 0.5)


def test_stream_of_steps(tmp_path):
    stream = Drawings(tmp_path)
    step = stream[3]
    assert step.images.shape == (tinyworld.BATCH, 3, tinyworld.SIZE, tinyworld.SIZE)
    assert step.tokens.shape == (tinyworld.BATCH // 2, pretraining.CONTEXT)
    assert step.fits.shape == (tinyworld.BATCH, tinyworld.BATCH // 2)
    assert (step.fits.diagonal() == 1).all(), "a caption fits the picture it was said about"
    assert all(torch.equal(*pair) for pair in zip(stream[3], step, strict=True))
    assert not torch.equal(stream[4].images, step.images)


# --- the schedule -----------------------------------------------------------------------------------------------------


@given(steps=st.integers(102, 5000))
@settings(max_examples=20, deadline=None)
def test_learning_rate_rises_then_falls_to_zero(steps):
    rates = [learning_rate(step, steps) for step in range(steps + 1)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[:100] == sorted(rates[:100])
    assert max(rates) == rates[99] == rates[100] == 1
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[100 + (steps - 100) // 2] == pytest.approx(0.5, abs=2 / (steps - 100))


# --- a few steps ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Batches of 16, so that two steps take a moment."""
    monkeypatch.setattr(tinyworld, "BATCH", 16)


def trained(folder, steps, kind=Drawings, **settings):
    """The facts of a short run."""
    return train_clip(folder, kind(folder), steps, workers=0, **settings)


class Kinds(Drawings):
    """Drawings that come with the number of their kind."""

    kinds = 7

    def __getitem__(self, step):
        found = super().__getitem__(step)
        return found._replace(kinds=torch.arange(len(found.images)) % self.kinds)


def killed_at(last):
    """A stream whose process dies before it shows a step."""

    class Killed(Kinds):
        def __getitem__(self, step):
            if step == last:
                raise KeyboardInterrupt
            return super().__getitem__(step)

    return Killed


def test_clip_trains_and_loads(small, tmp_path, capsys):
    before = torch.get_rng_state()
    run = trained(tmp_path / "one", 2, report_every=1)
    assert torch.equal(torch.get_rng_state(), before), "the global random state is restored"
    assert (run["steps"], run["images"]) == (2, 32)
    assert capsys.readouterr().out.count("loss") == 2

    clip = models.load(tmp_path / "one", device="cpu")
    assert clip.image_size == (48, 48)
    assert clip.network.vocab_size == WORDS
    assert clip.tokenizer(["a red star"]).shape == (1, pretraining.CONTEXT)
    features = clip.encode_images(torch.rand(2, 3, 32, 32))
    assert features.shape == (2, pretraining.CLIP_CONFIG["model_cfg"]["embed_dim"])

    trained(tmp_path / "two", 2)
    assert models.load(tmp_path / "two", device="cpu").digest == clip.digest, "same seed, same weights"
    trained(tmp_path / "three", 1)
    assert models.load(tmp_path / "three", device="cpu").digest != clip.digest, "a step changes the weights"
    assert "vocab_size" not in pretraining.CLIP_CONFIG["model_cfg"]["text_cfg"], "the template is left alone"


def test_an_interrupted_run_ends_with_the_same_weights(small, tmp_path, capsys):
    trained(tmp_path / "whole", 3, Kinds, report_every=1)
    whole = capsys.readouterr().out.splitlines()
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 3, killed_at(2), report_every=1)
    assert (tmp_path / "cut" / checkpoint.CHECKPOINT).exists()
    trained(tmp_path / "cut", 3, Kinds, report_every=1)
    said = [line.rpartition("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [line.rpartition("  ")[0] for line in whole], "each step is done once, with the same loss"
    digests = [models.load(tmp_path / name, device="cpu").digest for name in ("whole", "cut")]
    assert digests[0] == digests[1]
    assert not (tmp_path / "cut" / checkpoint.CHECKPOINT).exists()


def test_a_checkpoint_of_another_run_is_refused(small, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, 2, killed_at(1), report_every=1)
    with pytest.raises(ValueError, match=r"another run \(steps differ\)"):
        trained(tmp_path, 5)


@pytest.mark.slow
def test_clip_learns(small, tmp_path, capsys, monkeypatch):
    """Thirty steps without warm-up on the same sixteen pictures bring the loss down."""
    monkeypatch.setattr(pretraining, "learning_rate", lambda step, steps: 1.0)
    honest = Drawings.__getitem__
    monkeypatch.setattr(Drawings, "__getitem__", lambda self, step: honest(self, 0))
    trained(tmp_path, 30, report_every=1)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.6 * losses[0]


def test_the_schedule_is_followed(small, tmp_path, monkeypatch):
    """A learning rate of zero after the first step leaves the weights where that step put them."""
    monkeypatch.setattr(pretraining, "learning_rate", lambda step, steps: float(step == 0))
    for steps in (1, 3):
        trained(tmp_path / str(steps), steps)
    one, three = (load_file(tmp_path / steps / models.WEIGHTS)["text_projection"] for steps in ("1", "3"))
    assert torch.equal(one, three)


def test_a_classifier_beside_the_texts_changes_what_is_learned_and_is_not_saved(small, tmp_path):
    for kind in (Drawings, Kinds):
        trained(tmp_path / kind.__name__, 2, kind)
    told, plain = (load_file(tmp_path / kind.__name__ / models.WEIGHTS) for kind in (Kinds, Drawings))
    assert told.keys() == plain.keys()
    assert not torch.equal(told["visual.conv1.weight"], plain["visual.conv1.weight"])


# --- an adversary -----------------------------------------------------------------------------------------------------


@pytest.fixture
def learning(tmp_path, small):
    """A CLIP from nothing, a step of its training, and the loss on it."""
    stream = Drawings(tmp_path)
    pretraining._write_config(tmp_path, stream.text)
    torch.manual_seed(0)
    learner = torch.nn.ModuleDict({"clip": pretraining.build_clip(tmp_path)})
    step = stream[0]
    return learner, step, pretraining._Objective(learner, step, 0.0)


def test_an_adversary_raises_the_loss_within_its_budget(learning):
    learner, step, loss = learning
    clean, eps = step.images.float() / 255, 6 / 255
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    shown, tokens = Adversary(eps)(learner, loss, clean, step.tokens, step=99, steps=100)
    assert torch.equal(tokens, step.tokens)
    assert (shown - clean).abs().max() <= eps + 1e-6
    assert 0 <= shown.min() <= shown.max() <= 1
    assert learner.training, "learning goes on in training mode"
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items()), "and statistics stay"
    assert all(weight.grad is None for weight in learner.parameters())
    learner.eval()
    with torch.no_grad():
        noisy = [(clean + eps * (2 * torch.rand_like(clean) - 1)).clamp(0, 1) for _ in range(5)]
        assert loss(shown, tokens) > max(loss(points, tokens) for points in (clean, *noisy)) + 0.002


def test_the_budget_of_an_adversary_grows(learning):
    learner, step, loss = learning
    clean = step.images.float() / 255
    reach = [
        (Adversary(0.1, steps=1)(learner, loss, clean, step.tokens, at, 100)[0] - clean).abs().max().item()
        for at in (0, 14, 29, 99)
    ]
    assert reach == pytest.approx([0.1 / 30, 0.05, 0.1, 0.1], rel=1e-3)


def test_a_word_of_each_caption_is_swapped_for_the_best_proposal(learning):
    """Against every allowed swap of the first captions, one by one, on the slope of the loss."""
    learner, step, loss = learning
    learner.eval()
    pixels, language = step.images.float() / 255, "tinyworld-mlm"
    embedding = learner["clip"].token_embedding
    found = adversary.swapped(embedding, lambda said: loss(pixels, said), step.tokens, language)
    changed = found != step.tokens
    assert (changed.sum(1) <= 1).all()
    assert changed.any()

    offset = torch.zeros(*step.tokens.shape, embedding.embedding_dim, requires_grad=True)
    hook = embedding.register_forward_hook(lambda module, inputs, output: output + offset)
    (slope,) = torch.autograd.grad(loss(pixels, step.tokens), offset)
    hook.remove()
    proposals, vocabulary = adversary.proposed(step.tokens, language), adversary.vocabulary(language)
    for row in range(4):
        best, expected = 0.0, step.tokens[row].tolist()
        for place, token in enumerate(step.tokens[row].tolist()):
            after = vocabulary[step.tokens[row, place + 1]] if place + 1 < pretraining.CONTEXT else ""
            if not vocabulary[token].isalpha() or token < 5 or after.startswith("##"):
                continue
            for other in proposals[row, place].tolist():
                gain = (slope[row, place] @ (embedding.weight[other] - embedding.weight[token])).item()
                if vocabulary[other].isalpha() and other >= 5 and gain > best + 1e-9:
                    best, expected = gain, step.tokens[row].tolist()
                    expected[place] = other
        assert found[row].tolist() == expected


@pytest.mark.slow
def test_an_interrupted_run_against_an_adversary_ends_with_the_same_weights(small, tmp_path):
    attacked = {"adversary": Adversary(6 / 255, language="tinyworld-mlm"), "report_every": 1}
    trained(tmp_path / "whole", 3, Kinds, **attacked)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", 3, killed_at(2), **attacked)
    with pytest.raises(ValueError, match=r"adversary"):
        trained(tmp_path / "cut", 3, Kinds)
    trained(tmp_path / "cut", 3, Kinds, **attacked)
    trained(tmp_path / "plain", 3, Kinds)
    digests = [models.load(tmp_path / name, device="cpu").digest for name in ("whole", "cut", "plain")]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("name", "clean"), [("full", STEPS), ("photo", photographs.STEPS)])
def test_from_the_ground_up_costs_what_pre_training_and_fine_tuning_cost_together(name, clean):
    """In image passes, forward and backward together; steps of fine-tuning are smaller."""
    there = scale(name)
    budget = there.training["budget"]
    tuning = budget["updates"] * budget["batch_size"] * (budget["attack_steps"] + 1) / 256
    for title, model in grown(there).items():
        own = there.training["ground-up"][title]
        attacker = Adversary(there.reference_eps, own["attack_steps"], own["language"])
        assert own["attack_steps"] == budget["attack_steps"]
        assert own["steps"] * attacker.passes() == pytest.approx(clean + tuning, abs=attacker.passes())
        assert model.identity["eps"] == there.reference_eps


def test_a_grown_model_is_known_without_its_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBUSTCLIP_GROUND_UP", str(tmp_path))
    both = grown(scale("full"))
    assert len({model.digest for model in both.values()}) == len(both) == 2
    assert grown(scale("quick")) == {}
    with pytest.raises(FileNotFoundError, match=r"tools/pretrain\.py tinyworld-robust`"):
        models.load(both["images"])
    (tmp_path / "tinyworld-robust").mkdir()
    (tmp_path / "tinyworld-robust" / "training.json").write_text('{"steps": 3, "images": 768, "seconds": 5, "x": 1}')
    monkeypatch.setenv("ROBUSTCLIP_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("ROBUSTCLIP_FRESH", "1")  # else what is shipped of the real one is told
    assert both["images"].facts() == {"steps": 3, "images": 768, "seconds": 5}
