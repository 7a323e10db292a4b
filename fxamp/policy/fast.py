"""What may the policy "fast" run in the low dtype, and which numbers does that dtype hold?

The rows of ``fxamp.policy.fast_table`` as mappings, the views by their schema, and the facts about ranges: float16 ends
at 65504 and has nothing normal below 6e-5, bfloat16 has the range of float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fxamp.policy.fast_table import FAST_TABLE
from fxamp.policy.flow import is_view
from fxamp.policy.operators import check_device_type

__all__ = [
    "BOUNDED", "FAST_KINDS", "MOST_ROWS", "NO_LARGER", "adds_up_rows", "fast_kinds", "fits", "float32_arguments",
    "is_choice", "moves_only",
    "tensor_fits",
]  # fmt: skip

FAST_KINDS: Final = ("inside", "pointwise", "moves", "fp32")
MOST_ROWS: Final = 4096
_FORWARD, _ROWS = "_forward", "_rows"

BOUNDED: Final = frozenset(
    """
    _safe_softmax angle arctan arctan2 atan atan2 batch_norm cos cosine_similarity erf erfc group_norm hardsigmoid
    instance_norm layer_norm relu6 rms_norm sgn sigmoid sign sin sinc softmax special_erf special_erfc special_expit
    special_ndtr special_sinc special_softmax tanh
    """.split()
)
"""Operators whose result float16 holds, whatever float32 comes in; for the norms, with weights that float16 holds."""

NO_LARGER: Final = frozenset(
    """
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d abs absolute adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax amin
    avg_pool1d avg_pool2d avg_pool3d cat celu channel_shuffle clamp clip clone column_stack concat concatenate
    constant_pad_nd dstack elu embedding flip fliplr flipud gather gelu glu hardshrink hardswish hardtanh hstack im2col
    index index_select leaky_relu masked_fill masked_select max_pool1d max_pool2d max_pool3d maximum mean minimum mish
    neg negative pad pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d relu repeat
    repeat_interleave replication_pad1d replication_pad2d replication_pad3d roll rot90 row_stack silu softshrink stack
    take_along_dim tile tril triu upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d vstack where
    """.split()
)
"""Operators whose result is no larger than the largest of its inputs and scalars, so in range when these are."""

# The arguments of a norm that may stay in float32 beside a low input, by place. On a GPU the kernels of layer_norm
# and group_norm read weight and bias as the input's dtype, and refuse another one; rms_norm takes it, with a warning,
# and is then made of many kernels.
_FLOAT32_ARGUMENTS: Final[Mapping[str, Mapping[str, tuple[int, ...]]]] = {
    "cpu": {"batch_norm": (1, 2, 3, 4), "group_norm": (2, 3), "instance_norm": (1, 2, 3, 4), "layer_norm": (2, 3)},
    "cuda": {"batch_norm": (1, 2, 3, 4), "instance_norm": (1, 2, 3, 4)},
}


@functools.cache
def fast_kinds(device_type: str, *, gradients: bool = True) -> Mapping[str, str]:
    """What each operator with a row is: "inside", "pointwise", "moves" or "fp32", as ``fast_table`` says.

    Args:
        device_type: ``"cuda"`` or ``"cpu"``.
        gradients: whether a backward follows, in which some of these operators add up in the low dtype; they are left
            out then.

    Returns:
        A read-only mapping from packet name to kind. An operator that is missing is no choice.

    Raises:
        PolicyError: when the table has no column for ``device_type``.

    Example::

        >>> kinds = fast_kinds("cpu")
        >>> kinds["softmax"], kinds["exp"], "argmax" in kinds
        ('inside', 'fp32', False)
        >>> "embedding" in kinds, fast_kinds("cpu", gradients=False)["embedding"]
        (False, 'moves')
    """
    check_device_type(device_type)
    cells = {name: row[device_type] for name, row in rows().items() if row[device_type] != "-"}
    allowed = {name: cell for name, cell in cells.items() if not (gradients and cell.endswith(_FORWARD))}
    return MappingProxyType({name: cell.partition("_")[0] for name, cell in allowed.items()})


def adds_up_rows(aten: str, device_type: str) -> bool:
    """Whether an operator adds up the gradients of its weights in the low dtype, over the rows of its input.

    Example::

        >>> adds_up_rows("layer_norm", "cpu"), adds_up_rows("layer_norm", "cuda")
        (True, False)
    """
    return aten in rows() and rows()[aten][check_device_type(device_type)].endswith(_ROWS)


@functools.cache
def rows() -> Mapping[str, Mapping[str, str]]:
    """The table: operator to device type to cell."""
    header, *lines = (line.split() for line in FAST_TABLE.strip().splitlines())
    return MappingProxyType(
        {name: MappingProxyType(dict(zip(header[1:], cells, strict=True))) for name, *cells in lines}
    )


def moves_only(aten: str) -> bool:
    """Whether an operator is a view: its schema says that the result shares the memory of an input.

    Casting before it or after it is the same forward; backward the gradient of an expanded view is a sum. A call with a
    dtype among its arguments is not meant: ``view`` with a dtype looks at the bits.

    Example::

        >>> moves_only("transpose"), moves_only("reshape"), moves_only("add"), moves_only("to")
        (True, True, False, False)
    """
    return is_view(aten)


def is_choice(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is one that the table speaks of: it names no dtype, and a division does not round its result.

    Example::

        >>> is_choice((2.0,), {}), is_choice((2.0,), {"rounding_mode": "floor"}), is_choice((-1, torch.float32), {})
        (True, False, False)
    """
    values = (*args, *kwargs.values())
    return kwargs.get("rounding_mode") is None and not any(isinstance(value, torch.dtype) for value in values)


