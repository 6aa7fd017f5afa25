"""BERT-Attack in both readings, against images and label-aware: hand-made models, naive loops and the embedded CLIP."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import BertTokenizer, BertTokenizerFast

from robustclip import models
from robustclip.attacks import language, text
from robustclip.attacks.language import LanguageModel, Thesaurus, embedded_language, load_language_model, thesaurus
from robustclip.attacks.text import (
    OBJECTIVES,
    BertAttack,
    LabelAwareBertAttack,
    SynonymAttack,
    TextAttack,
    cosine_distance,
    kl_divergence,
    stop_words,
)
from robustclip.data import grammar, lexicon
from robustclip.data.grammar import Speaker
from robustclip.data.roles import role, role_names, tinyworld_samples, tinyworld_scenes

RELEASED = {"offset": "shifted", "end_token": False}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["red", "blue", "green", "fish", "star", "crab", "wet", "sea", "##weed", "##horse", "a", "of", "this", ","]


# --- hand-made models -------------------------------------------------------------------------------------------------


class Guesser(nn.Module):
    """A masked language model that looks at one token only: `table[token]` lists its guesses with their logits."""

    def __init__(self, tokenizer, table: dict[str, dict[str, float]]) -> None:
        super().__init__()
        self.config, self.device, self.rows = SimpleNamespace(max_position_embeddings=64), torch.device("cpu"), 0
        self.logits = torch.full((len(tokenizer), len(tokenizer)), -50.0)
        for token, guesses in table.items():
            for guess, logit in guesses.items():
                self.logits[tokenizer.convert_tokens_to_ids([token, guess])[0]][
                    tokenizer.convert_tokens_to_ids(guess)
                ] = logit

    def forward(self, input_ids):
        self.rows += len(input_ids)
        return SimpleNamespace(logits=self.logits[input_ids])


class BagOfWords(nn.Module):
    """A CLIP whose text features are normalised sums of word vectors and whose image features are a linear map."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, self.seen, self.device = width, [], torch.device("cpu")
        self.logit_scale, self.tokenizer = torch.tensor(20.0), None
        self.map = nn.Linear(3 * 4 * 4, width, bias=False)

    def vector(self, word: str) -> torch.Tensor:
        seed = int.from_bytes(word.lower().encode()[-6:], "big")
        return torch.randn(self.width, generator=torch.Generator().manual_seed(seed))

    def encode_texts(self, texts):
        self.seen += texts
        return F.normalize(torch.stack([sum(self.vector(word) for word in text.split() or [""]) for text in texts]))

    def encode_images(self, images):
        return F.normalize(self.map(images.flatten(1)), dim=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "vocab.txt"
    path.write_text("\n".join(SPECIAL + WORDS), encoding="utf-8")
    return BertTokenizerFast(vocab_file=str(path))


@pytest.fixture
def toy(tokenizer, monkeypatch):
    """Makes every attack use a hand-made table of guesses."""

    def use(table: dict[str, dict[str, float]]) -> LanguageModel:
        model = LanguageModel(Guesser(tokenizer, table), tokenizer)
        monkeypatch.setattr(text, "load_language_model", lambda name, clip: model)
        return model

    return use


@pytest.fixture(scope="module")
def clip():
    return models.load(device="cpu")


@pytest.fixture(scope="module")
def held_out():
    return {
        name: (images.float() / 255, labels)
        for name in ("cifar10", "cifar100")
        for images, labels, *_ in [tinyworld_samples(name, "train", 128)]
    }


def changed(before: str, after: str) -> list[int]:
    pairs = itertools.zip_longest(before.split(" "), after.split(" "))
    return [place for place, (one, two) in enumerate(pairs) if one != two]


# --- where substitutes come from --------------------------------------------------------------------------------------


EVERY = {
    "[CLS]": {"wet": 9.0},
    "red": {"blue": 5.0, "green": 4.0},
    "fish": {"star": 3.0, "crab": 2.0},
    "star": {"crab": 1.0},
    "[SEP]": {"sea": 7.0},
}


def test_the_two_offsets_differ_by_one_position(toy):
    model = toy(EVERY)
    found = {
        offset: BertAttack(offset=offset).substitutes(model, ["red fish star"])["red fish star"]
        for offset in ("aligned", "shifted")
    }
    assert found["aligned"] == {0: ["blue", "green"], 1: ["star", "crab"], 2: ["crab"]}
    assert found["shifted"] == {0: ["wet"], 1: ["blue", "green"], 2: ["crab"]}  # "star" is refused: it is the word
    assert found["shifted"][1] == found["aligned"][0]


def test_only_whole_other_words_above_the_threshold(toy):
    refused = {"[UNK]": 9.0, "[SEP]": 8.5, "red": 8.0, "of": 7.0, ",": 6.0, "##weed": 5.0}
    model = toy({"red": refused | {"blue": 0.31, "green": 0.29}})
    assert BertAttack().substitutes(model, ["RED"])["RED"] == {0: ["blue"]}
    assert BertAttack(threshold=0.2).substitutes(model, ["red"])["red"] == {0: ["blue", "green"]}
    assert BertAttack(candidates=6).substitutes(model, ["red"])["red"] == {}


def test_words_of_several_pieces_try_24_combinations_without_threshold(toy):
    weak = dict(zip(["red", "blue", "##horse", "green", "fish"], [-1.0, -2.0, -3.0, -4.0, -5.0], strict=True))
    model = toy({"sea": weak, "##weed": weak})
    found = BertAttack().substitutes(model, ["seaweed wet"])["seaweed wet"]
    assert list(found) == [0]
    best = ["red", "blue", "##horse", "green"]  # the 4 best of each piece; a leading "##horse" is no word
    expected = [" ".join(pair).replace(" ##", "") for pair in itertools.product(best, best) if pair[0] != "##horse"]
    assert found[0] == expected
    assert "redhorse" in found[0]
    long = "seaweedweedweedweed"
    assert len(BertAttack().substitutes(model, [long])[long][0]) == 24


def test_pieces_beyond_the_limit_are_neither_seen_nor_swapped(toy):
    model = toy(EVERY)
    attack = BertAttack(max_pieces=4)  # start and end token leave two
    assert attack.seen(model, ["Red", "seaweed", "fish"]) == "red sea"
    assert attack.substitutes(model, ["red fish star"])["red fish star"].keys() == {0, 1}
    assert BertAttack(max_pieces=4, end_token=False).substitutes(model, ["red fish star"])["red fish star"].keys() == {
        0,
        1,
        2,
    }


def test_capitalised_stop_words_are_swapped_in_the_released_reading_only(toy):
    model = toy({"[CLS]": {"red": 5.0}, "this": {"blue": 5.0}, "of": {"green": 5.0}})
    prompts = ["This fish", "this fish", "fish of"]
    for attack, first in ((BertAttack(), False), (BertAttack(**RELEASED), True)):
        found = attack.substitutes(model, prompts)
        assert (0 in found["This fish"]) == first
        assert 0 not in found["this fish"]
        assert 1 not in found["fish of"]


def test_the_stop_list_is_the_released_one():
    letters = {word for word in stop_words() if any(character.isalpha() for character in word)}
    assert len(letters) == 268
    assert len(stop_words() - letters) == 23
    assert {"a", "this", "won't", "~", "·"} < stop_words()
    assert "photo" not in stop_words()


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_first_word_with_a_substitute_that_moves_the_embedding_is_swapped(toy):
    bag = BagOfWords()
    toy({"fish": {"star": 5.0, "crab": 4.0, "wet": 3.0}, "red": {"of": 9.0}})
    attacked = BertAttack()(bag, ["Red FISH"])[0]  # "red" has no substitute left, whatever its importance
    features = bag.encode_texts(["red fish", *(f"red {word}" for word in ("star", "crab", "wet"))])
    furthest = (features[1:] @ features[0]).argmin().item()
    assert attacked == f"Red {('star', 'crab', 'wet')[furthest]}"


@pytest.mark.parametrize("prompts", [[], [""], ["of a"], ["red  fish", "wet wet"]])
@pytest.mark.parametrize("settings", [{}, RELEASED, {"words": 3}])
def test_without_substitutes_texts_come_back_as_they_were(toy, prompts, settings):
    toy({"red": {"##weed": 9.0, "of": 8.0, "blue": 0.2}})
    assert BertAttack(**settings)(BagOfWords(), prompts) == prompts
    assert BertAttack(**settings).against(BagOfWords(), prompts, torch.rand(len(prompts), 16)) == prompts


ENCODED: dict[str, torch.Tensor] = {}  # by the embedded model


def naive(clip, model, sentence, offset, end_token, objective="kl", words=1, k=10, threshold=0.3, limit=30):
    """The specification word by word, one text at a time, with the tokenizer's own encoding and decoding."""
    tokenizer, network = model.tokenizer, model.network

    def embedded(parts):
        ids = tokenizer(" ".join(parts), add_special_tokens=False)["input_ids"][: limit - 1 - end_token]
        sentence = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if sentence not in ENCODED:
            ENCODED[sentence] = clip.encode_texts([sentence])[0].double()
        return ENCODED[sentence]

    parts = sentence.split(" ")
    ids = tokenizer(sentence, add_special_tokens=False)["input_ids"][: limit - 1 - end_token]
    ids = [tokenizer.cls_token_id, *ids] + [tokenizer.sep_token_id] * end_token
    logits, tokens = network(input_ids=torch.tensor([ids])).logits[0].topk(k)
    clean, start, spans = embedded(parts), 0, []
    for word in parts:
        spans.append((start, start := start + len(tokenizer.tokenize(word))))
    gain = [
        OBJECTIVES[objective](clean, embedded([*parts[:i], "[UNK]", *parts[i + 1 :]])).item() for i in range(len(parts))
    ]
    done = 0
    for i in sorted(range(len(parts)), key=lambda i: -gain[i]):
        word = parts[i] if offset == "shifted" else parts[i].lower()
        if done == words or word in stop_words() or spans[i][0] > limit - 2 - end_token:
            continue
        places = range(spans[i][0] + (offset == "aligned"), spans[i][1] + (offset == "aligned"))
        if len(places) != 1:
            rows = [tokenizer.convert_ids_to_tokens(tokens[place])[:4] for place in places]
            several = itertools.islice(itertools.product(*rows[:12]), 24)
            fills = [BertTokenizer.convert_tokens_to_string(tokenizer, row) for row in several]  # signs stay apart
        else:
            fills = [tokenizer.decode(token) for token, logit in zip(tokens[places[0]], logits[places[0]], strict=True)
                     if logit >= threshold]  # fmt: skip
        fills = [fill for fill in fills if "##" not in fill and fill not in stop_words() | {parts[i].lower()}]
        options = [parts, *([*parts[:i], fill, *parts[i + 1 :]] for fill in fills if "[" not in fill)]
        best = torch.stack([OBJECTIVES[objective](clean, embedded(option)) for option in options]).argmax()
        parts, done = options[best], done + bool(best)
    return " ".join(parts)


@pytest.mark.parametrize(
    "settings",
    [{}, RELEASED, {"objective": "cosine"}, {"words": 2}, {"candidates": 3, **RELEASED}, {"threshold": 4.0}],
    ids=str,
)
def test_the_batched_attack_is_the_one_of_the_specification(clip, settings):
    prompts = [*role("cifar10").prompts[:2], role("food101").prompts[0], "A Photo of the flounder, SEASIDE style"]
    same = {"offset": "aligned", "end_token": True} | {"k" if k == "candidates" else k: v for k, v in settings.items()}
    model = load_language_model("auto", clip)
    with torch.no_grad():
        expected = [naive(clip, model, prompt, **same) for prompt in prompts]
    assert BertAttack(**settings)(clip, prompts) == expected
    assert expected != prompts


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([{}, RELEASED]))
def test_the_budget_of_words_is_kept_and_the_rest_keeps_its_case(clip, seed, words, settings):
    scenes = tinyworld_scenes("cifar100", "train", 2, seed % 500)[0]
    prompts = [caption.title() for caption in Speaker(seed).captions(scenes)[0]]
    prompts = [prompt.replace(",", " ,").replace(".", " .") for prompt in prompts]  # substitutes are then single words
    for before, after in zip(prompts, BertAttack(words=words, **settings)(clip, prompts), strict=True):
        assert len(changed(before, after)) <= words
        assert len(before.split(" ")) == len(after.split(" "))


