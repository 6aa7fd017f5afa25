"""Attacks on texts: BERT-Attack on class prompts or captions, in the released and the aligned reading, and label-aware.

Words are what stands between single blanks. A masked language model or a thesaurus proposes substitutes for them, the
text encoder under attack chooses.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain, islice, product
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustclip.attacks.base import Adversary, Captions, Pair, Target, check_captions, frozen, regroup
from robustclip.attacks.language import LanguageModel, Thesaurus, load_language_model, thesaurus
from robustclip.checks import check_choice, check_images, check_integer, check_labels, check_range
from robustclip.classes import Classes
from robustclip.component import component
from robustclip.models import Clip

BATCH = 128  # texts encoded together: larger batches leave the cache of a CPU
MEMORY = 20_000  # texts whose substitutes a language model remembers
PIECES, TOKENS, COMBINATIONS = 12, 4, 24  # how much of a word of several pieces BERT-Attack looks at

Score = Callable[[Tensor, Tensor], Tensor]  # (rows of the attacked texts, candidate features) -> what to maximise
Substitutes = dict[int, list[str]]  # position of a word -> what may replace it


@cache
def stop_words() -> frozenset[str]:
    """The words and signs that BERT-Attack neither swaps nor proposes."""
    return frozenset(files("robustclip").joinpath("assets/stop-words.txt").read_text(encoding="utf-8").split())


def kl_divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """D_KL(softmax(v) || softmax(v')) over the d coordinates of unit rows (n, d); close to (1 - cos(v, v')) / d."""
    log_clean, log_moved = clean.log_softmax(-1), moved.log_softmax(-1)
    return (log_clean.exp() * (log_clean - log_moved)).sum(-1)


def cosine_distance(clean: Tensor, moved: Tensor) -> Tensor:
    """1 - cos(v, v') of unit rows (n, d)."""
    return 1 - (clean * moved).sum(-1)


OBJECTIVES = {"kl": kl_divergence, "cosine": cosine_distance}


class TextFeatures:
    """Texts to unit features (k, d) in double precision, on the CPU; each distinct text is encoded once.

    A CLIP of lower precision is copied to float32: the divergences to rank are of order 1e-5.
    """

    def __init__(self, clip: Clip) -> None:
        self.model = clip if clip.logit_scale.dtype == torch.float32 else copy.deepcopy(clip).float()
        self.known: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(k, d) features of k texts."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        with torch.no_grad(), frozen(self.model):
            for part in (new[at : at + BATCH] for at in range(0, len(new), BATCH)):
                self.known.update(zip(part, self.model.encode_texts(part).cpu().double(), strict=True))
        return torch.stack([self.known[text] for text in texts]) if len(texts) else torch.empty(0, 1).double()


@component
class TextAttack(Adversary):
    """An attack on texts; `images` says how many held-out labelled images it wants to see besides the prompts."""

    changes_images: ClassVar[bool] = False
    changes_texts: ClassVar[bool] = True
    images: ClassVar[int] = 0
    eps: ClassVar[float] = 0.0

    @abstractmethod
    def __call__(self, clip: Clip, prompts: Sequence[str]) -> list[str]:
        """One attacked text per prompt, in the same order."""

    def attacked(self, target: Target) -> Classes:
        """The classes of a target under attacked prompts, computed once as long as its weights stay."""
        if self.images and target.held_out is None:
            raise ValueError(f"{self!r} asks for {self.images} labelled images; give a Target with held_out")
        prompts, held_out = target.classes.prompts, target.held_out if self.images else None
        examples = (lambda: held_out(self.images)) if held_out else tuple
        key = ("attacked", self, prompts, held_out)
        return target.classes.with_prompts(
            target.clip.remembered(key, lambda: tuple(self(target.clip, list(prompts), *examples())))
        )

    def pairs(self, target: Target, images: Tensor, labels: Tensor) -> list[Pair]:
        """One pair, of the clean images and the attacked prompts."""
        return [Pair(images, self.attacked(target))]

    def on_captions(self, clip: Clip, images: Tensor, captions: Captions) -> tuple[Tensor, Captions]:
        """The captions attacked, all of them together; the images stay."""
        check_captions(captions, len(images))
        if self.images:
            raise ValueError(f"{self!r} asks for labelled images, and captions have no labels; give a BertAttack")
        return images, regroup(self(clip, list(chain(*captions))), captions)

    def passes(self, classes: int) -> tuple[int, int]:
        """None: only texts are looked at, or images of its own."""
        return 0, 0


def check_texts(name: str, texts: Sequence[str]) -> list[str]:
    """Return `texts` as a list if they are several strings, else raise ValueError."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a list of texts, got {texts!r:.60}; put a single text in brackets")
    return list(texts)


def swapped(words: list[str], position: int, word: str) -> list[str]:
    """A copy of `words` with another one at `position`."""
    return [*words[:position], word, *words[position + 1 :]]


@component
class GreedyAttack(TextAttack):
    """What attacks on single texts share: swap at most `words` words so that the embedding moves as far as possible.

    max_{t'} D_KL(softmax(v) || softmax(v')), v = f_T(t) the unit embedding. Words are tried in the order of how far the
    embedding moves when the unknown-word token replaces them; the best substitute of the first word that has one
    better than the word itself is taken. Sees neither images, labels nor other prompts.
    """

    objective: str = "kl"
    words: int = 1

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_integer("words", self.words, 1)

    @abstractmethod
    def speaker(self, clip: Clip) -> Any:
        """What knows the language of a CLIP: it splits texts into words and has an `unknown` one."""

    @abstractmethod
    def substitutes(self, speaker: Any, texts: Sequence[str]) -> dict[str, Substitutes]:
        """For each text, the words that may be swapped and their substitutes."""

    @abstractmethod
    def seen(self, speaker: Any, words: Iterable[str]) -> str:
        """The text that embeddings are computed on."""

    def __call__(self, clip: Clip, prompts: Sequence[str]) -> list[str]:
        """One attacked text per prompt; equal prompts are attacked once."""
        unique = list(dict.fromkeys(check_texts("prompts", prompts)))
        speaker, features, distance = self.speaker(clip), TextFeatures(clip), OBJECTIVES[self.objective]
        clean = features([self.seen(speaker, speaker.split(text)) for text in unique])
        found = self._climb(speaker, features, unique, lambda rows, moved: distance(clean[rows], moved))
        attacked = dict(zip(unique, found, strict=True))
        return [attacked[prompt] for prompt in prompts]

    def against(self, clip: Clip, texts: Sequence[str], image_features: Tensor) -> list[str]:
        """The i-th text against the i-th image, (n, d) unit rows: max_{t'} -cos(u_i, v'), words in the same order."""
        texts = check_texts("texts", texts)
        if image_features.ndim != 2 or len(image_features) != len(texts):
            shape = tuple(image_features.shape)
            raise ValueError(f"image_features must be ({len(texts)}, d), one row per text, got {shape}")
        images = image_features.detach().cpu().double()
        speaker, features = self.speaker(clip), TextFeatures(clip)
        return self._climb(speaker, features, texts, lambda rows, moved: -(images[rows] * moved).sum(-1))

    def _ranked(self, speaker: Any, features: TextFeatures, texts: list[str]) -> dict[str, list[tuple]]:
        """Positions and substitutes of each text, its most important word first."""
        found = self.substitutes(speaker, texts)
        split = [speaker.split(text) for text in found]
        clean = features([self.seen(speaker, words) for words in split])
        counts = torch.tensor([len(options) for options in found.values()], dtype=torch.long)
        places = zip(split, found.values(), strict=True)
        probes = [swapped(words, position, speaker.unknown) for words, options in places for position in options]
        moved = features([self.seen(speaker, probe) for probe in probes])
        moves = iter(OBJECTIVES[self.objective](clean.repeat_interleave(counts, 0), moved).tolist())
        return {text: sorted(options.items(), key=lambda _: -next(moves)) for text, options in found.items()}

    def _climb(self, speaker: Any, features: TextFeatures, texts: list[str], score: Score) -> list[str]:
        """Greedy search, all texts at once: each round tries one word of every text that may still change."""
        ranked = self._ranked(speaker, features, list(dict.fromkeys(texts)))
        words, left = [speaker.split(text) for text in texts], [self.words] * len(texts)
        queues = [iter(ranked[text]) for text in texts]
        while tries := {row: entry for row, queue in enumerate(queues) if left[row] and (entry := next(queue, None))}:
            options = [
                [words[row], *(swapped(words[row], position, word) for word in substitutes)]
                for row, (position, substitutes) in tries.items()
            ]
            counts = [len(several) for several in options]
            moved = features([self.seen(speaker, option) for option in chain.from_iterable(options)])
            scores = score(torch.tensor([*tries]).repeat_interleave(torch.tensor(counts)), moved).split(counts)
            for row, several, values in zip(tries, options, scores, strict=True):
                best = int(values.argmax())
                words[row], left[row] = several[best], left[row] - (best > 0)
        return [" ".join(row) for row in words]


@component
class WordSubstitution(TextAttack):
    """What the BERT-Attacks share: where substitutes come from.

    The language model reads the text unmasked and guesses each position. `aligned` takes a word's substitutes from its
    own positions. `shifted` follows the code of Co-Attack, SGA and MMCoA: one position too early, and with stop words
    told by case, so that "This" may be swapped. That code also omits the `end_token`. `threshold` is a raw logit.
    """

    offset: str = "aligned"
    end_token: bool = True
    candidates: int = 10
    threshold: float = 0.3
    max_pieces: int = 30
    language_model: str = "auto"

    def __post_init__(self) -> None:
        check_choice("offset", self.offset, ("aligned", "shifted"))
        check_integer("candidates", self.candidates, 1)
        check_range("threshold", self.threshold, -1e9, 1e9)
        check_integer("max_pieces", self.max_pieces, 3)

    @property
    def _kept(self) -> int:
        """How many word pieces of a text the attack sees."""
        return self.max_pieces - 1 - self.end_token

    def seen(self, model: LanguageModel, words: Iterable[str]) -> str:
        """The text that the attack's embeddings are computed on: lower-case word pieces, cut, joined again."""
        return model.join(islice(chain.from_iterable(map(model.pieces, words)), self._kept))

    def substitutes(self, model: LanguageModel, texts: Sequence[str]) -> dict[str, Substitutes]:
        """For each text, the words that may be swapped and their substitutes; the language model remembers them."""
        check_integer("max_pieces", self.max_pieces, 3, model.longest)
        settings = (self.offset, self.end_token, self.candidates, self.threshold, self.max_pieces)
        keys = {text: (text, settings) for text in texts}
        if len(model.memory.keys() | keys.values()) > MEMORY:
            model.memory.clear()
        new = [text for text, key in keys.items() if key not in model.memory]
        sentences = [list(chain.from_iterable(map(model.pieces, text.split(" "))))[: self._kept] for text in new]
        for text, guess in zip(new, model.guesses(sentences, self.candidates, self.end_token), strict=True):
            model.memory[keys[text]] = self._of_text(model, text, *guess)
        return {text: model.memory[key] for text, key in keys.items()}

    def _of_text(self, model: LanguageModel, text: str, tokens: list, logits: list) -> Substitutes:
        """Substitutes for one text from the guesses at its positions; position 0 is the start token's."""
        found, end, shifted = {}, 0, self.offset == "shifted"
        for position, word in enumerate(text.split(" ")):
            start, end = end, end + len(model.pieces(word))
            if start < self._kept and (word if shifted else word.lower()) not in stop_words():
                own = slice(start, end) if shifted else slice(start + 1, end + 1)
                words = self._words(model, tokens[own], logits[own], stop_words() | {word.lower()})
                found |= {position: words} if words else {}
        return found

    def _words(self, model: LanguageModel, tokens: list, logits: list, refused: frozenset[str]) -> list[str]:
        """What may fill the positions of one word: whole words from the best tokens above the threshold.

        Of several positions the first 24 combinations of the 4 best tokens at each of the first 12. The order by
        perplexity of the released code is left out: all of them are scored, so it decides nothing but exact ties.
        """
        if len(tokens) == 1:
            options = [(token,) for token, logit in zip(tokens[0], logits[0], strict=True) if logit >= self.threshold]
        else:
            options = islice(product(*(row[:TOKENS] for row in tokens[:PIECES])), COMBINATIONS if tokens else 0)
        joined = (model.join(option) for option in options if model.special.isdisjoint(option))
        return list(dict.fromkeys(text for text in joined if "##" not in text and text not in refused))


