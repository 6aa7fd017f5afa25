"""Thresholds of the test-time defenses' gates, from clean training images: python tools/calibrate.py quick full photo

Writes the table [defenses] of the scales' files:

    keep      relative drift that 90 % of clean images exceed: below it, TTC counterattacks
    reverse   relative drift that 10 % of clean images exceed: above it, the reversed gate does
    cosine    cosine drift that 10 % of clean images exceed, over DOC's draws
"""

import re
import sys
from pathlib import Path

import torch

from robustclip import models, study
from robustclip.data.sources import load_samples
from robustclip.defenses.counterattack import Counterattack
from robustclip.progress import progress

SCALES = Path(__file__).parent.parent / "src/robustclip/assets/scales"
IMAGES = 500  # of the training part of each source role
SHARE = 0.9  # of clean images that the gate leaves alone


@torch.no_grad()
def drifts(scale: study.Scale, **settings: object) -> torch.Tensor:
    """Scores of clean training images of all source roles, under noise of four units."""
    clip = models.load(scale.model("clip"))
    classifier = models.ZeroShotClassifier.of_axes(clip)
    gauge = Counterattack(radius=4 * scale.reference_eps, **settings)
    found = []
    for name in progress(scale.role_names("source"), "roles", unit="role"):
        images = load_samples(name, source=scale.source, split="train", n=IMAGES).images.to(clip.device)
        found += [gauge.score(classifier, part, draw=0) for part in images.split(100)]
    return torch.cat(found).double()


def thresholds(scale: study.Scale) -> dict[str, float]:
    """The table, to four digits."""
    relative, cosine = drifts(scale), drifts(scale, drift="cosine", drift_draws=4)
    found = {
        "keep": relative.quantile(1 - SHARE),
        "reverse": relative.quantile(SHARE),
        "cosine": cosine.quantile(SHARE),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def write(name: str) -> None:
    """Put the table into the scale's file, in the place of the one that was there."""
    path = SCALES / f"{name}.toml"
    text = re.sub(r"\n# Gates.*?\n\[defenses\]\n([^\[#]*)", "\n", path.read_text(encoding="utf-8"), flags=re.S).rstrip()
    lines = [f"{key} = {value}" for key, value in thresholds(study.scale(name)).items()]
    head = "# Gates of test-time defenses, from clean training images: python tools/calibrate.py\n[defenses]"
    path.write_text("\n".join([text, "", head, *lines, ""]), encoding="utf-8")
    print(name, *lines)


if __name__ == "__main__":
    for name in sys.argv[1:] or ("quick", "full", "photo"):
        write(name)
