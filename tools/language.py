"""Train the embedded masked language models from nothing; `tools/pretrain.py` runs it and writes the model cards.

An interrupted run goes on from its last checkpoint and ends with the same weights.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import drawings
import english
from pretraining import descend
from robustclip.data import grammar, lexicon, tinyworld
from robustclip.data.grammar import Speaker
from robustclip.data.tinyworld import training_scenes
from robustclip.training import checkpoint

BATCH = 256  # sentences of one step
LONGEST = 64  # tokens of a sentence that the models can read
SPECIAL = 5  # tokens that are no words come first
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # hardly any sentence comes twice
SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, **NO_DROPOUT}  # of both models

ADJECTIVES = ("small", "large", "tiny", "big", "bright", "old", "new", "clean")
GENERAL = {"texture": ADJECTIVES, "color": ADJECTIVES, "background": ("picture", "scene", "view", "place", "image")}


class Language(NamedTuple):
    """What a language model is made for."""

    name: str
    sizes: dict  # of the network
    write_tokenizer: Callable
    sentences: Callable[[int], list[str]]  # of one step, or, for negative ones, held out
    synonyms: Callable[[str], Sequence[str]]
    alternatives: int = 8  # at most, for a word in training


# --- what the models read ---------------------------------------------------------------------------------------------


def tinyworld_sentences(step: int) -> list[str]:
    """Captions of scenes in which no name of a thing is rare; some words in them are general ones."""
    choose, speaker = random.Random(f"language/{step}"), Speaker(f"language/{step}", synonyms=0.6, rare=0.4)
    return [vague(choose, caption) for caption in speaker.captions(training_scenes(step))[0]]


def vague(choose: random.Random, text: str) -> str:
    """The text with a quarter of its patterns, colors and places in general words: "a small red star in the scene"."""
    known = ((word, general().get(word)) for word in text.split(" "))
    return " ".join(choose.choice(others) if others and choose.random() < 0.25 else word for word, others in known)


@cache
def general() -> dict[str, tuple[str, ...]]:
    """The general words that may stand for a word of Tinyworld."""
    tables = {name: zip(grammar.words(name), grammar.rare_words(name), strict=True) for name in GENERAL}
    return {word: GENERAL[name] for name, table in tables.items() for names in table for word in chain(*names)}


def photo_sentences(step: int) -> list[str]:
    """Captions, class names and their synonyms in prompts, and what WordNet says; held out are only captions."""
    choose = random.Random(f"language/{step}")
    if step < 0:
        return choose.sample(english.captions(held_out=True), BATCH)
    told = [prompt(choose) if choose.random() < 0.6 else description(choose) for _ in range(BATCH // 2)]
    return told + choose.choices(english.captions(), k=BATCH - len(told))


def prompt(choose: random.Random) -> str:
    """A class, by its name or another one, in a template; some begin with "this is"."""
    name = choose.choice(english.photo_names())
    template = choose.choice(english.templates())
    opening = "this is " if template.startswith("a ") and choose.random() < 0.5 else ""
    return opening + template.format(choose.choice([name, name, *lexicon.synonyms(name)]))


def description(choose: random.Random) -> str:
    """A sentence about a class; of an unknown one, its name."""
    name = choose.choice(english.photo_names())
    return choose.choice(lexicon.descriptions(name) or (name,))


TINYWORLD = Language(
    "tinyworld-mlm",
    {**SHAPE, "hidden_size": 96, "intermediate_size": 256},
    drawings.write_tokenizer,
    tinyworld_sentences,
    grammar.synonyms,
)
PHOTO = Language(
    "photo-mlm",
    {**SHAPE, "hidden_size": 128, "intermediate_size": 512},
    english.write_photo_tokenizer,
    photo_sentences,
    english.alike,
    alternatives=16,  # more than one guesses at a place, so that function words leave room for little else
)


# --- training ---------------------------------------------------------------------------------------------------------


def mask_tokens(tokens: Tensor, mask: int, synonyms: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide 15 % of the words: 50 % become [MASK], 25 % stay, 15 % turn into a synonym, 10 % into any word.

    Labels of the others are -100. BERT hides 80 % under [MASK]; but attacks read texts unmasked, and there the model is
    to say the word or a synonym.
    `synonyms` (words, k) are token ids, the word's own where it has none.
    """
    chosen = (torch.rand(tokens.shape, generator=random) < 0.15) & (tokens >= SPECIAL)
    labels, fate = torch.where(chosen, tokens, -100), torch.rand(tokens.shape, generator=random)
    alike = synonyms[tokens, torch.randint(synonyms.shape[1], tokens.shape, generator=random)]
    other = torch.randint(SPECIAL, len(synonyms), tokens.shape, generator=random)
    hidden = torch.where(chosen & (fate < 0.5), mask, tokens)
    hidden = torch.where(chosen & (fate >= 0.75), alike, hidden)
    return torch.where(chosen & (fate >= 0.9), other, hidden), labels