@component
class BertAttack(WordSubstitution, GreedyAttack):
    """BERT-Attack on embeddings: a masked language model proposes, the text encoder under attack chooses.

    As released with MMCoA: `BertAttack(offset="shifted", end_token=False)`.
    """

    def __post_init__(self) -> None:
        WordSubstitution.__post_init__(self)
        GreedyAttack.__post_init__(self)

    def speaker(self, clip: Clip) -> LanguageModel:
        """The language model that proposes."""
        return load_language_model(self.language_model, clip)


@component
class SynonymAttack(GreedyAttack):
    """The same search among synonyms, so that the meaning is kept.

    They come from the thesaurus of the CLIP's language: the words of Tinyworld, or WordNet. A name of several words
    that has synonyms of its own, such as "sports car", is swapped as one word.
    """

    def speaker(self, clip: Clip) -> Thesaurus:
        """The thesaurus of the CLIP's language."""
        return thesaurus(clip)

    def substitutes(self, speaker: Thesaurus, texts: Sequence[str]) -> dict[str, Substitutes]:
        """For each text, the words that may be swapped and their synonyms."""
        return {text: speaker.substitutes(text) for text in texts}

    def seen(self, speaker: Thesaurus, words: Iterable[str]) -> str:
        """The whole text."""
        return " ".join(words)


