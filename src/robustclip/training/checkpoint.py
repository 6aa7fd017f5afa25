"""The one file that an interrupted run goes on from: weights, optimizer, random states, counters and losses."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from robustclip.checks import check_folder
from robustclip.component import digest_of

CHECKPOINT = "checkpoint.safetensors"


def save(path: Path, weights: list[Tensor], optimizer: Optimizer, facts: dict) -> None:
    """Write everything and a digest of it, at once or not at all."""
    tensors = {f"weights/{number}": weight.detach() for number, weight in enumerate(weights)}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": value for name, value in state.items()}
    tensors = {name: value.cpu().contiguous().clone() for name, value in (tensors | _random_states()).items()}
    check_folder(path.parent, 2 * sum(value.nbytes for value in tensors.values()) / 1e6)
    about, temporary = json.dumps(facts), path.with_suffix(".tmp")
    save_file(tensors, temporary, {"run": about, "digest": _digest(tensors, about)})
    temporary.replace(path)


def restore(path: Path, weights: list[Tensor], optimizer: Optimizer, expected: dict) -> dict:
    """Put everything back from a file that `save` wrote, and return its facts; those `expected` must be the same."""
    tensors, facts = _read(path)
    if different := [name for name, value in expected.items() if facts.get(name) != value]:
        raise ValueError(f"{path} is of another run ({', '.join(different)} differ); choose another folder")
    _check(path, tensors, weights)
    states: dict[int, dict] = {}
    with torch.no_grad():
        for number, weight in enumerate(weights):
            weight.copy_(tensors[f"weights/{number}"])
        for name in (name for name in tensors if name.startswith("optimizer/")):
            _, number, entry = name.split("/")
            weight, value = weights[int(number)], tensors[name]
            value = torch.empty_like(weight).copy_(value) if value.ndim else value  # moments lie as their weight does
            states.setdefault(int(number), {})[entry] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return facts


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of a file that is whole."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        if _digest(tensors, about["run"]) != about["digest"]:
            raise ValueError("its content was changed or damaged")
        return tensors, json.loads(about["run"])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint, or a torn one ({error}); delete it to start anew") from error


def _check(path: Path, tensors: dict[str, Tensor], weights: list[Tensor]) -> None:
    """Each weight has to be there, and what the optimizer keeps of it has its shape, or is a number."""
    needed = {f"weights/{number}": weight.shape for number, weight in enumerate(weights)}
    needed["random/cpu"] = torch.get_rng_state().shape
    for name in (name for name, value in tensors.items() if name.startswith("optimizer/") and value.ndim):
        needed[name] = needed.get(f"weights/{name.split('/')[1]}", "unknown")
    for name, shape in needed.items():
        found = tensors[name].shape if name in tensors else "missing"
        if found != shape:
            raise ValueError(
                f"{path} does not fit this run: {name} is {found}, it should be {shape}; delete the file to start anew"
            )


def _random_states() -> dict[str, Tensor]:
    """The state of torch's generators."""
    states = {"random/cpu": torch.get_rng_state()}
    return states | ({"random/cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    """sha256 of names, shapes, bytes and facts."""
    parts = [[name, list(value.shape), digest_of(value)] for name, value in sorted(tensors.items())]
    return hashlib.sha256(json.dumps([parts, about]).encode()).hexdigest()
