"""Which dtypes does mixed precision touch, and how are they written?

One table of short names, and the one test that decides whether a tensor may be cast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch

from fxamp.errors import PolicyError, describe

__all__ = ["LOW_DTYPES", "abbreviate", "check_low_dtype", "is_castable", "promotable"]

LOW_DTYPES: Final = (torch.float16, torch.bfloat16)

# torch.dtype.abbr has these from 2.13 on; older torch needs the table.
_ABBREVIATIONS: Final = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.complex32: "c32",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
}


def abbreviate(dtype: torch.dtype) -> str:
    """The short name of a dtype.

    Example::

        >>> abbreviate(torch.bfloat16), abbreviate(torch.float32)
        ('bf16', 'f32')
    """
    return _ABBREVIATIONS.get(dtype) or str(dtype).removeprefix("torch.")


def is_castable(dtype: torch.dtype) -> bool:
    """Whether autocast may cast a tensor of this dtype: floating point, but not float64.

    Source: ``is_eligible`` in ATen/autocast_mode.h.
    """
    return dtype.is_floating_point and dtype != torch.float64


def check_low_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, when mixed precision can lower to it.

    Raises:
        PolicyError: when it is neither ``torch.float16`` nor ``torch.bfloat16``.
    """
    if dtype not in LOW_DTYPES:
        raise PolicyError(
            f"dtype {describe(dtype)} is not a low precision: expected torch.float16 or torch.bfloat16",
            hint="write dtype=torch.bfloat16, or policy='full' for a model without casts",
        )
    return dtype


def promotable(dtypes: Iterable[torch.dtype | None], low: torch.dtype) -> bool:
    """Whether autocast to ``low`` promotes these: float32 wins, and before it any other dtype but ``low`` is refused.

    Source: ``prioritize`` of ATen/autocast_mode.h, which looks at the tensors of a call in order.
    """
    for dtype in dtypes:
        if dtype == torch.float32:
            return True
        if dtype != low:
            return False
    return True