@component
class LabelAwareBertAttack(WordSubstitution):
    """A stronger control: one word per prompt, chosen to hurt the classifier on labelled held-out images.

    max_{t'_k} mean_i [log sum_j exp(s u_i . v_j) - s u_i . v_{y_i}] over the substitutes of all words of prompt k, one
    class k after the other, the others as they are by then. The clean prompt competes, so the loss never falls.
    """

    images: int = 1000  # at least one per class of the largest set

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("images", self.images, 1)

    def __call__(self, clip: Clip, prompts: Sequence[str], images: Tensor, labels: Tensor) -> list[str]:
        """One attacked text per class prompt, for (n, 3, h, w) pixels in [0, 1] and (n,) labels of the attacker."""
        prompts = check_texts("prompts", prompts)
        if not prompts:
            return []
        labels = check_labels(labels, len(prompts), len(check_images(images))).cpu()
        if not len(images):
            raise ValueError(f"images is empty; give about {self.images} held-out images with their labels")
        found = self.substitutes(load_language_model(self.language_model, clip), prompts)
        options = [[prompt, *variants(prompt, found[prompt])] for prompt in prompts]
        features = TextFeatures(clip)
        features([text for several in options for text in several])  # all of them in large batches
        with torch.no_grad(), frozen(features.model):
            parts = [features.model.encode_images(part.to(clip.device)).cpu() for part in images.split(BATCH)]
        return sweep(clip.logit_scale.item() * torch.cat(parts).double(), labels, options, features)


