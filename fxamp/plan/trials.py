"""Does a call take its numbers in the dtype that it is to run in?

``masked_fill(-3e38)`` fails for bfloat16, which fake tensors do not show: they hold no data. A call with a number
beyond the low dtypes is tried on tensors of one element.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxamp.errors import CaptureError
from fxamp.plan.decision import Decision

__all__ = ["AutocastFailsError", "called", "check_numbers"]

_LIMIT: Final = torch.finfo(torch.float16).max


class AutocastFailsError(CaptureError):
    """The model fails under autocast; without, it may run."""


def check_numbers(node: fx.Node, decision: Decision, args: Any, kwargs: Any) -> None:
    """Tries a call with such tensors, if it has a number that a low dtype may not hold.

    Raises:
        AutocastFailsError: when the dtype that it runs in does not.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    if not any(isinstance(leaf, float) and math.isfinite(leaf) and abs(leaf) > _LIMIT for leaf in leaves):
        return
    given = pytree.tree_map_only(torch.Tensor, _of_one_element, (args, kwargs))
    try:
        with torch.no_grad():
            called(node, decision, *given)
    except Exception as error:
        if "without overflow" in str(error):
            raise AutocastFailsError(
                f"{decision.op} (node '{node.name}', {decision.source}) fails under torch.autocast: {error}",
                hint="give a number that the low dtype holds, such as torch.finfo(x.dtype).min of the tensor itself",
            ) from error


def called(node: fx.Node, decision: Decision, args: Any, kwargs: Any) -> Any:
    """What a call gives, made as it was decided."""
    if decision.how in ("dtype", "dtype if castable"):
        kwargs = {**kwargs, "dtype": torch.float32}
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _of_one_element(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((1,) * tensor.dim(), dtype=tensor.dtype)