def test_what_happens_to_a_prompt_is_its_own_affair(clip):
    prompts = role("cifar100").prompts
    torch.manual_seed(3)
    state = torch.get_rng_state()
    attacked = BertAttack()(clip, prompts)
    assert BertAttack()(clip, prompts) == attacked
    assert BertAttack()(clip, prompts[::-7]) == attacked[::-7]
    assert BertAttack()(clip, [prompts[4], prompts[3], prompts[4]]) == [attacked[4], attacked[3], attacked[4]]
    assert torch.equal(torch.get_rng_state(), state)


def test_each_distinct_text_is_encoded_once_and_each_prompt_read_once(toy):
    bag, model = BagOfWords(), toy(EVERY | {"blue": {"green": 5.0, "red": 3.0}})
    prompts = ["red fish", "blue fish", "red fish", "blue star", "RED fish"] * 3
    attacked = BertAttack()(bag, prompts)
    assert len(bag.seen) == len(set(bag.seen))
    assert model.network.rows == 4  # distinct texts
    assert attacked[:5] * 3 == attacked
    assert attacked[0] == attacked[2]


def test_prompts_are_read_again_by_the_clip_only(toy):
    table = EVERY | {"blue": {"green": 5.0, "red": 3.0}}
    model, prompts = toy(table), ["red fish", "blue star", "red star"]
    before = BertAttack()(BagOfWords(), prompts)
    turned = BagOfWords()
    turned.vector = lambda word: BagOfWords.vector(turned, word[::-1] + "x")
    after = BertAttack()(turned, [*prompts, "blue fish"])
    assert model.network.rows == 4
    BertAttack(**RELEASED)(turned, prompts)
    assert model.network.rows == 7
    toy(table)
    assert BertAttack()(turned, [*prompts, "blue fish"]) == after
    assert before != after[:3]


