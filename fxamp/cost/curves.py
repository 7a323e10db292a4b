"""How long does a call take at a size that was not measured?

Calls that do the same for every element are measured at a few sizes. Between two of them the logarithm of the time is
taken to be linear in that of the size; beyond the largest, time grows as size does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

__all__ = ["SIZES", "at"]

SIZES: Final = {
    "cpu": (16, 1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22),
    "cuda": (16, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26),
}


_SHORTEST: Final = 1e-9


def at(numel: int, sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds at a size; never fewer than at a smaller one.

    Example::

        >>> at(100, (10, 1000), (1.0, 4.0)), at(2000, (10, 1000), (1.0, 4.0)), at(0, (10, 1000), (1.0, 0.5))
        (2.0, 8.0, 1.0)
    """
    rising = list(itertools.accumulate((max(each, _SHORTEST) for each in seconds), max))
    if numel <= sizes[0]:
        return rising[0]
    if numel >= sizes[-1]:
        return rising[-1] * numel / sizes[-1]
    index = next(index for index, size in enumerate(sizes) if size > numel)
    (low, high), (fast, slow) = sizes[index - 1 : index + 1], rising[index - 1 : index + 1]
    part = math.log(numel / low) / math.log(high / low)
    return min(fast * math.pow(slow / fast, part), slow)
