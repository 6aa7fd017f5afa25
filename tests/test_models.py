"""Loading any CLIP, classifying with it, and the errors when a name leads nowhere."""

import copy
import functools
import json
from importlib.resources import as_file, files
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from robustclip import models
from robustclip.data.roles import role, tinyworld_samples
from robustclip.fast import fast_classifier
from robustclip.models import (
    CONFIG,
    EMBEDDED,
    WEIGHTS,
    ZeroShotClassifier,
    count_passes,
    load,
    pick_device,
    save,
    zero_shot,
)

models._torchvision.prepare()
import open_clip  # noqa: E402  torchvision has to be prepared first


@pytest.fixture(scope="module")
def clip():
    return load(EMBEDDED[0], device="cpu")


@pytest.fixture(scope="module")
def images():
    return tinyworld_samples("cifar10", "test", 64)[0].float() / 255


@pytest.fixture
def folder(clip, tmp_path):
    """A copy of the embedded model that tests may spoil."""
    return save(clip, tmp_path / "model")


# --- the embedded model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_embedded_model_classifies(clip, name):
    pixels, labels, classes, _ = tinyworld_samples(name, "test", 200)
    with torch.no_grad():
        logits = zero_shot(clip, role(name))(pixels.float() / 255)
    assert logits.shape == (200, len(classes))
    assert (logits.argmax(1) == labels).float().mean() > 3 / len(classes)


def test_features_are_unit_rows(clip, images):
    texts = ["a red star", "a blue fish", "a red star"]
    for features, rows in ((clip.encode_images(images), 64), (clip.encode_texts(texts), 3)):
        assert features.shape[0] == rows
        assert torch.allclose(features.norm(dim=1), torch.ones(rows), atol=1e-5)
    assert torch.equal(clip.encode_texts(texts)[0], clip.encode_texts(texts)[2])


def test_logits_are_scaled_cosines(clip, images):
    prompts = role("cifar10").prompts
    cosines = clip.encode_images(images) @ clip.encode_texts(prompts).T
    logits = ZeroShotClassifier(clip, prompts)(images)
    assert torch.allclose(logits, cosines * clip.network.logit_scale.exp(), atol=1e-4)


def test_gradient_reaches_the_pixels_and_nothing_else(clip, images):
    pixels = images[:4].clone().requires_grad_()
    classifier = zero_shot(clip, role("cifar10"))
    classifier(pixels).logsumexp(1).sum().backward()
    assert (pixels.grad.flatten(1).norm(dim=1) > 0).all()
    assert torch.isfinite(pixels.grad).all()
    assert not any(weight.requires_grad or weight.grad is not None for weight in classifier.parameters())
    assert not any(module.training for module in classifier.modules())


def test_gradient_agrees_with_a_finite_difference(clip, images):
    classifier, pixels = zero_shot(clip, role("cifar10")), images[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(pixels)[0, 0], pixels)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        rise = classifier(images[:1] + step)[0, 0] - classifier(images[:1] - step)[0, 0]
    assert rise.item() == pytest.approx(2 * (step * gradient).sum().item(), rel=0.1)


def test_text_features_are_computed_once(clip, monkeypatch):
    calls = []
    honest = type(clip).encode_texts
    monkeypatch.setattr(type(clip), "encode_texts", lambda self, texts: calls.append(texts) or honest(self, texts))
    texts = [f"a picture of {number} stars" for number in range(3)]
    first = clip.text_features(texts)
    assert clip.text_features(tuple(texts)) is first
    assert len(calls) == 1
    assert not first.requires_grad
    clip.text_features(texts[:2])
    assert len(calls) == 2


def test_text_features_follow_the_weights(clip):
    own = copy.deepcopy(clip)
    texts = ["a red star", "a blue fish"]
    before = own.text_features(texts)
    assert torch.equal(before, clip.text_features(texts))
    with torch.no_grad():
        own.network.text_projection.mul_(-1)
    assert torch.allclose(own.text_features(texts), -before, atol=1e-6)


def test_many_texts_go_in_parts(clip):
    texts = [f"a photo of {number} things" for number in range(600)]
    assert torch.allclose(clip.text_features(texts)[550:], clip.encode_texts(texts[550:]), atol=1e-5)