def test_the_memory_of_the_language_model_is_bounded(toy, monkeypatch):
    model, prompts = toy(EVERY), ["red fish", "fish red", "fish star"]
    monkeypatch.setattr(text, "MEMORY", 3)
    found = BertAttack().substitutes(model, prompts)
    assert BertAttack().substitutes(model, prompts[::-1]) == found
    assert model.network.rows == 3
    again = BertAttack().substitutes(model, [prompts[0], "star star"])
    assert model.network.rows == 5
    assert len(model.memory) == 2
    assert again[prompts[0]] == found[prompts[0]]


def test_sentences_of_different_length_do_not_disturb_each_other(clip):
    model = load_language_model("auto", clip)
    sentences = [model.pieces("red"), [], ["a", "red", "fish"], ["a", "blue", "star"], ["photo"] * 20]
    together = model.guesses(sentences, 5, True)
    for sentence, (tokens, logits) in zip(sentences, together, strict=True):
        ((alone, values),) = model.guesses([sentence], 5, True)
        assert tokens == alone
        assert len(tokens) == len(sentence) + 1
        assert torch.allclose(torch.tensor(logits), torch.tensor(values), atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_low_precision_does_not_decide_and_the_model_is_left_alone(clip, training):
    prompts = role("cifar10").prompts
    half = copy.deepcopy(clip)
    half.network.to(torch.bfloat16)
    half.train(training).requires_grad_(training)
    expected = BertAttack()(copy.deepcopy(half).float(), prompts)
    assert BertAttack()(half, prompts) == expected
    assert half.logit_scale.dtype == torch.bfloat16
    assert all(module.training == training for module in half.modules())
    assert all(weight.requires_grad == training for weight in half.parameters())


# --- what makes it fast changes nothing -------------------------------------------------------------------------------


def test_tokens_of_all_prompts_are_those_of_open_clip(clip):
    prompts = sorted({prompt for name in role_names() for prompt in role(name).prompts})
    texts = [*prompts, *map(str.upper, prompts[:50]), *(prompt.replace("a ", "[UNK] ") for prompt in prompts[:50])]
    assert len(texts) > 1000
    assert torch.equal(models.tokenize(clip.tokenizer, texts), clip.tokenizer(texts))


ODD = [
    *("", " ", " a", "a ", "a  fish", "a\tfish", "a\x1b[1mfish", "a\x0cb", "caf\u00e9 \ufb01sh", "a &amp; b", "&lt;a"),
    *("x" * 300, "it\u2019s", "\u00e2\u20ac\u2122", "[UNK] [PAD][CLS]", "##weed", "a_b <b>fish</b> ~`!@#$%^*()"),
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from(ODD), st.text(max_size=30), st.text("aB .,&#[]-'\"~\\", max_size=30)), min_size=1
    )
)
def test_tokens_of_odd_texts_are_those_of_open_clip(clip, texts):
    for several in (texts, *([odd] for odd in texts)):
        assert torch.equal(models.tokenize(clip.tokenizer, several), clip.tokenizer(several))


