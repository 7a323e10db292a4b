"""What an entry of the zoo says, and the inputs that several entries share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["BF16", "Case", "images", "labels", "randn", "tokens"]

BF16 = (torch.bfloat16,)  # for models whose operators have no float16 kernels on a CPU


class Case(NamedTuple):
    """A model and a call of it.

    ``symbolic`` says whether the model can be traced without example inputs; ``opaque`` how many of its calls the pass
    does not look into; ``gpu`` whether the rules of a GPU can be tried on a CPU: there autocast refuses
    binary_cross_entropy, and a region that names the CPU is none.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    kwargs: Mapping[str, Any] = MappingProxyType({})
    loss: Callable[..., Any] | None = None
    loss_args: Callable[[], tuple[Any, ...]] = tuple
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    symbolic: bool = True
    opaque: int = 0
    gpu: bool = True


def randn(*sizes: tuple[int, ...]) -> Callable[[], tuple[Any, ...]]:
    """Normal inputs, one for each size."""
    return lambda: tuple(torch.randn(size) for size in sizes)


def images(channels: int = 3, size: int = 8, batch: int = 2) -> Callable[[], tuple[Any, ...]]:
    """A batch of square images."""
    return randn((batch, channels, size, size))


def labels(classes: int, *shape: int) -> Callable[[], tuple[Any, ...]]:
    """Class indices."""
    return lambda: (torch.randint(0, classes, shape or (2,)),)


def tokens(*shape: int, vocab: int = 23) -> Callable[[], tuple[Any, ...]]:
    """Token indices."""
    return lambda: (torch.randint(0, vocab, shape or (2, 7)),)
