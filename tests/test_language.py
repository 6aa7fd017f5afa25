"""Training masked language models: what they read, what is hidden, and folders that transformers loads."""

import random
import re
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

import language
import pretraining
from language import TINYWORLD, mask_tokens, mlm_accuracy, train_mlm
from robustclip.data import grammar, lexicon, tinyworld
from robustclip.data.grammar import SPECIAL_TOKENS, vocabulary
from robustclip.training import checkpoint

WORDS = len(vocabulary())
MASK = SPECIAL_TOKENS.index("[MASK]")
WEIGHTS = "model.safetensors"


@pytest.fixture
def small(monkeypatch):
    """Batches of 16, so that two steps take a moment."""
    monkeypatch.setattr(tinyworld, "BATCH", 16)


def test_held_out_sentences_are_new():
    read = TINYWORLD.sentences
    assert read(0) == read(0)
    assert not set(read(0)) & set(read(1)) & set(read(-1)), "not even by chance are three batches alike"
    assert read(-1) not in (read(0), read(1))


def test_all_names_of_a_thing_are_heard_alike():
    """Of the words for one value none is much more frequent than another."""
    said = re.findall(r"\w+", " ".join(chain.from_iterable(map(TINYWORLD.sentences, range(40)))))
    red = [said.count(word) for word in (*grammar.words("color")[0], *grammar.rare_words("color")[0])]
    assert min(red) > max(red) / 3


def test_photographs_are_told_of_in_captions_prompts_and_definitions(monkeypatch):
    monkeypatch.setattr(language.english, "captions", lambda held_out=False: (f"caption {held_out}",) * 256)
    monkeypatch.setattr(language.english, "photo_names", lambda: ("sports car", "unheard thing"))
    told = language.photo_sentences(3)
    assert language.photo_sentences(3) == told != language.photo_sentences(4)
    assert len(told) == 256
    assert told.count("caption False") == 128
    assert set(lexicon.descriptions("sports car")) < set(told)
    assert any("sport car" in text and "also" not in text for text in told), "a synonym in a template"
    assert any(text.startswith("this is a") for text in told)
    assert "unheard thing" in told
    assert set(language.photo_sentences(-1)) == {"caption True"}


def test_hidden_words_are_masked_kept_or_exchanged():
    generator, synonyms = torch.Generator().manual_seed(0), torch.arange(WORDS)[:, None].repeat(1, 2)
    synonyms[300:] = torch.tensor([300, 301])
    tokens = torch.randint(5, WORDS, (400, 100), generator=generator)
    tokens[:, :4], tokens[:, 90:] = torch.tensor([2, 3, 1, 4]), 0
    before = tokens.clone()
    hidden, labels = mask_tokens(tokens, MASK, synonyms, generator)
    assert torch.equal(tokens, before), "the input is left alone"
    special = tokens < 5
    assert torch.equal(hidden[special], tokens[special]), "special tokens are never masked"
    assert (labels[special] == -100).all()
    chosen = labels != -100
    assert torch.equal(labels[chosen], tokens[chosen])
    assert torch.equal(hidden[~chosen], tokens[~chosen])
    assert chosen.sum() / (~special).sum() == pytest.approx(0.15, abs=0.01)
    assert (hidden[chosen] == MASK).float().mean() == pytest.approx(0.5, abs=0.02)
    alone, several = chosen & (tokens < 300), chosen & (tokens > 301)
    assert (hidden[alone] == tokens[alone]).float().mean() == pytest.approx(0.4, abs=0.03)
    assert (hidden[several] == tokens[several]).float().mean() == pytest.approx(0.25, abs=0.03)
    assert ((hidden[several] == 300) | (hidden[several] == 301)).float().mean() == pytest.approx(0.15, abs=0.03)
    replaced = hidden[alone & (hidden != MASK) & (hidden != tokens)]
    assert 5 <= replaced.min() <= replaced.max() < WORDS
    assert replaced.unique().numel() > 100


