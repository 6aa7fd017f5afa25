"""What proposes words to the attacks on prompts: masked language models and thesauri."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from robustclip.data import grammar, lexicon
from robustclip.models import Clip

TINYWORLD, PHOTO, BERT = "tinyworld-mlm", "photo-mlm", "bert-base-uncased"
TOKENS = 2048  # in one pass: BERT's logits then take 250 MB


class LanguageModel:
    """A masked language model with its word-piece tokenizer."""

    def __init__(self, network: nn.Module, tokenizer) -> None:
        self.network, self.tokenizer = network.eval().requires_grad_(False), tokenizer
        self.unknown: str = tokenizer.unk_token
        self.special = frozenset(tokenizer.all_special_tokens)
        self.longest: int = network.config.max_position_embeddings
        self.memory: dict = {}  # where attacks keep what they found with this model
        self.pieces = cache(tokenizer.tokenize)  # the lower-case pieces of a word, or the unknown-word token

    @cached_property
    def digest(self) -> str:
        """Short fingerprint of weights and vocabulary."""
        fingerprint = hashlib.sha256(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())
        for name, value in sorted(self.network.state_dict().items()):
            fingerprint.update(name.encode())
            fingerprint.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return fingerprint.hexdigest()[:16]

    def split(self, text: str) -> list[str]:
        """The words of a text."""
        return text.split(" ")

    def join(self, pieces: Iterable[str]) -> str:
        """Word pieces back to text."""
        return " ".join(pieces).replace(" ##", "")

    @torch.no_grad()
    def guesses(self, sentences: Sequence[list[str]], best: int, end_token: bool) -> list[tuple[list, list]]:
        """The `best` tokens and their raw logits at each position of each sentence, nothing masked.

        A sentence of m pieces has m + 1 positions: the start token's, then one per piece. Sentences of one length go
        together, so none is padded and no guess depends on the others.
        """
        first, last = [self.tokenizer.cls_token], [self.tokenizer.sep_token] * end_token
        names, found, lengths = self.tokenizer.convert_ids_to_tokens, {}, [len(pieces) for pieces in sentences]
        for length, group in groupby(sorted(range(len(sentences)), key=lengths.__getitem__), key=lengths.__getitem__):
            rows, size = list(group), max(1, TOKENS // (length + 2))
            for part in (rows[at : at + size] for at in range(0, len(rows), size)):
                words = [self.tokenizer.convert_tokens_to_ids([*first, *sentences[row], *last]) for row in part]
                logits = self.network(input_ids=torch.tensor(words, device=self.network.device)).logits
                values, tokens = logits[:, : length + 1].float().topk(min(best, logits.shape[-1]))
                guessed = [list(map(names, row)) for row in tokens.tolist()]
                found |= zip(part, zip(guessed, values.tolist(), strict=True), strict=True)
        return [found[row] for row in range(len(sentences))]


class Thesaurus:
    """Synonyms of words, and of names of several words."""

    unknown, longest = "[UNK]", 4  # words in a name

    def __init__(self, synonyms: Callable[[str], Sequence[str]]) -> None:
        self.synonyms = synonyms

    def split(self, text: str) -> list[str]:
        """The words of a text; names of several words that have synonyms stay whole, the longest first."""
        words, found = text.split(" "), []
        while words:
            size = next((size for size in range(self.longest, 1, -1) if self.others(" ".join(words[:size]))), 1)
            found.append(" ".join(words[:size]))
            del words[:size]
        return found

    def others(self, word: str) -> list[str]:
        """What may stand for a word or a name; a comma after it stays."""
        name, end = re.fullmatch(r"(.*?)(\W*)", word).groups()
        return [other + end for other in self.synonyms(name.lower())]

    def substitutes(self, text: str) -> dict[int, list[str]]:
        """The positions, among the words that `split` tells apart, of those with synonyms, and these."""
        return {place: others for place, word in enumerate(self.split(text)) if (others := self.others(word))}


def embedded_language(clip: Clip) -> str | None:
    """The embedded language model of a CLIP's vocabulary, which fine-tuning keeps, if there is one."""
    tokenizer = getattr(clip.tokenizer, "tokenizer", None)
    known = frozenset(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else None
    return next((name for name in (TINYWORLD, PHOTO) if _vocabulary(name) == known), None)


@cache
def _vocabulary(name: str) -> frozenset[str]:
    return frozenset(_asset(name).joinpath("vocab.txt").read_text(encoding="utf-8").split())


def _asset(name: str) -> Traversable:
    return files("robustclip").joinpath(f"assets/{name}")


def thesaurus(clip: Clip) -> Thesaurus:
    """The thesaurus of a CLIP's language: the words of Tinyworld for its vocabulary, else WordNet."""
    return Thesaurus(grammar.synonyms if embedded_language(clip) == TINYWORLD else lexicon.synonyms)


def load_language_model(name: str = "auto", clip: Clip | None = None) -> LanguageModel:
    """The masked language model called `name`, once per process and device, on the device of `clip`.

    "tinyworld-mlm", "photo-mlm", "bert-base-uncased" from the local Hugging Face cache (never downloaded), or a folder
    in transformers' format. "auto" takes the embedded model of the CLIP's vocabulary, for any other CLIP
    bert-base-uncased if it is on disk, else "photo-mlm".
    """
    if name == "auto":
        name = (clip and embedded_language(clip)) or (BERT if _cached_bert() else PHOTO)
    return _load(name, "cpu" if clip is None else str(clip.device))


def _cached_bert() -> str | None:
    """The name under which the local Hugging Face cache holds BERT's weights, if it does."""
    from huggingface_hub import try_to_load_from_cache

    names = (BERT, f"google-bert/{BERT}")  # the same weights
    return next((name for name in names if isinstance(try_to_load_from_cache(name, "model.safetensors"), str)), None)


@cache
def _load(name: str, device: str) -> LanguageModel:
    """Read from disk; whatever transformers draws while it builds the network leaves the random state alone."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    place = _asset(name) if name in (TINYWORLD, PHOTO) else Path(name).expanduser()
    with as_file(place) as folder, torch.random.fork_rng(devices=()):
        source = str(folder) if (folder / "config.json").is_file() else _cached_bert() if name == BERT else None
        if source is None:
            raise FileNotFoundError(
                f"no language model called {name!r} on disk; choose 'auto', {TINYWORLD!r}, {PHOTO!r}, a folder in "
                f"transformers' format, or {BERT!r} after `hf download {BERT} config.json model.safetensors vocab.txt "
                "tokenizer.json tokenizer_config.json` (0.4 GB)"
            )
        network = AutoModelForMaskedLM.from_pretrained(source, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    return LanguageModel(network.float().to(device), tokenizer)
