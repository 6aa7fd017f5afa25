"""Train the embedded masked language models from nothing; `tools/pretrain.py` runs it and writes the model cards."""

import time
from pathlib import Path

import torch
from torch import Tensor

import drawings
from pretraining import learning_rate, tokenize
from robustclip.data import tinyworld
from robustclip.data.grammar import Speaker
from robustclip.data.tinyworld import training_scenes

MLM_SIZES = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}


def sentences(batch: int, stream: str = "pretrain") -> list[str]:
    """One batch of captions that use all synonyms alike; streams other than "pretrain" are never trained on."""
    seed, scenes = (batch, batch) if stream == "pretrain" else (f"{stream}/{batch}", -1 - batch)
    return Speaker(seed, synonyms=0.6, rare=0.4).captions(training_scenes(scenes))[0]


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
    tokenizer = drawings.write_tokenizer(folder)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **MLM_SIZES)
    model = BertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    start = time.time()
    for step in range(steps):
        tokens = tokenize(tokenizer, sentences(step), drawings.CONTEXT)
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
        tokens = tokenize(tokenizer, sentences(batch, "held-out"), drawings.CONTEXT)
        rows, places = (tokens >= 5).nonzero(as_tuple=True)
        for part in torch.arange(len(rows)).split(1024):
            hidden = tokens[rows[part]].clone()
            hidden[torch.arange(len(part)), places[part]] = tokenizer.mask_token_id
            logits = model(input_ids=hidden, attention_mask=(hidden != 0).long()).logits
            guesses = logits[torch.arange(len(part)), places[part]].topk(best).indices
            hits += (guesses == tokens[rows[part], places[part]][:, None]).any(1).sum().item()
            trials += len(part)
    return hits, trials
