"""Optimal transport between small sets, many problems at once: what it costs to move views onto texts.

plan = sinkhorn(cost, rows, columns)       # entropic; cost (..., N, M), marginals (..., N) and (..., M)
(plan * cost).sum((-2, -1))                # the score, without the entropy
"""

import numpy as np
import torch
from torch import Tensor

TOGETHER = 2048  # problems that are solved together: they stay in the processor's cache


@torch.no_grad()
def sinkhorn(cost: Tensor, rows: Tensor, columns: Tensor, smoothing: float = 0.1, sweeps: int = 100) -> Tensor:
    """The plan T >= 0 with marginals a (`rows`) and b (`columns`) that minimises <T, C> + l sum T log T.

    u = a / (K v), v = b / (K^T u), T = diag(u) K diag(v) with K = exp(-C / l): `sweeps` of these, for every problem as
    many, so that its neighbours do not matter. Each problem's smallest cost is taken off first, which changes no plan.
    """
    low, high = cost.amin((-2, -1), keepdim=True), cost.amax((-2, -1), keepdim=True)
    reach = float((high - low).max()) / smoothing if cost.numel() else 0.0
    if not reach < 600:
        raise ValueError(
            f"smoothing={smoothing:.3g} is too small for costs that far apart; give more, or solver='exact'"
        )
    dtype = torch.float32 if reach < 60 else torch.float64  # exp(-reach) has to be a number
    sides = [side.expand(*cost.shape[:-2], -1).reshape(-1, side.shape[-1]) for side in (rows, columns)]
    flat = (low - cost).reshape(-1, *cost.shape[-2:])
    parts = zip(*(side.split(TOGETHER) for side in (flat, *sides)), strict=True)
    plans = [_scaled((gains.to(dtype) / smoothing).exp_(), a.to(dtype), b.to(dtype), sweeps) for gains, a, b in parts]
    return torch.cat(plans).view(cost.shape).to(cost)


def _scaled(kernel: Tensor, a: Tensor, b: Tensor, sweeps: int) -> Tensor:
    """diag(u) K diag(v) of some problems (p, N, M) after so many sweeps."""
    v = torch.ones_like(b)
    for _ in range(sweeps):
        u = a / (kernel * v[:, None]).sum(2)
        v = b / (kernel * u[..., None]).sum(1)
    return kernel.mul_(u[..., None]).mul_(v[:, None])


@torch.no_grad()
def exact(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The plan of least cost, problem by problem through POT."""
    import ot

    flat = cost.double().cpu().reshape(-1, *cost.shape[-2:]).numpy()
    sides = [side.double().cpu().expand(*cost.shape[:-2], side.shape[-1]) for side in (rows, columns)]
    sides = [(side / side.sum(-1, keepdim=True)).reshape(len(flat), -1).numpy() for side in sides]
    plans = [ot.emd(*pair, np.ascontiguousarray(one)) for one, *pair in zip(flat, *sides, strict=True)]
    return torch.from_numpy(np.stack(plans)).reshape(cost.shape).to(cost)


@torch.no_grad()
def independent(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """T = a b^T: no transport, a weighted mean."""
    return (rows.unsqueeze(-1) * columns.unsqueeze(-2)).to(cost).expand_as(cost)
