"""What does a tensor look like whose values do not matter?

A ``Spec`` stands for a tensor among the arguments of a call: enough to make one like it, and to tell two calls apart.
Values are small random numbers of a generator of their own: zeros and denormal numbers take another time than others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fxamp.dtypes import abbreviate, is_castable

__all__ = ["Spec"]

_BLOCK: Final = 4096  # random numbers that are made; a larger tensor repeats them


@dataclass(frozen=True)
class Spec:
    """Stands for a tensor.

    Attributes:
        shape: its sizes.
        dtype: as in the float32 model. What autocast may cast is made in the dtype that is measured.
        grad: whether it wants a gradient; a kernel may go by that in inference too.
        strides: where they are not those of a contiguous tensor of that shape, as for ``channels_last``.
        fixed: keep ``dtype`` in every measurement, as the statistics of a batch norm do.

    Example::

        >>> Spec((2, 3), torch.float32, grad=True).text(), Spec((2, 3), torch.float32, strides=(1, 2)).text()
        ('*[2,3]g', '*[2,3]{1,2}')
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool = False
    strides: tuple[int, ...] | None = None
    fixed: bool = False

    @classmethod
    def of(cls, tensor: Tensor, *, fixed: bool = False) -> Spec:
        """The spec of a tensor, which may be a fake one.

        Raises:
            TypeError: when a size of it is a symbol.
        """
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        if any(type(place) is not int for place in (*shape, *strides)):
            raise TypeError(f"a size is not known: {shape}")
        return cls(shape, tensor.dtype, tensor.requires_grad, strides, fixed)

    @property
    def varies(self) -> bool:
        """Whether it is made in the dtype that is measured."""
        return not self.fixed and is_castable(self.dtype)

    @property
    def layout(self) -> tuple[int, ...]:
        """Its strides, also where they are left out."""
        return _contiguous(self.shape) if self.strides is None else self.strides

    def nbytes(self) -> int:
        """How large it is in its own dtype."""
        return _extent(self.shape, self.layout) * self.dtype.itemsize

    def text(self) -> str:
        """The same for specs that no measurement tells apart."""
        dtype = "*" if self.varies else abbreviate(self.dtype)
        return f"{dtype}[{_join(self.shape)}]{self._layout_text()}{'g' if self.grad else ''}"

    def _layout_text(self) -> str:
        steps = zip(self.shape, self.layout, _contiguous(self.shape), strict=True)
        differs = any(size > 1 and step != usual for size, step, usual in steps)
        return f"{{{_join(self.layout)}}}" if differs else ""

    def make(self, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
        """A tensor like it on the device of the generator; without one, on ``meta``."""
        kept = dtype if self.varies else self.dtype
        device = "meta" if generator is None else generator.device
        tensor = torch.empty_strided(self.shape, self.layout, dtype=kept, device=device)  # no view: kernels tell these
        if generator is not None:
            _fill(tensor.as_strided((_extent(self.shape, self.layout),), (1,)), generator)
        return tensor.requires_grad_(self.grad)


def _fill(memory: Tensor, generator: torch.Generator) -> None:
    """Random numbers; indices that are in every range; masks that hide nothing."""
    if not memory.is_floating_point():
        memory.fill_(memory.dtype == torch.bool)
        return
    count = memory.numel()
    block = torch.empty(min(count, _BLOCK), dtype=torch.float32, device=memory.device)
    block = block.uniform_(-1.0, 1.0, generator=generator).to(memory.dtype)
    whole = count - count % _BLOCK if count > _BLOCK else 0
    if whole:
        memory[:whole].view(-1, _BLOCK).copy_(block)
    memory[whole:].copy_(block[: count - whole])


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements of memory a tensor reaches over."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _join(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
