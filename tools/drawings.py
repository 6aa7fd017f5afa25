"""What the CLIP of Tinyworld learns from: pictures drawn by code and captions about half of them, every one once."""

from pathlib import Path

import torch
from torch import Tensor

from pretraining import Step, text_tower, tokenize, write_vocabulary
from robustclip.data import tinyworld
from robustclip.data.grammar import Speaker, vocabulary
from robustclip.data.tinyworld import ANY, training_scenes, training_strengths

STEPS = 5000  # of training


def write_tokenizer(folder: Path):
    """Save the word-piece tokenizer of Tinyworld in transformers' format and return it."""
    return write_vocabulary(folder, vocabulary())


def fits(pictures: Tensor, said: Tensor) -> Tensor:
    """(n, m) float: caption j mentions nothing that picture i contradicts."""
    return ((said[None] == ANY) | (said[None] == pictures[:, None])).all(-1).float()


class Drawings(torch.utils.data.Dataset):
    """Steps of 256 pictures, never of a held-out color-shape pair, and captions of the first half of them."""

    smoothing, kinds = 0.0, 0

    def __init__(self, folder: Path) -> None:
        self.tokenizer = write_tokenizer(folder)
        self.name = f"tinyworld, {tinyworld.BATCH} pictures a step"
        self.text, self.pictures = text_tower("tinyworld", self.tokenizer, width=64), tinyworld.BATCH

    def __getitem__(self, step: int) -> Step:
        scenes = training_scenes(step)
        texts, said = Speaker(step).captions(scenes[: len(scenes) // 2])
        images = tinyworld.draw(scenes, f"pretrain/{step}", strength=training_strengths(step))
        true = fits(scenes.meaning(), said)
        return Step(images, tokenize(self.tokenizer, texts), true, true, torch.empty(0))