def test_digest_names_the_weights(clip):
    own = copy.deepcopy(clip)
    assert clip.digest == own.digest == load(device="cpu").digest
    assert len(clip.digest) == 16
    with torch.no_grad():
        own.network.visual.conv1.weight[0, 0, 0, 0] += 1e-3
    changed = own.digest
    assert changed != clip.digest
    optimizer = torch.optim.AdamW(own.network.visual.requires_grad_(True).parameters(), lr=1e-3)
    own.encode_images(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert own.digest not in (changed, clip.digest), "the digest of a model in training is never stale"


def test_digest_covers_buffers(clip):
    own = copy.deepcopy(clip)
    assert own.digest == clip.digest
    name, buffer = next((n, b) for n, b in own.network.named_buffers() if n in own.network.state_dict())
    buffer.add_(1)
    assert own.digest != clip.digest, name


def test_bfloat16(clip, images):
    half = load(EMBEDDED[0], device="cpu", precision="bfloat16")
    assert half.network.logit_scale.dtype == torch.bfloat16
    exact, rough = (zero_shot(model, role("cifar10"))(images) for model in (clip, half))
    assert rough.dtype == torch.float32
    assert (exact.argmax(1) == rough.argmax(1)).float().mean() > 0.85
    with pytest.raises(ValueError, match="unknown precision 'int8'; choose one of: float32, bfloat16, float16"):
        load(EMBEDDED[0], precision="int8")


def test_prompts_are_needed(clip):
    with pytest.raises(ValueError, match="classes are empty; give one name and one prompt per class"):
        ZeroShotClassifier(clip, [])


# --- parity with open_clip's own way ----------------------------------------------------------------------------------


def as_pictures(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


def test_open_clip_itself_loads_the_folder(clip, images, folder):
    """Same pictures, same texts, without a line of ours: the features agree up to PIL's rounding to bytes."""
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    network.eval()
    pixels = torch.stack([preprocess(picture) for picture in as_pictures(images)])
    assert (pixels - clip.preprocess(images)).abs().max() < 2 / 255 / clip.std.min()
    texts = role("cifar10").prompts
    with torch.no_grad():
        theirs = F.normalize(network.encode_image(pixels), dim=-1)
        assert F.cosine_similarity(theirs, clip.encode_images(images)).min() > 0.98
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(texts)
        words = F.normalize(network.encode_text(tokens), dim=-1)
        assert torch.allclose(words, clip.encode_texts(texts), atol=1e-5)


def test_save_and_load_round_trip(clip, images, folder):
    again = load(folder, device="cpu")
    assert again.digest == clip.digest
    classifiers = (zero_shot(model, role("cifar10")) for model in (clip, again))
    first, second = (classifier(images) for classifier in classifiers)
    assert torch.equal(first, second)
    assert again.name == str(folder)
    names = {path.name for path in folder.iterdir()}
    assert {CONFIG, WEIGHTS, "tokenizer.json"} <= names
    assert not names & {"README.md", "training.json", f"{WEIGHTS}.tmp"}, "no card of other weights, nothing half done"


def test_save_in_place_keeps_the_folder_whole(folder):
    own = load(folder, device="cpu")
    names = sorted(path.name for path in folder.iterdir())
    with torch.no_grad():
        own.network.logit_scale.add_(0.5)
    save(own, folder)
    assert sorted(path.name for path in folder.iterdir()) == names
    assert load(folder, device="cpu").digest == own.digest


def test_save_needs_a_configuration(clip, tmp_path):
    nameless = models.Clip(copy.deepcopy(clip.network), clip.tokenizer, "by-hand")
    with pytest.raises(ValueError, match="'by-hand' has no config to be written; make it with `load`"):
        save(nameless, tmp_path)


def without_weights(monkeypatch):
    """open_clip starts from random weights instead of downloading some."""
    honest = open_clip.create_model
    monkeypatch.setattr("robustclip.hub.fetch", lambda name: None)

    def create(architecture, **options):
        options |= {"require_pretrained": False, "load_weights": False}
        monkeypatch.setattr("open_clip.factory.download_pretrained", lambda *_, **__: "unused")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return honest(architecture, **options)

    monkeypatch.setattr(open_clip, "create_model", create)


@pytest.mark.parametrize(("weights", "quick"), [("openai", True), ("laion2b_e16", False)])
def test_a_pretrained_pair_is_saved_and_comes_back(small_vit, monkeypatch, tmp_path, weights, quick):
    """What its config says, activation included: the features are the same to the last bit."""
    without_weights(monkeypatch)
    clip = load(f"ViT-B-32/{weights}", device="cpu")
    monkeypatch.undo()
    again = load(save(clip, tmp_path), device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CONFIG, WEIGHTS])
    assert again.network.visual.preprocess_cfg.keys() == clip.network.visual.preprocess_cfg.keys()
    assert torch.equal(again.mean, clip.mean)
    assert type(again.network.transformer.resblocks[0].mlp.gelu).__name__ == ("QuickGELU" if quick else "GELU")
    pixels, texts = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0)), ["a red star", "a cup & more"]
    assert torch.equal(again.encode_images(pixels), clip.encode_images(pixels))
    assert torch.equal(again.encode_texts(texts), clip.encode_texts(texts))
    assert again.digest == clip.digest


