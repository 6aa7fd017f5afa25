"""The one kind of object that attacks, defenses and recipes are: frozen settings with a call; and what identifies them.

attack = PGD(eps=4/255)
repr(attack)                 # "PGD(eps=0.01568...)": short, for display
settings(attack)             # every field, defaults included, as JSON: `rebuild` makes the attack again
identity(attack)             # the same without the module it lives in: what results are named by
"""

import hashlib
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, dataclass_transform

import numpy as np
import torch
from torch import Tensor, nn

Resolve = Mapping[str, Callable[[Any], Any]]  # name of a field -> what stands in an identity for its value


def _tell(self: Any) -> str:
    """The call that makes this object again: its name and every setting that is not the default."""
    told = []
    for entry in fields(self):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = getattr(self, entry.name)
        if entry.repr and (type(value) is not type(default) or value != default):
            told.append(f"{entry.name}={value!r}")
    return f"{type(self).__name__}({', '.join(told)})"


@dataclass_transform(frozen_default=True, kw_only_default=True)
def component(cls: type) -> type:
    """Make `cls` a frozen keyword-only dataclass whose short `repr` pastes back."""
    if "__repr__" not in vars(cls):
        cls.__repr__ = _tell
    return dataclass(frozen=True, kw_only=True, repr=False)(cls)


def settings(value: Any) -> Any:
    """A component with every field, or any value that may be one, as JSON from which `rebuild` makes it again."""
    return _described(value, {}, lambda kind: f"{kind.__module__}:{kind.__qualname__}")


def identity(value: Any, resolve: Resolve = {}) -> Any:  # noqa: B006  never changed
    """Every field of a component as JSON, whatever module it lives in; fields in `resolve` by what they stand for.

    Tensors, arrays and modules count by their bytes, functions by their source; what cannot be told apart from another
    of its kind is a ValueError.
    """
    return _described(value, resolve, lambda kind: kind.__qualname__)


def rebuild(described: Any) -> Any:
    """The value that `settings` described; a ValueError for components of a notebook, and for what is only a digest."""
    if isinstance(described, list):
        return [rebuild(part) for part in described]
    if not isinstance(described, dict):
        return described
    if "class" in described:
        known = {name: rebuild(part) for name, part in described.items() if name != "class"}
        return _class(described["class"])(**known)
    (kind, part), *_ = described.items()
    makers = {"tuple": lambda: tuple(rebuild(part)), "number": lambda: float(part), "path": lambda: Path(part),
              "mapping": lambda: {name: rebuild(one) for name, one in part}}  # fmt: skip
    if kind not in makers:
        raise ValueError(f"{described!r} is known by its digest only and cannot be made again; run what made it first")
    return makers[kind]()


def _class(path: str) -> type:
    module, _, name = path.partition(":")
    found = None if module == "__main__" else import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ValueError(f"{path!r} is not to be had here; run the notebook or script that defines it")
    return found


def _described(value: Any, resolve: Resolve, name_of: Callable[[type], str]) -> Any:
    again = lambda part: _described(part, resolve, name_of)  # noqa: E731
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [again(part) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [again(part) for part in value]}
    if isinstance(value, Mapping):
        return {"mapping": sorted([again(name), again(part)] for name, part in value.items())}
    if isinstance(value, Path):
        return {"path": str(value)}
    if found := _by_content(value, again):
        return found
    own = _own_settings(value)
    parts = {name: resolve[name](part) if name in resolve else again(part) for name, part in own.items()}
    return {"class": name_of(type(value)), **parts}


def _own_settings(value: Any) -> dict:
    """The fields by which components compare, or what another object with a `repr` of its own keeps."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: getattr(value, entry.name) for entry in fields(value) if entry.init and entry.compare}
    if hasattr(value, "__dict__") and type(value).__repr__ is not object.__repr__:
        return vars(value)
    raise ValueError(f"{value!r} has no settings that tell it from others of its kind; make its class a @component")


def _by_content(value: Any, again: Callable[[Any], Any]) -> dict | None:
    """What is known by its bytes or its source."""
    if isinstance(value, Tensor):
        return {"tensor": digest_of(value), "shape": list(value.shape)}
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise ValueError("an array of objects cannot be identified; give numbers")
        return {"array": digest_of(torch.from_numpy(np.ascontiguousarray(value))), "shape": list(value.shape)}
    if isinstance(value, nn.Module) and not is_dataclass(value):
        state = {name: digest_of(part) for name, part in sorted(value.state_dict().items())}
        return {"module": type(value).__qualname__, "weights": state}
    if isinstance(value, FunctionType):
        kept = [again(cell.cell_contents) for cell in value.__closure__ or ()]
        kept += [again(part) for part in value.__defaults__ or ()]
        return {"function": value.__qualname__, "source": source_digest(value), "with": kept}
    return {"type": value.__qualname__} if isinstance(value, type) else None


def digest_of(tensor: Tensor) -> str:
    """sha256 of a tensor's type, and of its bytes in the plain order."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(str(plain.dtype).encode())
    digest.update(plain.flatten().view(torch.uint8).numpy() if plain.numel() else b"")
    return digest.hexdigest()


def source_digest(value: FunctionType) -> str:
    """sha256 of the source of a function, and of what tells two of one line apart; of its code where there is none."""
    code = value.__code__
    try:
        text = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        text = code.co_code.hex()
    plain = [const for const in code.co_consts if isinstance(const, bool | int | float | str | tuple | None)]
    return hashlib.sha256(repr((text, plain, code.co_names)).encode()).hexdigest()
