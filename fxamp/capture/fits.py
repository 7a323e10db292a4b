"""Which calls is a graph for that was captured with the sizes of one?

Sizes that the program did not look at are symbols, and conditions on these are what it asked of them; any other size
is the one that was seen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final, NamedTuple

import torch

from fxamp.errors import describe

__all__ = ["Fits", "Kind"]

_NAMES: Final = {"math": math, "torch": torch, "min": min, "max": max, "abs": abs, "__builtins__": {}}


class Kind(NamedTuple):
    """What a tensor has to be; ``sizes`` are numbers, symbols, or expressions of symbols."""

    dtype: torch.dtype
    device_type: str
    requires_grad: bool
    sizes: tuple[int | str, ...]


@dataclass(frozen=True)
class Fits:
    """The inputs that a graph is for.

    Attributes:
        names: of the inputs.
        kinds: of each; the value itself of one that is no tensor.
        condition: on the symbols, as Python writes it.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind | Any, ...]
    condition: str = "True"

    def problem(self, values: Sequence[Any]) -> str | None:
        """What is wrong with inputs, in words; None when the graph is for them."""
        sizes: dict[str, int] = {}
        for name, kind, value in zip(self.names, self.kinds, values, strict=True):
            if isinstance(kind, Kind):
                if not isinstance(value, torch.Tensor) or (
                    value.dtype != kind.dtype
                    or value.device.type != kind.device_type
                    or value.requires_grad != kind.requires_grad
                    or value.dim() != len(kind.sizes)
                ):
                    return f"{name} is {_shown(value)}, expected {_shown_kind(kind)}"
                for expected, size in zip(kind.sizes, value.shape, strict=True):
                    if _is_symbol(expected):
                        expected = sizes.setdefault(str(expected), size)
                    if isinstance(expected, int) and expected != size:
                        return f"{name} has the sizes {tuple(value.shape)}, expected {_shown_sizes(kind)}"
            elif type(value) is not type(kind) or value != kind:
                return f"{name} is {describe(value)}, expected {describe(kind)}"
        return self._broken(sizes, values)

    def _broken(self, sizes: dict[str, int], values: Sequence[Any]) -> str | None:
        for name, dim, expression in self._expressions():
            size = values[self.names.index(name)].shape[dim]
            if eval(_compiled(expression), _NAMES, dict(sizes)) != size:
                return f"{name} has size {size} in dimension {dim}, expected {expression} with {_listed(sizes)}"
        if not eval(_compiled(self.condition), _NAMES, dict(sizes)):
            shapes = ", ".join(f"{n} {_shown_sizes(k)}" for n, k in self._tensors())
            return f"the sizes are {_listed(sizes)} of {shapes}, expected {self.condition}"
        return None

    def _tensors(self) -> Iterator[tuple[str, Kind]]:
        return ((n, k) for n, k in zip(self.names, self.kinds, strict=True) if isinstance(k, Kind))

    def _expressions(self) -> Iterator[tuple[str, int, str]]:
        for name, kind in self._tensors():
            for dim, size in enumerate(kind.sizes):
                if isinstance(size, str) and not _is_symbol(size):
                    yield name, dim, size


def _is_symbol(size: int | str) -> bool:
    return isinstance(size, str) and size.isidentifier()


@functools.lru_cache(maxsize=4096)
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<sizes>", "eval")


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "those"


def _shown_sizes(kind: Kind) -> str:
    return f"({', '.join(map(str, kind.sizes))})"


def _shown_kind(kind: Kind) -> str:
    grad = " that requires grad" if kind.requires_grad else ""
    return f"a {kind.dtype} tensor of sizes {_shown_sizes(kind)} on {kind.device_type}{grad}"


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return describe(value)
    return _shown_kind(Kind(value.dtype, value.device.type, value.requires_grad, tuple(value.shape)))