def variants(text: str, substitutes: Substitutes) -> list[str]:
    """The texts that differ from `text` by one substitute."""
    words = text.split(" ")
    return [" ".join(swapped(words, at, word)) for at, several in substitutes.items() for word in several]


def sweep(images: Tensor, labels: Tensor, options: list[list[str]], features: Callable) -> list[str]:
    """One sweep of coordinate ascent over the classes: the option of each that maximises the mean cross-entropy.

    `images` are (n, d) features times the logit scale; the first of `options[k]` is the clean prompt of class k. The
    log-sum-exp over the later classes is summed up once from the end: nothing is ever subtracted.
    """
    clean = images @ features([several[0] for several in options]).T
    later = clean.flip(1).logcumsumexp(1).flip(1)
    nothing = torch.full_like(clean[:, :1], -float("inf"))
    settled, later, chosen = nothing[:, 0], torch.cat([later[:, 1:], nothing], 1), []
    for label, several in enumerate(options):
        logits = images @ features(several).T
        others = torch.logaddexp(settled, later[:, label])
        losses = (torch.logaddexp(others[:, None], logits) - logits * (labels == label)[:, None]).mean(0)
        best = int(losses.argmax())
        chosen.append(several[best])
        settled = torch.logaddexp(settled, logits[:, best])
    return chosen