@pytest.fixture
def small_vit(monkeypatch):
    """open_clip's ViT-B-32 has one layer a tower."""
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", config)


@pytest.fixture(scope="module")
def random_vit(tmp_path_factory):
    """A ViT-B-32 of two layers a tower, randomly initialised, in open_clip's folder format."""
    folder = tmp_path_factory.mktemp("vit")
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = open_clip.create_model("ViT-B-32", **config)
    preprocess = {key: network.visual.preprocess_cfg[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(network.state_dict(), folder / WEIGHTS)
    return folder


def test_a_vit_from_disk_classifies(random_vit):
    clip = load(random_vit, device="cpu")
    assert clip.image_size == (224, 224)
    classifier = zero_shot(clip, role("cifar10"))
    random = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 224, 224, generator=random, requires_grad=True)
    logits = classifier(images)
    assert logits.shape == (2, 10)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{random_vit}", load_weights=False)
    whole = (images.detach() * 255).round() / 255
    theirs = torch.stack([preprocess(picture) for picture in as_pictures(whole)])
    assert torch.allclose(clip.preprocess(whole), theirs, atol=1e-5)
    assert torch.equal(load(random_vit, precision="bfloat16", device="cpu").mean, clip.mean), "statistics stay exact"


def test_pictures_of_any_size_are_resized(clip):
    image = torch.linspace(0, 1, 64).repeat(1, 3, 64, 1)
    assert clip.preprocess(image).shape[-2:] == clip.image_size
    assert clip.encode_images(torch.rand(1, 3, 40, 56)).shape[0] == 1


# --- names that lead nowhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tinyworld", "no/such/folder", "ViT-B-32", "nobody/nothing", ""])
def test_unknown_names(name):
    with pytest.raises(
        FileNotFoundError, match=r"no CLIP called .*Give tinyworld-clip or photo-clip, a folder .* 'hf-hub:"
    ):
        load(name)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_missing_files(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing}' does not exist"):
        load(folder)


def test_missing_tokenizer(folder):
    for path in folder.iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            path.unlink()
    with pytest.raises(ValueError, match=r"cannot read the CLIP in .*restore or retrain it"):
        load(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model_cfg": {}}', '{"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}}']
)
def test_corrupt_configuration(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"cannot read the CLIP in .*restore or retrain it"):
        load(folder)


def test_corrupt_weights(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cannot read the CLIP in .*restore or retrain it"):
        load(folder)


def test_weights_of_another_model(folder):
    weights = load_file(folder / WEIGHTS)
    weights.popitem()
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match="cannot read the CLIP"):
        load(folder)


def test_unknown_weights_of_a_known_architecture():
    with pytest.raises(ValueError, match=r"knows no 'ViT-B-32' weights 'openia'; choose one of: .*openai"):
        load("ViT-B-32/openia")


@pytest.mark.parametrize("name", ["ViT-B-32/openai", "hf-hub:nobody/nothing"])
def test_offline(monkeypatch, tmp_path, name):
    """Nobody listens where the hub should be, and its cache is empty: open_clip is not even asked."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("open_clip.create_model", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(
        OSError, match=f"could not fetch '{name}': .*connect to the network, copy the hub's cache"
    ) as error:
        load(name)
    assert len(str(error.value).splitlines()) == 1


def refuse(*_, **__):
    raise OSError("no network")


@pytest.fixture
def hub(monkeypatch):
    """The hub's cache holds the embedded model as org/model."""
    with as_file(files("robustclip").joinpath(f"assets/{EMBEDDED[0]}")) as folder:
        config = json.loads((folder / CONFIG).read_text())
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(folder)
        monkeypatch.setattr("robustclip.hub.fetch", lambda name: None)
        monkeypatch.setattr("open_clip.factory._get_hf_config", lambda *_, **__: copy.deepcopy(config))
        monkeypatch.setattr("open_clip.factory.download_pretrained_from_hf", lambda *_, **__: str(folder / WEIGHTS))
        yield monkeypatch


