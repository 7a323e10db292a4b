"""What is to be seen of a value whose numbers are not all finite, and what is known of where it came from?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

__all__ = ["Origin", "Sight", "look"]


@dataclass(frozen=True)
class Origin:
    """Where the first value that is not finite appeared.

    Attributes:
        phase: "forward" or "backward".
        node: of the graph.
        how: "made" from finite values, in a "cast" of the pass, "given" as an input, a parameter or a gradient from
            outside, "summed" of the gradients of several uses of the node's value (or what a hook made of one), or
            "hooked": what a hook made of the gradient of the parameter ``tensor``.
        nan: whether it is a NaN.
        largest: the largest finite magnitude among what it was made from.
        dtype: of the tensor it is in.
        fits: whether the call gives finite values in float32; None when that is not known.
        tensor: the path of the parameter or buffer that was given.
    """

    phase: str
    node: fx.Node
    how: str
    nan: bool
    largest: float
    dtype: torch.dtype | None
    fits: bool | None = None
    tensor: str = ""

    @property
    def is_outside(self) -> bool:
        """Whether it is in what comes into the call, so that another call may have made it."""
        return self.how == "given" and not self.tensor


@dataclass(frozen=True)
class Sight:
    """The numbers of a value: whether there is a NaN, an infinity, a positive one, any positive number.

    Then the largest finite magnitude, and the dtype of the first tensor in which not all are finite.
    """

    nan: bool = False
    inf: bool = False
    plus: bool = False
    positive: bool = False
    largest: float = 0.0
    dtype: torch.dtype | None = None

    @property
    def finite(self) -> bool:
        return not (self.nan or self.inf)

    @property
    def masks(self) -> bool:
        """Whether it may be what is added to the scores of an attention, or logarithms of probabilities."""
        return self.inf and not self.nan and not self.positive


def look(tensors: Iterable[torch.Tensor]) -> Sight:
    """What is seen of all of these tensors together."""
    sights = [_look_at(tensor.detach()) for tensor in tensors]
    return Sight(
        any(sight.nan for sight in sights),
        any(sight.inf for sight in sights),
        any(sight.plus for sight in sights),
        any(sight.positive for sight in sights),
        max((sight.largest for sight in sights), default=0.0),
        next((sight.dtype for sight in sights if not sight.finite), None),
    )


def _look_at(tensor: torch.Tensor) -> Sight:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0 or tensor.is_quantized:
        return Sight()
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.is_sparse else tensor.to_dense()
    size = tensor.abs()
    finite = torch.isfinite(size)
    largest = torch.where(finite, size, 0).amax().double()
    signed = size if tensor.is_complex() else tensor
    flags = [torch.isnan(size).any(), torch.isinf(size).any(), torch.isposinf(signed).any(), (signed > 0).any()]
    nan, inf, plus, positive, most = torch.stack([*(flag.double() for flag in flags), largest]).tolist()
    return Sight(bool(nan), bool(inf), bool(plus), bool(positive), most, tensor.dtype)