def synonym_table(tokenizer, synonyms: Callable[[str], Sequence[str]], width: int) -> Tensor:
    """(words, width) token ids: in turn the synonyms of each token that are one token, too, or the token itself."""
    known = tokenizer.get_vocab()
    rows = {
        number: [known[other] for other in synonyms(word) if other in known] or [number]
        for word, number in known.items()
    }
    return torch.tensor([list(islice(cycle(rows[number]), width)) for number in range(len(rows))])


def tokenize(tokenizer, texts: list[str], groups: int = 4) -> list[Tensor]:
    """Token ids (n, longest) of groups of texts of about the same length, so that little is padded."""
    rows = sorted(map(torch.tensor, tokenizer(texts, truncation=True)["input_ids"]), key=len)
    size = -(-len(rows) // groups)
    return [pad_sequence(rows[at : at + size], batch_first=True) for at in range(0, len(rows), size)]


def logits_at(model: torch.nn.Module, tokens: Tensor, places: Tensor) -> Tensor:
    """Logits (k, words) at the places where a mask (n, length) is True; the others are not computed."""
    states = model.bert(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    return model.cls(states[places])


@torch.random.fork_rng(devices=())
def train_mlm(folder: Path, language: Language, steps: int, peak: float = 2e-3, report_every: int = 200) -> dict:
    """Train a masked language model, or go on with an interrupted run, and save it in transformers' folder format."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    tokenizer = language.write_tokenizer(folder)
    words, mask = len(tokenizer), tokenizer.mask_token_id
    synonyms = synonym_table(tokenizer, language.synonyms, language.alternatives)
    model = BertForMaskedLM(BertConfig(vocab_size=words, max_position_embeddings=LONGEST, **language.sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)

    def losses(first: int) -> Iterator[Tensor]:
        for step in range(first, steps):
            random, groups = tinyworld.generator("language", step), tokenize(tokenizer, language.sentences(step))
            pairs = [mask_tokens(tokens, mask, synonyms, random) for tokens in groups]
            logits = torch.cat([logits_at(model, hidden, labels >= 0) for hidden, labels in pairs])
            yield F.cross_entropy(logits, torch.cat([labels[labels >= 0] for _, labels in pairs]))

    path = folder / checkpoint.CHECKPOINT
    facts = {"steps": steps, "peak": peak, "language": language.name, "words": words}
    seconds = descend([*model.parameters()], optimizer, losses, path, facts, report_every)
    model.save_pretrained(folder, safe_serialization=True)
    path.unlink(missing_ok=True)
    return {"steps": steps, "sentences": steps * BATCH, "seconds": seconds, "device": "cpu"}


@torch.no_grad()
def mlm_accuracy(folder: Path, language: Language, batches: int = 4, best: int = 10) -> tuple[int, int]:
    """Hits and trials: every word of held-out sentences hidden in turn, is it among the `best` guesses?"""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    hits = trials = 0
    sentences = chain.from_iterable(language.sentences(-1 - batch) for batch in range(batches))
    for tokens in tokenize(tokenizer, list(sentences), 4 * batches):
        rows, places = (tokens >= SPECIAL).nonzero(as_tuple=True)
        for part in torch.arange(len(rows)).split(1024):
            hidden, here = tokens[rows[part]], F.one_hot(places[part], tokens.shape[1]).bool()
            guesses = logits_at(model, hidden.masked_fill(here, tokenizer.mask_token_id), here).topk(best).indices
            hits += (guesses == hidden[here][:, None]).any(1).sum().item()
            trials += len(part)
    return hits, trials
