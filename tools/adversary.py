"""Attacks on what a CLIP learns from, while it learns: pictures within a budget, and a word of each caption.

Adversary(eps=2 / 255)                          # pictures only
Adversary(eps=2 / 255, language="photo-mlm")    # captions, too
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from robustclip.attacks.ascent import FixedSteps, ascend
from robustclip.attacks.language import load_language_model

PROPOSALS = 10  # of the language model, for each word

Loss = Callable[[Tensor, Tensor], Tensor]  # pixels in [0, 1] and tokens -> what the weights are to lower


@dataclass(frozen=True)
class Adversary:
    """Raises the loss of a step before the weights lower it; batch statistics stay as they are meanwhile.

    Pictures take `steps` sign steps of 2 eps / steps within `eps`, from a random start; eps grows over the share
    `warm_up` of the training. With a `language` model one word of each caption is swapped for one of its proposals: the
    swap that raises the loss most, to first order.
    """

    eps: float
    steps: int = 2
    language: str = ""
    warm_up: float = 0.3

    def __call__(
        self, learner: nn.ModuleDict, loss: Loss, pixels: Tensor, tokens: Tensor, step: int, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Pictures and tokens of one of so many steps after the attack."""
        learner.eval()
        eps = self.eps * min(1, (step + 1) / max(1, self.warm_up * steps))
        pixels = self._moved(lambda points: loss(points, tokens), pixels, eps, step)
        if self.language:
            tokens = swapped(learner["clip"].token_embedding, lambda said: loss(pixels, said), tokens, self.language)
        learner.train()
        return pixels, tokens

    def _moved(self, loss: Callable[[Tensor], Tensor], pixels: Tensor, eps: float, seed: int) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        noise = torch.rand(pixels.shape, generator=random).to(pixels) * 2 - 1
        stepper = FixedSteps(2 * eps / self.steps)
        return ascend(lambda points, rows: (loss(points).expand(len(rows)), None), pixels, eps=eps, steps=self.steps,
                      stepper=stepper, noise=noise, keep="last").images  # fmt: skip

    def passes(self) -> float:
        """Image passes, forward and backward together, that a picture of a step takes: those of the update, too."""
        return self.steps + 1 + 0.5 * bool(self.language)


def swapped(embedding: nn.Embedding, loss: Callable[[Tensor], Tensor], tokens: Tensor, language: str) -> Tensor:
    """Captions (m, length) after the best swap of one word, judged by the slope of the loss in its embedding."""
    seen: list[Tensor] = []
    hook = embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        (slope,) = torch.autograd.grad(loss(tokens), seen[0])
    finally:
        hook.remove()
    choices = proposed(tokens, language)  # (m, length, k)
    with torch.no_grad():
        gains = torch.einsum("mld,mlkd->mlk", slope, embedding(choices) - embedding(tokens)[:, :, None])
    whole = words(language)[tokens] & ~continued(tokens, language)
    allowed = whole[:, :, None] & words(language)[choices] & (choices != tokens[:, :, None])
    best, place = gains.masked_fill(~allowed, 0).flatten(1).max(1)
    rows, (at, which) = torch.arange(len(tokens)), (place // choices.shape[2], place % choices.shape[2])
    found = tokens.clone()
    found[rows, at] = torch.where(best > 0, choices[rows, at, which], tokens[rows, at])
    return found


def proposed(tokens: Tensor, language: str) -> Tensor:
    """(m, length, PROPOSALS) what a language model would say in each place of the sentences as they are."""
    with torch.no_grad():
        told = load_language_model(language).network(input_ids=tokens, attention_mask=(tokens != 0).long()).logits
    return told.topk(PROPOSALS).indices


@cache
def words(language: str) -> Tensor:
    """Whether each entry of the vocabulary is a whole word."""
    return torch.tensor([word.isalpha() for word in vocabulary(language)])


def continued(tokens: Tensor, language: str) -> Tensor:
    """(m, length) whether the next token goes on with the same word."""
    inner = torch.tensor([word.startswith("##") for word in vocabulary(language)])[tokens]
    return torch.cat([inner[:, 1:], torch.zeros_like(inner[:, :1])], 1)


@cache
def vocabulary(language: str) -> list[str]:
    """The word pieces of a language model, which are those of its world's CLIP, by token."""
    tokenizer = load_language_model(language).tokenizer
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
