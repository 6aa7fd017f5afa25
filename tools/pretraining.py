"""Train the embedded models from nothing; `tools/pretrain.py` runs it and writes the model cards.

Both read Tinyworld only. The CLIP sees scenes and captions, never a held-out color-shape pair; the masked language
model sees the captions. Each folder is written in the format of its library (open_clip, transformers).
"""

import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustclip.data import tinyworld
from robustclip.data.grammar import Speaker, vocabulary
from robustclip.data.tinyworld import ANY, training_scenes
from robustclip.models import CONFIG, WEIGHTS

CONTEXT = 24  # tokens per caption
MLM_SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 48, "layers": [1, 2, 2, 1], "width": 16, "patch_size": None, "head_width": 64},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": 0,
            "hf_tokenizer_name": "tinyworld",
            "width": 64,
            "heads": 4,
            "layers": 2,
            "pool_type": "first",
            "no_causal_mask": True,
        },
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


# --- what the models see ----------------------------------------------------------------------------------------------


class Stream(torch.utils.data.Dataset):
    """Batches of (images, tokens, picture meanings, caption meanings)."""

    def __init__(self, batches: int, tokenizer) -> None:
        self.batches, self.tokenizer = batches, tokenizer

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scenes = training_scenes(batch)
        texts, said = Speaker(batch).captions(scenes)
        images = tinyworld.draw(scenes, f"pretrain/{batch}")
        return images, tokenize(self.tokenizer, texts), scenes.meaning(), said


def tokenize(tokenizer, texts: list[str]) -> Tensor:
    """(n, CONTEXT) token ids."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt")["input_ids"]


def write_tokenizer(folder: Path):
    """Save the shared word-piece tokenizer in transformers' format and return it."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), do_lower_case=True, model_max_length=CONTEXT)
    tokenizer.save_pretrained(folder)
    return tokenizer


# --- CLIP -------------------------------------------------------------------------------------------------------------


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, fits: Tensor) -> Tensor:
    """CLIP's symmetric loss where a caption may fit several pictures: targets are spread evenly over all that fit.

    `images`, `texts` are (n, d) unit rows; `fits[i, j]` says whether caption j is true of picture i.
    """
    logits = scale * images @ texts.T
    rows = fits / fits.sum(1, keepdim=True).clamp(min=1)
    columns = fits / fits.sum(0, keepdim=True).clamp(min=1)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns.T)) / 2


def fits(pictures: Tensor, said: Tensor) -> Tensor:
    """(n, n) float: caption j mentions nothing that picture i contradicts."""
    return ((said[None] == ANY) | (said[None] == pictures[:, None])).all(-1).float()


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


def _save(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)


@torch.random.fork_rng(devices=())
def train_clip(folder: Path, steps: int, workers: int = 1, peak: float = 2e-3, report_every: int = 100) -> dict:
    """Train the embedded CLIP for `steps` batches of 256 and save it in open_clip's folder format."""
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder)
    config = json.loads(json.dumps(CLIP_CONFIG))
    config["model_cfg"]["text_cfg"]["vocab_size"] = len(tokenizer)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_clip(folder).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    loader = torch.utils.data.DataLoader(Stream(steps, tokenizer), batch_size=None, num_workers=workers)
    mean, std = (torch.tensor(config["preprocess_cfg"][key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    start, size = time.time(), config["model_cfg"]["vision_cfg"]["image_size"]
    for step, batch in enumerate(loader):
        images, tokens, pictures, said = (part.to(device) for part in batch)
        pixels = (images.float() / 255 - mean) / std
        if size != tinyworld.SIZE:
            pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=False)
        with torch.autocast(device, dtype=torch.bfloat16):
            image_features = model.encode_image(pixels.contiguous(memory_format=torch.channels_last))
            text_features = model.encode_text(tokens)
        normal = [F.normalize(features.float(), dim=-1) for features in (image_features, text_features)]
        loss = contrastive_loss(*normal, model.logit_scale.exp(), fits(pictures, said))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % report_every == report_every - 1:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
            _save(model, folder)
    _save(model, folder)
    return {"steps": steps, "images": steps * tinyworld.BATCH, "seconds": round(time.time() - start), "device": device}


# --- masked language model --------------------------------------------------------------------------------------------


def sentences(batch: int, stream: str = "pretrain") -> list[str]:
    """One batch of captions; streams other than "pretrain" are never trained on."""
    if stream == "pretrain":
        return Speaker(batch).captions(training_scenes(batch))[0]
    return Speaker(f"{stream}/{batch}").captions(training_scenes(-1 - batch))[0]


def mask_tokens(tokens: Tensor, mask: int, words: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hide 15 % of the words as BERT does: 80 % become [MASK], 10 % a random word, 10 % stay; others get label -100."""
    special = tokens < 5
    chosen = (torch.rand(tokens.shape, generator=random) < 0.15) & ~special
    labels = torch.where(chosen, tokens, -100)
    fate = torch.rand(tokens.shape, generator=random)
    hidden = torch.where(chosen & (fate < 0.8), mask, tokens)
    other = torch.randint(5, words, tokens.shape, generator=random)
    return torch.where(chosen & (fate >= 0.9), other, hidden), labels


@torch.random.fork_rng(devices=())
def train_mlm(folder: Path, steps: int, peak: float = 2e-3, report_every: int = 100) -> dict:
    """Train the embedded masked language model and save it in transformers' folder format."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **MLM_SIZES)
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    start = time.time()
    for step in range(steps):
        tokens = tokenize(tokenizer, sentences(step))
        hidden, labels = mask_tokens(tokens, tokenizer.mask_token_id, len(tokenizer), tinyworld.generator("mlm", step))
        loss = model(input_ids=hidden, attention_mask=(tokens != 0).long(), labels=labels).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % report_every == report_every - 1:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
    model.save_pretrained(folder, safe_serialization=True)
    sentences_seen = steps * tinyworld.BATCH
    return {"steps": steps, "sentences": sentences_seen, "seconds": round(time.time() - start), "device": "cpu"}


@torch.no_grad()
def mlm_accuracy(folder: Path, batches: int = 4, best: int = 10) -> tuple[int, int]:
    """Hits and trials: every word of held-out sentences hidden in turn, is it among the `best` guesses?"""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    hits = trials = 0
    for batch in range(batches):
        tokens = tokenize(tokenizer, sentences(batch, "held-out"))
        rows, places = (tokens >= 5).nonzero(as_tuple=True)
        for part in torch.arange(len(rows)).split(1024):
            hidden = tokens[rows[part]].clone()
            hidden[torch.arange(len(part)), places[part]] = tokenizer.mask_token_id
            logits = model(input_ids=hidden, attention_mask=(hidden != 0).long()).logits
            guesses = logits[torch.arange(len(part)), places[part]].topk(best).indices
            hits += (guesses == tokens[rows[part], places[part]][:, None]).any(1).sum().item()
            trials += len(part)
    return hits, trials