def float32_arguments(aten: str, device_type: str) -> tuple[int, ...]:
    """The places of the arguments that an operator of kind "inside" takes in float32 beside a low input.

    They are weights and statistics of norms: kept in float32 they need no cast, and their gradients are float32.

    Example::

        >>> float32_arguments("layer_norm", "cpu"), float32_arguments("layer_norm", "cuda")
        ((2, 3), ())
    """
    return _FLOAT32_ARGUMENTS[check_device_type(device_type)].get(aten, ())


def fits(number: complex, dtype: torch.dtype) -> bool:
    """Whether a number keeps its meaning in a low dtype: it stays finite, and it does not drown in the smallest values.

    Infinity and NaN do; zero does. Below the smallest normal number, 6e-5 in float16, few or no digits are left.

    Args:
        number: a Python number.
        dtype: the low dtype.

    Example::

        >>> [fits(x, torch.float16) for x in (1e4, -1e9, 1e-12, float("-inf"), 0)]
        [True, False, False, True, True]
        >>> fits(-1e9, torch.bfloat16), fits(torch.finfo(torch.float32).min, torch.bfloat16)
        (True, False)
    """
    if isinstance(number, complex):
        return fits(number.real, dtype) and fits(number.imag, dtype)
    try:
        value = float(number)
    except OverflowError:  # an integer beyond float64
        return False
    if value == 0 or not math.isfinite(value):
        return True
    rounded = torch.tensor(value, dtype=torch.float64).to(dtype)
    return bool(rounded.isfinite()) and abs(value) >= torch.finfo(dtype).tiny


def tensor_fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a constant keeps its meaning in a low dtype, as ``fits`` says for one number.

    What is finite stays finite. Small values beside large ones may vanish, as they would in a sum with these: only a
    tensor whose largest finite value is too small does not fit. A tensor without values to read (on the meta device,
    fake) does not fit, for nothing is known of it; one of integers does when its values do.

    Args:
        tensor: a constant of the graph, such as a mask, an epsilon or a table of frequencies.
        dtype: the low dtype.

    Example::

        >>> mask, small = torch.tensor([0.0, -1e9]), torch.tensor([1.0, 1e-9])
        >>> tensor_fits(mask, torch.float16), tensor_fits(mask, torch.bfloat16)
        (False, True)
        >>> tensor_fits(small, torch.float16), tensor_fits(small[1:], torch.float16)
        (True, False)
    """
    if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.layout != torch.strided:
        return False
    if tensor.dtype == torch.bool or not tensor.numel():
        return True
    return _largest_fits(torch.view_as_real(tensor) if tensor.is_complex() else tensor, dtype)


def _largest_fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    with torch.no_grad():
        values: Any = tensor.detach().double()
        return fits(float(values[values.isfinite()].abs().max()), dtype) if bool(values.isfinite().any()) else True
