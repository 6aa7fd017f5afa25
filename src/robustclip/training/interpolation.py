"""Models between two others."""

import copy

import torch

from robustclip.checks import check_range
from robustclip.models import Clip


@torch.no_grad()
def interpolate(first: Clip, second: Clip, weight: float) -> Clip:
    """(1 - weight) theta_first + weight theta_second, for two CLIPs of one architecture."""
    check_range("weight", weight, 0, 1)
    between = copy.deepcopy(first)
    own, others = (
        {name.removeprefix("network."): value for name, value in clip.state_dict().items()}
        for clip in (between, second)
    )
    shapes, other_shapes = ({(name, value.shape) for name, value in state.items()} for state in (own, others))
    if different := sorted(name for name, _ in shapes ^ other_shapes):
        raise ValueError(f"{first.name!r} and {second.name!r} differ in {different[0]!r}; give one architecture")
    for name, value in own.items():
        value.copy_(torch.lerp(value, others[name].to(value), weight) if value.is_floating_point() else others[name])
    return between