def test_the_last_block_is_needed_at_the_first_token_only(clip):
    prompts = role("cifar100").prompts
    whole = F.normalize(clip.network.encode_text(clip.tokenizer(prompts)), dim=1)
    assert models._reads_first(clip.network)
    torch.testing.assert_close(clip.encode_texts(prompts), whole, rtol=0, atol=1e-6)
    gradients = []
    for encode in (models._read_first, type(clip.network).encode_text):
        network = copy.deepcopy(clip.network).requires_grad_(True)
        F.normalize(encode(network, clip.tokenizer(prompts)), dim=1)[:, 0].sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in network.transformer.parameters()]))
    assert F.cosine_similarity(*gradients, dim=0) > 1 - 1e-5


# --- objectives -------------------------------------------------------------------------------------------------------


def unit_pairs(count: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    one, other = torch.randn(2, count, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = F.normalize(one, dim=1)
    return one, F.normalize(one + noise * F.normalize(other, dim=1), dim=1)


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0, 3.0])
def test_the_divergence_is_the_cosine_distance_over_d(noise):
    one, other = unit_pairs(400, noise)
    ratio = kl_divergence(one, other) / (cosine_distance(one, other) / 512)
    assert ratio.median().item() == pytest.approx(1, abs=0.02)
    shift = (other - one).sum(1).square() / (other - one).square().sum(1) / 512  # the softmax ignores a common shift
    assert (ratio + shift - 1).abs().max() < 0.02
    assert kl_divergence(one, one).abs().max() == 0


