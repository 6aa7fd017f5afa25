"""Pre-train a CLIP from nothing; `tools/pretrain.py` runs it and writes the model cards.

A stream says what a step sees: `drawings.py` for Tinyworld, `photographs.py` for real ones; `adversary.py` attacks it.
An interrupted run goes on from its last checkpoint and ends with the same weights. The folder is written in open_clip's
format.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adversary import Adversary
from robustclip.files import write_whole
from robustclip.models import CONFIG, WEIGHTS
from robustclip.training import checkpoint

SIZE = 48  # pixels per side of what the image tower sees
CONTEXT = 32  # tokens per text
VOID = -1e4  # logit of what is no choice
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": SIZE, "layers": [1, 2, 2, 1], "width": 16, "patch_size": None, "head_width": 64},
        "text_cfg": {"heads": 4, "layers": 2, "pool_type": "first", "no_causal_mask": True},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


class Step(NamedTuple):
    """What one update learns from."""

    images: Tensor  # (n, 3, h, w) uint8
    tokens: Tensor  # (m, context)
    fits: Tensor  # (n, m) float: whether caption j is true of picture i
    meant: Tensor  # (n, m) float: whether, being true, it was also said about pictures like i
    kinds: Tensor  # (n,) the number of each picture's kind, for a stream that knows kinds; else (0,)


class Stream(Protocol):
    """Steps by number, the same ones in every run; its tokenizer lies in the model's folder already."""

    name: str  # what it shows
    pictures: int  # of a step
    text: dict  # context_length, width, vocab_size ... of the text tower
    smoothing: float  # share of a picture's target that goes to all choices alike
    kinds: int  # of pictures, which a classifier beside the text tower learns to tell apart; 0: none

    def __getitem__(self, step: int) -> Step:
        """The pictures and captions of one step."""


