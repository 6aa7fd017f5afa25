"""Train the diffusion priors of CLIPureDiff on features of training images: `python tools/prior.py tinyworld-clip`.

A prior lies beside its CLIP. Training is deterministic on one machine; another one may change the last bits. The prior
of photographs needs ROBUSTCLIP_DATA.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from pretraining import learning_rate
from robustclip import models
from robustclip.data.sources import load_samples
from robustclip.defenses.clipure import PRIORS, TIMES, Prior
from robustclip.files import write_whole
from robustclip.progress import progress

PACKAGE = Path(__file__).parents[1] / "src" / "robustclip"
SOURCES = {"tinyworld-clip": "tinyworld", "photo-clip": "parquet"}
ROLES = ("cifar10", "cifar100", "tinyimagenet")  # sources of the papers; nothing is learned from what they transfer to
EACH = 12_000  # training images of a role, at most
STEPS, BATCH, PEAK = 4000, 1024, 2e-3


@torch.no_grad()
def training_features(name: str) -> Tensor:
    """Unit features (n, d) of training images of every role."""
    clip, found = models.load(name, device="cpu"), []
    for role in ROLES:
        images = load_samples(role, SOURCES[name], "train", EACH).images
        found += [clip.encode_images(part) for part in progress(images.split(500), f"encode {role}")]
    return torch.cat(found)


def mean_loss(prior: Prior, features: Tensor, times: tuple[int, int] = (0, TIMES - 1), seed: int = 0) -> Tensor:
    """The diffusion loss of unit features (n, d), each at one time between two (both included) with one noise."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randint(times[0], times[1] + 1, (len(features),), generator=random)
    return prior.loss(features, drawn, torch.randn(features.shape, generator=random)).mean()


@torch.random.fork_rng(devices=())
def train(features: Tensor, steps: int = STEPS, seed: int = 0) -> Prior:
    """A prior of unit features (n, d) after so many steps of AdamW on the diffusion loss."""
    torch.manual_seed(seed)
    prior, random = Prior(features.shape[1]), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(prior.parameters(), weight_decay=0.01)
    for step in progress(range(steps), "train"):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * learning_rate(step, steps)
        rows = torch.randint(len(features), (BATCH,), generator=random)
        optimizer.zero_grad()
        mean_loss(prior, features[rows], seed=step).backward()
        optimizer.step()
    return prior.requires_grad_(False)


def main() -> None:
    """Train the priors that are named and say what they learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", choices=PRIORS, metavar="CLIP", help=" or ".join(PRIORS))
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of training (default: {STEPS})")
    arguments = parser.parse_args()
    for name in arguments.clips:
        features = training_features(name)
        held_out = torch.arange(len(features)) % 20 == 0
        prior = train(features[~held_out], arguments.steps)
        write_whole(PACKAGE / PRIORS[name], save(prior.state_dict()))
        random = F.normalize(torch.randn(2000, prior.size, generator=torch.Generator().manual_seed(1)), dim=1)
        sets = {"training": features[~held_out], "held-out": features[held_out], "random": random}
        said = ", ".join(f"{kind} {mean_loss(prior, those, seed=arguments.steps):.3f}" for kind, those in sets.items())
        print(f"{name}: {len(features):,} features, loss on features: {said}", flush=True)


if __name__ == "__main__":
    main()
