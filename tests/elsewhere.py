"""A mode in which tensors that are made without a device are not where all others are, as if those were on a GPU."""

import sys
from pathlib import Path
from typing import ClassVar

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

WATCHED = ("robustclip", "torchattacks")  # packages whose tensors have to say where they are
TORCH = f"{Path(torch.__file__).parent}/"
MAKERS = _device_constructors()  # remembered by torch from its first call on, which must not see a patched function

# What makes tensors on the CPU on purpose, and why a GPU does not mind.
NUMBERS = "the same random numbers on every machine; moved to where they are added"
ON_THE_CPU = {
    "robustclip.data.": "pictures are drawn and decoded on the CPU; batches are moved",
    "robustclip.randomness:own_noise": NUMBERS,
    "robustclip.training.loop:Run.batch": NUMBERS,
    "robustclip.prompts:add_context": NUMBERS,
    "robustclip.prompts:add_frame": NUMBERS,
    "robustclip.defenses.cola:COLA.basis": NUMBERS,
    "robustclip.training.pictures:Order.": "the order of pictures, which stay on the CPU; batches are moved",
    "robustclip.audit:_surrogate": NUMBERS,
    "robustclip.models:tokenize": "moved to the text tower by `encode_texts`",
    "robustclip.attacks.text:": "text features are compared on the CPU, to which `TextFeatures` brings them",
    "robustclip.attacks.square:bumps": "one pattern per size; moved by `L2Squares`",
    "robustclip.defenses.clipure:Prior.__init__": "a module, which `load_prior` moves",
    "robustclip.defenses.cola:COLA.weights_of_texts": "moved to the features",
    "robustclip.defenses.counterattack:Counterattack._weighted": "plain numbers, read at once",
    "robustclip.defenses.prompt_tuning:_parts": "indices, which may be on the CPU; moved where they may not",
    "torchattacks.attacks.fab:": "moved to the device of the attack in the same line",
}


class Elsewhere(TorchFunctionMode):
    """Tensors that are made without a device are on the device "meta"; those of `ON_THE_CPU` stay on the CPU."""

    excused: ClassVar[set[str]] = set()  # those of `ON_THE_CPU` that were needed

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func in MAKERS and kwargs.get("device") is None
        if made and not (args and isinstance(args[0], torch.Tensor)):  # else it is where another tensor is
            place = caller(sys._getframe(1))
            excuse = next((name for name in ON_THE_CPU if place.startswith(name)), None)
            self.excused |= {excuse} - {None}
            kwargs |= {"device": "meta"} if place and not excuse else {}
        return func(*args, **kwargs)


def caller(frame) -> str:
    """Which function of a watched package makes a tensor, as "module:function"; "" if none does."""
    while frame.f_code.co_filename.startswith(TORCH):
        if frame.f_globals["__name__"].startswith("torch.optim"):
            return ""  # whose counters stay on the CPU
        frame = frame.f_back
    module = frame.f_globals.get("__name__", "")
    return f"{module}:{frame.f_code.co_qualname}" if module.split(".")[0] in WATCHED else ""