def test_divergence_agrees_with_torch():
    one, other = F.normalize(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    expected = F.kl_div(other.log_softmax(1), one.softmax(1), reduction="none").sum(1)
    assert torch.allclose(kl_divergence(one, other), expected)


# --- against images ---------------------------------------------------------------------------------------------------


def test_against_an_image_the_substitute_least_like_it_is_chosen(toy):
    bag = BagOfWords()
    toy({"fish": {"star": 5.0, "crab": 4.0, "wet": 3.0, "sea": 2.0}})
    images = F.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    words = ["fish", "star", "crab", "wet", "sea"]
    closest = (images @ bag.encode_texts([f"red {word}" for word in words]).T).argmin(1)
    attacked = BertAttack().against(bag, ["red fish"] * 40, images)
    assert attacked == [f"red {words[best]}" for best in closest.tolist()]
    assert len(set(attacked)) > 2


def test_against_many_images_costs_no_more_texts_than_against_one(clip, monkeypatch):
    texts = role("cifar10").prompts
    seen = []
    monkeypatch.setattr(clip, "encode_texts", lambda texts: seen.append(texts) or type(clip).encode_texts(clip, texts))
    images = F.normalize(torch.randn(200, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    attacked = BertAttack().against(clip, texts * 20, images)
    encoded = list(itertools.chain(*seen))
    assert len(encoded) == len(set(encoded))
    assert attacked[7:12] == BertAttack().against(clip, (texts * 20)[7:12], images[7:12])


@pytest.mark.parametrize("shape", [(3, 16), (2,), (0, 16)])
def test_against_asks_for_one_image_per_text(shape):
    with pytest.raises(ValueError, match=r"image_features must be \(2, d\)"):
        BertAttack().against(BagOfWords(), ["red fish", "a star"], torch.rand(shape))


# --- synonyms ---------------------------------------------------------------------------------------------------------


SAME = {"car": ("auto",), "sports car": ("sport car", "racer"), "photo": ("picture", "image"), "red": ("ruby",)}


@pytest.fixture
def words_of(monkeypatch):
    """Makes every attack use a hand-made thesaurus."""
    monkeypatch.setattr(text, "thesaurus", lambda clip: Thesaurus(lambda word: SAME.get(word, ())))


def test_names_of_several_words_are_swapped_as_one_and_signs_stay():
    book = Thesaurus(lambda word: SAME.get(word, ()))
    assert book.split("a Photo, of a red sports car.") == ["a", "Photo,", "of", "a", "red", "sports car."]
    assert book.substitutes("a Photo, of a red sports car.") == {
        1: ["picture,", "image,"],
        4: ["ruby"],
        5: ["sport car.", "racer."],
    }
    assert book.substitutes("sports") == {}
    for odd in ("", " ", "a  car ", "...", "car car"):
        assert " ".join(book.split(odd)) == odd


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["car", "sports", "red", "", "Car.", "of", "sports car"])))
def test_splitting_loses_nothing(parts):
    sentence = " ".join(parts)
    assert " ".join(Thesaurus(lambda word: SAME.get(word, ())).split(sentence)) == sentence


