"""In which order does autocast cast the arguments of one call?

It matters for gradients: autograd adds up what comes back in the reverse order of the casts. The order is
that in which the compiler of the torch build evaluates C++ arguments, so it is observed, once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["casts_last_argument_first"]


class _FirstCast(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the shape of the first tensor that is cast."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.shape and func is torch.ops.aten._to_copy.default:
            self.shape = tuple(args[0].shape)
        return func(*args, **(kwargs or {}))


@functools.cache
def casts_last_argument_first() -> bool:
    """Whether autocast of this torch build casts the last argument of a call before the first.

    Example::

        >>> casts_last_argument_first() in (True, False)
        True
    """
    left, right = torch.zeros(1, 2), torch.zeros(2, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _FirstCast() as seen:
        torch.mm(left, right)
    return bool(seen.shape == tuple(right.shape))
