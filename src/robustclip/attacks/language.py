"""The masked language model that proposes words to the attacks on prompts."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from importlib.resources import as_file, files
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from robustclip.data.grammar import vocabulary
from robustclip.models import Clip

EMBEDDED, BERT = "tinyworld-mlm", "bert-base-uncased"
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


def is_tinyworld(clip: Clip) -> bool:
    """Whether a CLIP speaks the language of Tinyworld, judged by its vocabulary: fine-tuning keeps that."""
    tokenizer = getattr(clip.tokenizer, "tokenizer", None)
    return hasattr(tokenizer, "get_vocab") and set(tokenizer.get_vocab()) == set(vocabulary())


def load_language_model(name: str = "auto", clip: Clip | None = None) -> LanguageModel:
    """The masked language model called `name`, once per process and device, on the device of `clip`.

    "tinyworld-mlm", "bert-base-uncased" from the local Hugging Face cache (never downloaded), or a folder in
    transformers' format. "auto" takes the embedded model for a CLIP of Tinyworld's vocabulary, for any other
    bert-base-uncased if it is on disk, else the embedded one.
    """
    if name == "auto":
        name = BERT if (clip is None or not is_tinyworld(clip)) and _cached_bert() else EMBEDDED
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

    with as_file(files("robustclip").joinpath(f"assets/{EMBEDDED}")) as embedded, torch.random.fork_rng(devices=()):
        folder = embedded if name == EMBEDDED else Path(name).expanduser()
        source = str(folder) if (folder / "config.json").is_file() else _cached_bert() if name == BERT else None
        if source is None:
            raise FileNotFoundError(
                f"no language model called {name!r} on disk; choose 'auto', {EMBEDDED!r}, a folder in transformers' "
                f"format, or {BERT!r} after `hf download {BERT}` (0.4 GB)"
            )
        network = AutoModelForMaskedLM.from_pretrained(source, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    return LanguageModel(network.float().to(device), tokenizer)