def test_the_synonym_that_moves_the_embedding_most_is_taken(words_of):
    bag = BagOfWords()
    for sentence in ("photo of a car", "a red car", "a photo of a sports car.", "this"):
        found, book = SynonymAttack()(bag, [sentence])[0], text.thesaurus(bag)
        words, options = book.split(sentence), book.substitutes(sentence)
        far = lambda after, clean=sentence: 1 - (bag.encode_texts([clean]) @ bag.encode_texts([after]).T).item()  # noqa: E731
        moves = {place: far(" ".join([*words[:place], "[UNK]", *words[place + 1 :]])) for place in options}
        swaps = [" ".join([*words[:place], new, *words[place + 1 :]])
                 for place in sorted(moves, key=moves.get)[-1:] for new in options[place]]  # fmt: skip
        assert found == max(swaps, key=far, default=sentence)
    both = SynonymAttack(words=2)(bag, ["a red car"])
    assert both == ["a ruby auto"]


def test_the_clip_decides_between_synonyms(words_of):
    bag, turned = BagOfWords(), BagOfWords()
    turned.vector = lambda word: BagOfWords.vector(turned, word[::-1] + "x")
    images = F.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    prompts = ["sports car", "a photo of a car", "photo"]
    assert SynonymAttack()(bag, prompts) != SynonymAttack()(turned, prompts)
    against = SynonymAttack().against(bag, ["sports car"] * 30, images)
    assert set(against) == {"sports car", "sport car", "racer"}


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_synonyms_of_tinyworld_name_the_same(clip, name):
    """Whatever is swapped is another name of the same value of the same attribute."""
    prompts = role(name).prompts[:40]
    attacked = SynonymAttack()(clip, prompts)
    pairs = [
        (one.split(" ")[place], two.split(" ")[place])
        for one, two in zip(prompts, attacked, strict=True)
        for place in changed(one, two)
    ]
    assert len(pairs) == len(prompts)
    groups = [
        set(common + rare)
        for attribute in grammar.NAMED
        for common, rare in zip(grammar.words(attribute), grammar.rare_words(attribute), strict=True)
    ]
    assert all(any({before, after} <= group for group in groups) for before, after in pairs)