def write_vocabulary(folder: Path, vocabulary: list[str]):
    """Save a word-piece tokenizer in transformers' format and return it."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), do_lower_case=True, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


def text_tower(name: str, tokenizer, width: int) -> dict:
    """What a configuration says about the text tower of a vocabulary."""
    words = {"vocab_size": len(tokenizer), "hf_tokenizer_name": name}
    return {"context_length": CONTEXT, **words, "width": width}


def tokenize(tokenizer, texts: list[str]) -> Tensor:
    """(n, CONTEXT) token ids."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, fits: Tensor, meant: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """CLIP's symmetric loss of n pictures and m captions, where a caption may fit several pictures.

    `images` (n, d) and `texts` (m, d) are unit rows. The targets of a caption are spread evenly over all pictures that
    it fits; those of a picture over the captions that are `meant` for it, all that fit by default, and others that are
    true of it, too, are no choice. What nothing fits does not count. `smoothing` spreads a share of a picture's target
    over its choices.
    """
    logits = scale * images @ texts.T
    meant = fits if meant is None else meant
    choices = 1 - (fits - meant)
    return (_spread(logits, meant, choices, smoothing) + _spread(logits.T, fits.T, torch.ones_like(fits.T), 0.0)) / 2


def _spread(logits: Tensor, right: Tensor, choices: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each row among its choices, with targets spread over those that are right."""
    known = right.sum(1) > 0
    right, choices = right[known], choices[known]
    targets = (1 - smoothing) * right / right.sum(1, keepdim=True) + smoothing * choices / choices.sum(1, keepdim=True)
    return F.cross_entropy(logits[known].masked_fill(choices == 0, VOID), targets)


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to zero; a factor between 0 and 1."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def build_clip(folder: Path) -> nn.Module:
    """A randomly initialised CLIP from the configuration in `folder`."""
    import open_clip

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    return open_clip.CLIP(**{key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")})


def _write_config(folder: Path, text: dict) -> None:
    """The one architecture of all embedded CLIPs, around the stream's vocabulary."""
    config = json.loads(json.dumps(CLIP_CONFIG))
    config["model_cfg"]["text_cfg"] |= text
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _save(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    temporary = folder / f"{WEIGHTS}.tmp"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary)
    temporary.replace(folder / WEIGHTS)


def descend(
    weights: list[Tensor],
    optimizer: torch.optim.Optimizer,
    losses: Callable[[int], Iterator[Tensor]],
    path: Path,
    facts: dict,
    report_every: int,
    clip_norm: float = math.inf,  # of the gradient
) -> int:
    """Take the steps that the checkpoint at `path` lacks, and return how many seconds all of them took.

    `losses` gives the loss of each step from a number on; `facts` say what the run is, its steps and peak among them.
    """
    done = checkpoint.restore(path, weights, optimizer, facts) if path.exists() else {"step": 0, "seconds": 0}
    start = time.time() - done["seconds"]
    for step, loss in enumerate(losses(done["step"]), done["step"]):
        for group in optimizer.param_groups:
            group["lr"] = facts["peak"] * learning_rate(step, facts["steps"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_norm)
        optimizer.step()
        if step % report_every == report_every - 1:
            seconds = round(time.time() - start)
            print(f"step {step + 1}/{facts['steps']}  loss {loss:.3f}  {seconds} s", flush=True)
            checkpoint.save(path, weights, optimizer, facts | {"step": step + 1, "seconds": seconds})
    return round(time.time() - start)


@torch.random.fork_rng(devices=())
def train_clip(
    folder: Path,
    stream: Stream,
    steps: int,
    peak: float = 2e-3,
    workers: int = 1,
    report_every: int = 100,
    adversary: Adversary | None = None,
) -> dict:
    """Train a CLIP on the steps of the stream, or go on with an interrupted run, and save it into `folder`.

    With an adversary it learns from what that makes of them.
    """
    torch.manual_seed(0)
    _write_config(folder, stream.text)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    learner = nn.ModuleDict({"clip": build_clip(folder)})
    if stream.kinds:
        learner["classifier"] = nn.Linear(CLIP_CONFIG["model_cfg"]["embed_dim"], stream.kinds)
    learner = learner.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(learner.parameters(), betas=(0.9, 0.98), weight_decay=0.05)

    def losses(first: int) -> Iterator[Tensor]:
        order = range(first, steps)
        batches = torch.utils.data.DataLoader(stream, batch_size=None, sampler=order, num_workers=workers)
        for number, batch in enumerate(batches, first):
            learner["clip"].logit_scale.data.clamp_(max=math.log(100))
            learn = _Objective(learner, Step(*(part.to(device) for part in batch)), stream.smoothing)
            shown = learn.step.images.float() / 255, learn.step.tokens
            if adversary:
                shown = adversary(learner, learn, *shown, number, steps)
            yield learn(*shown)

    weights, path = [*learner.parameters(), *learner.buffers()], folder / checkpoint.CHECKPOINT
    facts = {"steps": steps, "peak": peak, "stream": stream.name, "adversary": repr(adversary)}
    seconds = descend(weights, optimizer, losses, path, facts, report_every, clip_norm=1.0)
    _save(learner["clip"], folder)
    path.unlink(missing_ok=True)
    return {"steps": steps, "peak": peak, "images": steps * stream.pictures, "seconds": seconds, "device": device}


class _Objective:
    """The contrastive loss of a step, and that of the classifier, if there is one, for any pixels and tokens of it."""

    def __init__(self, learner: nn.ModuleDict, step: Step, smoothing: float) -> None:
        self.learner, self.step, self.smoothing = learner, step, smoothing

    def __call__(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """The loss; pixels lie in [0, 1]."""
        clip, preprocess = self.learner["clip"], CLIP_CONFIG["preprocess_cfg"]
        if pixels.shape[-1] != SIZE:
            pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=False)
        mean, std = (torch.tensor(preprocess[key], device=pixels.device).view(3, 1, 1) for key in ("mean", "std"))
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
            seen = clip.encode_image(((pixels - mean) / std).contiguous(memory_format=torch.channels_last))
            said = clip.encode_text(tokens)
        images, texts = (F.normalize(features.float(), dim=-1) for features in (seen, said))
        scale = clip.logit_scale.exp()
        loss = contrastive_loss(images, texts, scale, self.step.fits, self.step.meant, self.smoothing)
        if "classifier" in self.learner:
            told = self.learner["classifier"](seen.float())
            loss = loss + F.cross_entropy(told, self.step.kinds, label_smoothing=self.smoothing)
        return loss
