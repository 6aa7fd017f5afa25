"""Adversarial fine-tuning in its simplest form: cross-entropy over the class prompts on PGD images.

This is the loop that shows what the embedded world allows; one loss, the image tower only, everything explicit.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks.base import NORMS, frozen
from robustclip.checks import check_range
from robustclip.models import Clip, ZeroShotClassifier
from robustclip.progress import progress


@dataclass(frozen=True, kw_only=True)
class AdversarialFineTuning:
    """min over the image tower of E[ max over |delta| <= eps of CE(f(x + delta), y) ], the max by a few PGD steps.

    Batch statistics stay frozen, so an image's logits never depend on its neighbors. The learning rate rises and falls
    once, and the budget grows linearly to its full size over the first three tenths of the updates.
    """

    eps: float
    steps: int = 600  # updates
    attack_steps: int = 3
    batch_size: int = 128
    peak: float = 2e-3  # learning rate at its highest
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("eps", self.eps, 0, 1)
        check_range("steps", self.steps, 1)
        check_range("attack_steps", self.attack_steps, 1)
        check_range("batch_size", self.batch_size, 1)

    def __call__(self, clip: Clip, images: Tensor, labels: Tensor, prompts: tuple[str, ...]) -> Clip:
        """A tuned copy of `clip`; `images` (n, 3, h, w) are uint8 or float training pictures, `labels` (n,)."""
        tuned = copy.deepcopy(clip)
        classifier = ZeroShotClassifier(tuned, prompts)
        tower = tuned.network.visual.requires_grad_(True)
        optimizer = torch.optim.AdamW(tower.parameters(), lr=self.peak, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.peak, self.steps + 1, pct_start=0.2)
        order = torch.Generator().manual_seed(self.seed)
        for step in progress(range(self.steps), "adversarial fine-tuning", total=self.steps):
            rows = torch.randint(len(images), (self.batch_size,), generator=order)
            batch, target = _pixels(images[rows]).to(tuned.device), labels[rows].to(tuned.device)
            noise = torch.rand(batch.shape, generator=order).to(batch) * 2 - 1
            eps = self.eps * min(1, (step + 1) / (0.3 * self.steps))
            attacked = inner_maximum(classifier, batch, target, eps, self.attack_steps, noise)
            loss = F.cross_entropy(classifier(attacked), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        return tuned.requires_grad_(False)


def inner_maximum(
    classifier: ZeroShotClassifier, images: Tensor, labels: Tensor, eps: float, steps: int, noise: Tensor
) -> Tensor:
    """The last l_inf PGD iterate from x + eps * noise, steps of length 2 eps / steps, for every image of the batch.

    Unlike the attack used for measuring, images that are already wrong are attacked too: training learns from them.
    """
    linf = NORMS["linf"]
    delta = linf.random(noise, eps)
    with frozen(classifier):
        for _ in range(steps):
            delta.requires_grad_()
            loss = F.cross_entropy(classifier((images + delta).clamp(0, 1)), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = linf.project(delta.detach() + 2 * eps / steps * linf.ascend(gradient), eps)
    return (images + delta).clamp(0, 1)


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images