# --- label-aware ------------------------------------------------------------------------------------------------------


def loss(clip, prompts, images, labels) -> float:
    with torch.no_grad():
        logits = clip.logit_scale * clip.encode_images(images) @ clip.encode_texts(list(prompts)).T
    return F.cross_entropy(logits.double(), labels).item()


def test_label_aware_is_coordinate_ascent_on_the_cross_entropy(toy):
    bag = BagOfWords()
    table = {"red": {"blue": 4.0, "green": 3.0}, "fish": {"star": 3.0, "crab": 2.0}, "star": {"sea": 3.0, "wet": 1.0}}
    model, prompts = toy(table), ["a red fish", "a star", "Red star", "a red fish"]
    random = torch.Generator().manual_seed(0)
    images, labels = torch.rand(30, 3, 4, 4, generator=random), torch.randint(0, 4, (30,), generator=random)
    found = LabelAwareBertAttack()(bag, prompts, images, labels)
    expected = list(prompts)
    for label, prompt in enumerate(prompts):
        words = prompt.split(" ")
        for place, several in BertAttack().substitutes(model, [prompt])[prompt].items():
            for word in several:
                option = [*expected]
                option[label] = " ".join([*words[:place], word, *words[place + 1 :]])
                if loss(bag, option, images, labels) > loss(bag, expected, images, labels):
                    expected = option
    assert found == expected != prompts
    assert all(len(changed(*pair)) <= 1 for pair in zip(prompts, found, strict=True))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("settings", [{}, RELEASED], ids=["aligned", "released"])
def test_label_aware_is_never_weaker(clip, held_out, name, settings):
    prompts, (images, labels) = role(name).prompts, held_out[name]
    aware = LabelAwareBertAttack(**settings)(clip, prompts, images, labels)
    losses = [
        loss(clip, several, images, labels) for several in (prompts, BertAttack(**settings)(clip, prompts), aware)
    ]
    assert losses[0] < losses[1] < losses[2]
    assert LabelAwareBertAttack(**settings)(clip, prompts, images, labels) == aware


def test_label_aware_leaves_prompts_alone_that_only_help(toy):
    bag = BagOfWords()
    toy({"red": {"blue": 4.0}})
    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    single = LabelAwareBertAttack()(bag, ["red fish"], images, torch.tensor([0]))
    assert single == ["red fish"]  # one class: the loss is zero whatever the prompt
    assert LabelAwareBertAttack()(bag, [], images[:0], torch.tensor([])) == []


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(0, 3, 4, 4), torch.zeros(0).long(), "images is empty"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0]), "got 1 labels for 2 images"),
        (torch.zeros(1, 3, 4, 4), torch.tensor([2]), "label 2 is out of range"),
        (torch.full((1, 3, 4, 4), 9.0), torch.tensor([0]), "must lie in"),
    ],
)
def test_label_aware_checks_its_images(images, labels, message):
    with pytest.raises(ValueError, match=message):
        LabelAwareBertAttack()(BagOfWords(), ["red fish", "a star"], images, labels)


