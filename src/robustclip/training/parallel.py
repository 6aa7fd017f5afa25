"""Several processes that train one model: `torchrun --nproc-per-node 2 --no-python robustclip train ...`.

Every process sees its own slice of each global batch and all of its features, so a loss is written as if there were
one process only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes that `torchrun` started, if it did; part at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or distributed.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def world() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def share(rows: int) -> slice:
    """This process's rows of a global batch."""
    rank, size = world()
    if rows % size:
        raise ValueError(f"batch_size={rows} cannot be shared evenly by {size} processes; choose a multiple of {size}")
    return slice(rank * rows // size, (rank + 1) * rows // size)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context, features: Tensor) -> Tensor:
        parts = [torch.empty_like(features) for _ in range(world()[1])]
        distributed.all_gather(parts, features)
        return torch.cat(parts)

    @staticmethod
    def backward(context, slope: Tensor) -> Tensor:
        slope = slope.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(slope)
        return slope[share(len(slope))]


def gather(features: Tensor) -> Tensor:
    """The rows of all processes, in order; gradients find their way back."""
    return features if world()[1] == 1 else _Gather.apply(features.contiguous())


def synchronised(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over all processes, if there are several."""
    return module if world()[1] == 1 else nn.parallel.DistributedDataParallel(module)


def wait() -> None:
    """Until every process is here."""
    if world()[1] > 1:
        distributed.barrier()
