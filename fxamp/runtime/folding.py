"""A product with a weight that has no gradient, as fast as with one that has.

For an input of three dimensions or more that is not contiguous, ``torch.matmul`` makes one product of it when a factor
wants a gradient. When none does, it expands the weight over the batch and makes many; on a CPU that was measured at
thirty times as long.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["folded_linear"]


def folded_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """``F.linear`` with the bits that it gives for a weight with a gradient.

    Example::

        >>> x, weight = torch.ones(2, 3, 4).transpose(0, 1), torch.ones(5, 4)
        >>> folded_linear(x, weight).shape
        torch.Size([3, 2, 5])
    """
    as_it_is = input.dim() < 3 or weight.dim() != 2 or (bias is not None and input.is_contiguous())
    if as_it_is or type(input) is not torch.Tensor:
        return F.linear(input, weight, bias)
    product = torch.mm(input.reshape(-1, input.shape[-1]), weight.t()).view(*input.shape[:-1], -1)
    return product if bias is None else product.add_(bias)