def test_a_hub_model_without_weights_is_an_error(hub):
    """open_clip would log a warning and go on with random weights."""
    hub.setattr("open_clip.factory.download_pretrained_from_hf", refuse)
    with pytest.raises(OSError, match="could not fetch 'hf-hub:org/model'"):
        load("hf-hub:org/model")


def test_a_hub_model_in_the_cache_loads(clip, images, hub, tmp_path):
    """What the hub's cache returns is used: configuration, weights and tokenizer files; `save` writes them all."""
    own = load("hf-hub:org/model", device="cpu")
    assert own.digest == clip.digest
    assert own.name == "hf-hub:org/model"
    hub.undo()
    again = load(save(own, tmp_path), device="cpu")
    assert torch.equal(again.encode_images(images), own.encode_images(images))
    texts = ["a red star", "two blue fish & more"]
    assert torch.equal(again.encode_texts(texts), own.encode_texts(texts))


@pytest.mark.parametrize(
    ("name", "quick"), [("ViT-B-32/openai", True), ("ViT-B-32/laion400m_e32", True), ("ViT-B-32/laion2b_e16", False)]
)
def test_activation_follows_the_weights(monkeypatch, name, quick):
    """Weights trained with QuickGELU are computed with it: open_clip only warns about the mismatch."""
    asked = {}

    def create(architecture, **options):
        asked.update(options, architecture=architecture)
        raise OSError("stop here")

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr("robustclip.hub.fetch", lambda name: None)
    with pytest.raises(OSError, match="stop here"):
        load(name)
    assert asked["force_quick_gelu"] is quick
    assert (asked["architecture"], asked["pretrained"]) == tuple(name.split("/"))


def test_a_folder_goes_before_an_architecture(clip, tmp_path, monkeypatch):
    """A local folder that happens to be called like an open_clip pair."""
    monkeypatch.chdir(tmp_path)
    save(clip, tmp_path / "ViT-B-32" / "openai")
    assert load("ViT-B-32/openai", device="cpu").digest == clip.digest


# --- devices ----------------------------------------------------------------------------------------------------------


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "meta"])
def test_devices_that_do_not_exist(name):
    with pytest.raises(ValueError, match=f"cannot compute on device '{name}' .*; use auto, cpu, or cuda with a GPU"):
        pick_device(name)


def test_auto_takes_the_gpu(monkeypatch):
    gpu = SimpleNamespace(device=torch.device("cuda", 0), cpu=lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda n, device: {"cuda": gpu}[device])
    assert pick_device("auto") == gpu.device


# --- what recipes look at, and what passes cost -----------------------------------------------------------------------


def test_raw_images_are_features_before_scaling(clip, images):
    raw = clip.raw_images(images)
    assert torch.equal(F.normalize(raw, dim=-1), clip.encode_images(images))
    assert (raw.norm(dim=1) - 1).abs().max() > 1e-3


def test_tokens_of_a_transformer(random_vit):
    """7 x 7 places; without attention between them each place is what the tower makes of it alone."""
    clip, images = load(random_vit, device="cpu"), torch.rand(2, 3, 224, 224)
    raw, tokens = clip.raw_and_tokens(images.requires_grad_())
    assert tokens.shape == (2, 49, 512)
    assert torch.equal(raw, clip.raw_images(images))
    assert torch.equal(tokens, clip.image_tokens(images))
    visual = clip.network.visual
    visual.output_tokens = True
    theirs = visual(clip.preprocess(images))[1] @ visual.proj
    visual.output_tokens = False
    assert torch.allclose(tokens, theirs, atol=1e-5)
    (gradient,) = torch.autograd.grad(tokens[0].sum(), images)
    assert gradient[0].abs().sum() > 0
    assert not visual.transformer._forward_hooks, "nothing stays hooked"


def test_tokens_of_a_residual_network(clip, images):
    """Each head's weighted mean of the tokens, that of the mean place included, is the raw feature."""
    wide = F.interpolate(images[:2], 96)
    clip = copy.deepcopy(clip)
    clip.image_size = (96, 96)
    pool = clip.network.visual.attnpool
    with torch.no_grad():
        pool.positional_embedding = torch.nn.Parameter(torch.randn(10, pool.positional_embedding.shape[1]) / 10)
        pool.q_proj.weight.zero_(), pool.q_proj.bias.zero_()  # equal weights
    raw, tokens = clip.raw_and_tokens(wide)
    assert tokens.shape == (2, 9, 64)
    seen = []
    hook = pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    clip.raw_images(wide)
    hook.remove()
    mean = pool.c_proj(pool.v_proj(seen[0].mean((2, 3)) + pool.positional_embedding[0]))
    assert torch.allclose((tokens.sum(1) + mean) / 10, raw, atol=1e-4)
    assert not pool._forward_pre_hooks


