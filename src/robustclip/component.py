"""The one kind of object that attacks, defenses and recipes are: frozen settings with a call."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, dataclass_transform


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
    """Make `cls` a frozen keyword-only dataclass whose short `repr` pastes back and names it in the store."""
    if "__repr__" not in vars(cls):
        cls.__repr__ = _tell
    return dataclass(frozen=True, kw_only=True, repr=False)(cls)
