"""What a classifier chooses between: class names, one prompt for each, and further texts that describe them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Classes(Sequence[str]):
    """Classes behave like the tuple of their names: `len(classes)`, `classes[3]`, `for name in classes`."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]  # one per class
    descriptions: tuple[tuple[str, ...], ...] = ()  # further texts per class, any number each; () for none

    def __post_init__(self) -> None:
        for field in ("names", "prompts"):
            object.__setattr__(self, field, _texts(field, getattr(self, field)))
        described = tuple(_texts("descriptions", texts) for texts in _listed("descriptions", self.descriptions))
        object.__setattr__(self, "descriptions", described)
        if not self.names:
            raise ValueError("classes are empty; give one name and one prompt per class")
        for field in ("prompts", "descriptions")[: 1 + bool(described)]:
            if len(getattr(self, field)) != len(self.names):
                raise ValueError(f"got {len(getattr(self, field))} {field} for {len(self)} classes; give one per class")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        return self.names[place]

    @property
    def digest(self) -> str:
        """Short fingerprint of all texts."""
        told = json.dumps([self.names, self.prompts, self.descriptions])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def with_prompts(self, prompts: Sequence[str]) -> "Classes":
        """The same classes under other prompts, which is what a text attack makes; names and descriptions stay."""
        return replace(self, prompts=prompts)


def _listed(field: str, values: Sequence) -> tuple:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{field}={values!r} is not allowed; give a list, of one entry per class")
    return tuple(values)


def _texts(field: str, values: Sequence[str]) -> tuple[str, ...]:
    texts = _listed(field, values)
    if strange := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{field} must be texts, got {strange[0]!r}; give strings")
    return texts