def test_towers_without_tokens_say_so(clip):
    other = copy.deepcopy(clip)
    other.network.visual.attnpool = torch.nn.Flatten()
    with pytest.raises(ValueError, match="tower ModifiedResNet has no tokens; give a plain ViT or ModifiedResNet"):
        other.image_tokens(torch.rand(1, 3, 48, 48))


def test_passes_are_counted(clip, images):
    classifier, pixels = zero_shot(clip, role("cifar10")), images[:5].clone().requires_grad_()
    with count_passes() as passes:
        classifier(images)
        assert (passes.forward, passes.backward) == (64, 0)
        with count_passes() as inner:
            torch.autograd.grad(classifier(pixels).sum(), pixels)
        with torch.no_grad():
            classifier(pixels)
        clip.image_tokens(images[:3])
    classifier(images)
    assert (inner.forward, inner.backward) == (5, 5)
    assert (passes.forward, passes.backward) == (64 + 5 + 5 + 3, 5)


def test_passes_of_the_fast_twin_are_those_of_real_images(clip, images):
    twin, pixels = fast_classifier(zero_shot(clip, role("cifar10"))), images[:5].clone().requires_grad_()
    with count_passes() as passes:
        torch.autograd.grad(twin(pixels).sum(), pixels)
    assert (passes.forward, passes.backward) == (5, 5)


def test_axes_as_classes_show_the_features(clip, images):
    axes = ZeroShotClassifier.of_axes(clip)
    logits = axes(images)
    assert logits.shape == (64, 64)
    assert torch.allclose(F.normalize(logits, dim=1), clip.encode_images(images), atol=1e-6)
    assert len(axes.classes) == 64


# --- images that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda images: (images * 255).byte(), "must be floating point .*divide bytes by 255"),
        (lambda images: images * 255, r"must lie in \[0, 1\], got .*bytes are divided by 255"),
        (lambda images: images.numpy(), "must be a torch.Tensor, got ndarray"),
        (lambda images: images[0], r"must have shape \(n, 3, height, width\)"),
        (lambda images: images / 0, "contain NaN or infinity"),
    ],
)
def test_classifiers_refuse_what_is_not_an_image(clip, images, spoil, message):
    with pytest.raises(ValueError, match=message):
        zero_shot(clip, role("cifar10"))(spoil(images[:2]))


def test_classifiers_take_the_noise_of_a_defense(clip, images):
    classifier = zero_shot(clip, role("cifar10"))
    assert classifier(images[:2] + torch.randn_like(images[:2])).shape == (2, 10)
    assert classifier(images[:0]).shape == (0, 10)


def test_one_text_is_not_many_classes(clip):
    with pytest.raises(ValueError, match="='a photo of a cat' is not allowed; give a list"):
        ZeroShotClassifier(clip, "a photo of a cat")


def test_names_may_be_paths_of_any_kind(folder):
    class Place:
        def __fspath__(self):
            return str(folder)

    assert load(Place(), device="cpu").name == str(folder)
    with pytest.raises(FileNotFoundError, match="no CLIP called '~nosuch/model'"):
        load("~nosuch/model")


# --- models that functions hold ---------------------------------------------------------------------------------------

LATER = torch.nn.Linear(2, 2)


class Holder:
    def __init__(self, model):
        self.model = model

    def __call__(self, images):
        return self.model(images)

    def method(self, images):
        return self.model(images)


def test_modules_that_a_function_holds_are_found():
    model, inside = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    twice = lambda images: inside(model(images))  # noqa: E731
    assert models.modules_of(model) == [model]
    for function, expected in (
        (lambda images: model(images), [model]),
        (lambda images: twice(images), [inside, model]),
        (lambda images: LATER(images), [LATER]),
        (functools.partial(lambda net, images: net(images), model), [model]),
        (model.forward, [model]),
        (Holder(model), [model]),
        (Holder(model).method, [model]),
        (lambda images: images, []),
        (torch.nn.functional.relu, []),
    ):
        found = models.modules_of(function)
        assert len(found) == len(expected)
        assert {id(one) for one in found} == {id(one) for one in expected}
