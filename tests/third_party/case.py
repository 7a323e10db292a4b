"""What a row of the tables here says, how a package is imported, and the inputs that many models share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers import quiet
from tests.third_party.stand_ins import stand_ins

__all__ = ["Call", "Calls", "Case", "call", "each", "ids", "images", "load", "randn", "text"]

VOCABULARY = 64
# What a package imports, for its data sets and its training, and does not need for its models.
WITHOUT = {
    "timm": ("torchvision",),
    "segmentation_models_pytorch": ("torchvision",),
    "vit_pytorch": ("torchvision",),
    "denoising_diffusion_pytorch": ("torchvision", "pytorch_fid"),
}


class Call(NamedTuple):
    """Positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Calls = Mapping[str, Callable[[], Call]]


class Case(NamedTuple):
    """A model, and the ways in which it is called; the first of them is what the conversion sees."""

    make: Callable[[], nn.Module]
    calls: Calls
    gradients: bool = True  # of floating-point inputs; parameters always have theirs
    slow: bool = False


def load(name: str) -> Any:
    """An optional package, or a module of one; silent, and without what it imports and no model needs."""
    with quiet(), stand_ins(*WITHOUT.get(name.partition(".")[0], ())):
        return importlib.import_module(name)


def call(*args: Any, **kwargs: Any) -> Call:
    """What a call of a model is given; written as that call."""
    return Call(args, kwargs)


def each(make: Callable[..., Call], *sizes: tuple[Any, ...]) -> Calls:
    """One call a tuple of sizes."""
    return {" x ".join(map(str, size)): partial(make, *size) for size in sizes}


def ids(*shape: int, below: int = VOCABULARY) -> Tensor:
    """Tokens other than the special ones."""
    return torch.randint(3, below, shape)


def randn(*shapes: tuple[int, ...]) -> Calls:
    """Normal inputs of these shapes; and with one more sample."""
    return each(lambda more: call(*(torch.randn(n + more, *rest) for n, *rest in shapes)), (0,), (1,))


def images(size: int = 32, *others: int, name: str | None = None, **more: Callable[[int], Any]) -> Calls:
    """Two square images, then three, then of other sizes; ``more`` are arguments made for a batch of so many."""

    def make(batch: int, size: int) -> Call:
        image = torch.randn(batch, 3, size, size)
        given = {key: value(batch) for key, value in more.items()}
        return call(image, **given) if name is None else call(**{name: image}, **given)

    return each(make, (2, size), (3, size), *((2, other) for other in others))


def text(length: int = 8, **more: Callable[[int, int], Any]) -> Calls:
    """Tokens and their mask: full, padded, and of other sizes; ``more`` are arguments made for a shape."""

    def make(batch: int, length: int, padding: int) -> Call:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[1:, length - padding :] = 0
        given = {key: value(batch, length) for key, value in more.items()}
        return call(input_ids=ids(batch, length), attention_mask=mask, **given)

    return {
        "full": partial(make, 2, length, 0),
        "padded": partial(make, 2, length, 2),
        "other sizes": partial(make, 3, length - 2, 1),
    }