def test_the_table_of_synonyms_holds_single_tokens_and_else_the_word_itself(tmp_path):
    tokenizer = TINYWORLD.write_tokenizer(tmp_path)
    said = {"red": ("crimson", "blood red", "ruby"), "blue": ("deep water",)}
    table = language.synonym_table(tokenizer, lambda word: said.get(word, ()), width=3)
    known = tokenizer.get_vocab()
    words = tokenizer.convert_ids_to_tokens
    assert words(table[known["red"]].tolist()) == ["crimson", "ruby", "crimson"]
    assert words(table[known["blue"]].tolist()) == ["blue"] * 3
    assert table.shape == (WORDS, 3)
    others = torch.arange(WORDS)[torch.arange(WORDS) != known["red"]]
    assert torch.equal(table[others], others[:, None].repeat(1, 3))


def test_general_words_stand_for_a_quarter_of_patterns_colors_and_places():
    choose = random.Random(0)
    texts = [language.vague(choose, "a striped red star in the snow") for _ in range(400)]
    columns = [[text.split(" ")[place] for text in texts] for place in range(7)]
    for place, general in ((1, "texture"), (2, "color"), (6, "background")):
        kept = sum(word in ("striped", "red", "snow") for word in columns[place])
        assert 270 < kept < 330
        assert set(columns[place]) == {*language.GENERAL[general], ("", "striped", "red", "", "", "", "snow")[place]}
    assert all(len(set(columns[place])) == 1 for place in (0, 3, 4, 5))


@pytest.mark.parametrize("count", [1, 3, 50])
def test_groups_hold_every_text_once_with_little_padding(tmp_path, count):
    tokenizer = TINYWORLD.write_tokenizer(tmp_path)
    texts = ["red " * (1 + 7 * number % 20) for number in range(count)]
    groups = language.tokenize(tokenizer, texts)
    lengths = list(chain.from_iterable((tokens != 0).sum(1).tolist() for tokens in groups))
    assert sorted(lengths) == sorted(len(text.split()) + 2 for text in texts)
    assert lengths == sorted(lengths)
    assert all((tokens[:, -1] != 0).any() for tokens in groups)


def test_a_language_model_trains_and_loads(small, tmp_path, capsys):
    before = torch.get_rng_state()
    run = train_mlm(tmp_path / "one", TINYWORLD, steps=2, report_every=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (run["steps"], run["sentences"]) == (2, 512)
    assert capsys.readouterr().out.count("loss") == 2
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "one")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert model.config.vocab_size == len(tokenizer) == WORDS
    assert tokenizer.mask_token_id == MASK
    assert not (tmp_path / "one" / checkpoint.CHECKPOINT).exists()


def test_an_interrupted_run_ends_with_the_same_weights(small, tmp_path, monkeypatch):
    train_mlm(tmp_path / "whole", TINYWORLD, steps=4)
    read = TINYWORLD.sentences
    stopping = TINYWORLD._replace(sentences=lambda step: read(step) if step < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_mlm(tmp_path / "parts", stopping, steps=4, report_every=2)
    seen = []
    train_mlm(tmp_path / "parts", TINYWORLD._replace(sentences=lambda step: seen.append(step) or read(step)), steps=4)
    assert seen == [2, 3]
    whole, parts = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_schedule_is_followed(small, tmp_path, monkeypatch):
    """A learning rate of zero after the first step leaves the weights where that step put them."""
    monkeypatch.setattr(pretraining, "learning_rate", lambda step, steps: float(step == 0))
    for steps in (1, 3):
        train_mlm(tmp_path / str(steps), TINYWORLD, steps)
    one, three = (load_file(tmp_path / steps / WEIGHTS) for steps in ("1", "3"))
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("best", [1, 20])
def test_accuracy_counts_every_word(tmp_path, monkeypatch, best):
    """Against one sentence and one word at a time."""
    monkeypatch.setattr(tinyworld, "BATCH", 6)
    train_mlm(tmp_path, TINYWORLD, steps=2)
    hits, trials = mlm_accuracy(tmp_path, TINYWORLD, batches=2, best=best)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    found = words = 0
    for text in chain(TINYWORLD.sentences(-1), TINYWORLD.sentences(-2)):
        tokens = tokenizer(text, return_tensors="pt", truncation=True)["input_ids"]
        for place in range(1, tokens.shape[1] - 1):
            hidden = tokens.clone()
            hidden[0, place] = MASK
            with torch.no_grad():
                guesses = model(input_ids=hidden).logits[0, place].topk(best).indices
            found += int(tokens[0, place] in guesses)
            words += 1
    assert trials == words
    assert abs(hits - found) <= 1, "padding may change the last bit of a tie"