# --- settings and language models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        BertAttack(),
        BertAttack(**RELEASED, objective="cosine", candidates=48, threshold=-1.0, words=3, max_pieces=12),
        LabelAwareBertAttack(images=64, language_model="tinyworld-mlm"),
        SynonymAttack(objective="cosine", words=2),
    ],
    ids=repr,
)
def test_repr_pastes_back_and_settings_are_frozen(attack):
    assert eval(repr(attack)) == attack
    assert isinstance(attack, TextAttack)
    with pytest.raises(AttributeError, match="cannot assign"):
        attack.images = 3


def test_only_the_label_aware_attack_asks_for_images():
    assert (TextAttack.images, BertAttack().images, LabelAwareBertAttack().images) == (0, 0, 1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offset": "left"}, "unknown offset 'left'; choose one of: aligned, shifted"),
        ({"objective": "l2"}, "unknown objective 'l2'; choose one of: kl, cosine"),
        ({"candidates": 0}, "candidates=0 is not allowed"),
        ({"words": 1.5}, "words=1.5 is not allowed"),
        ({"max_pieces": 2}, "max_pieces=2 is not allowed"),
        ({"threshold": float("nan")}, "threshold=nan is not allowed"),
    ],
)
def test_invalid_settings_name_value_and_range(settings, message):
    with pytest.raises(ValueError, match=message):
        BertAttack(**settings)


def test_more_pieces_than_the_language_model_reads_is_an_error(clip):
    with pytest.raises(ValueError, match="max_pieces=65 is not allowed; it must be a finite number between 3 and 64"):
        BertAttack(max_pieces=65)(clip, ["a red fish"])


@pytest.mark.parametrize("prompts", ["a red fish", ["a red fish", 3]])
def test_prompts_are_a_list_of_texts(clip, prompts):
    with pytest.raises(ValueError, match="prompts must be a list of texts"):
        BertAttack()(clip, prompts)


def test_auto_goes_by_the_vocabulary_of_the_clip(clip, monkeypatch, root):
    tuned, photo, other = (copy.copy(clip) for _ in range(3))
    tuned.name, other.tokenizer = "runs/checkpoints/tecoa", SimpleNamespace(tokenizer=None)
    words = (root / "src/robustclip/assets/photo-mlm/vocab.txt").read_text(encoding="utf-8").split()
    photo.tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: dict.fromkeys(words)))
    speaks = {name: embedded_language(one) for name, one in {"tuned": tuned, "photo": photo, "other": other}.items()}
    assert speaks == {"tuned": "tinyworld-mlm", "photo": "photo-mlm", "other": None}
    tinyworld, photos = load_language_model("tinyworld-mlm"), load_language_model("photo-mlm")
    monkeypatch.setattr(language, "_cached_bert", lambda: None)
    assert [load_language_model("auto", one) for one in (tuned, photo, other, None)] == [tinyworld, *[photos] * 3]
    monkeypatch.setattr(language, "_cached_bert", lambda: str(root / "src/robustclip/assets/tinyworld-mlm"))
    bert = load_language_model("bert-base-uncased")
    assert bert not in (tinyworld, photos)
    assert [load_language_model("auto", one) for one in (tuned, photo, other)] == [tinyworld, photos, bert]
    assert [thesaurus(one).synonyms for one in (tuned, photo, other)] == [grammar.synonyms, *[lexicon.synonyms] * 2]
    language._load.cache_clear()


def test_language_models_are_read_once_without_touching_the_random_state(root):
    language._load.cache_clear()
    state = torch.get_rng_state()
    model = load_language_model("tinyworld-mlm")
    assert torch.equal(torch.get_rng_state(), state)
    assert load_language_model("tinyworld-mlm") is model
    folder = load_language_model(str(root / "src/robustclip/assets/tinyworld-mlm"))
    assert folder.guesses([["a", "red"]], 3, True) == model.guesses([["a", "red"]], 3, True)


@pytest.mark.parametrize(
    ("name", "message"),
    [("bert-base-uncased", "hf download bert-base-uncased"), ("no/such/model", "no language model called")],
)
def test_missing_language_models_are_errors_with_a_remedy(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    with pytest.raises(FileNotFoundError, match=message):
        load_language_model(name)
