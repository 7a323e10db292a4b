"""What do the rules of a GPU make of the inputs of a call, where there are only fake tensors to ask?

The fake tensors of a machine without a GPU do not go through its autocast; but what autocast does before a listed
operator is known, and done here by hand.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxamp.capture.regions import AutocastState
from fxamp.dtypes import is_castable
from fxamp.policy.operators import operator_rules, transparent
from fxamp.policy.spellings import CAST_METHODS, aten_name

__all__ = ["cast_all", "prepared"]


def prepared(
    node: fx.Node, values: Iterable[Any], state: AutocastState, device_type: str
) -> Callable[[Any], Any] | None:
    """What autocast does to each input of a call, so that its result has the right dtype; None when that is not known.

    Args:
        node: the call.
        values: its inputs.
        state: the autocast state that it is made in.
        device_type: whose rules.
    """
    tensors = [value for value in pytree.tree_leaves(list(values)) if isinstance(value, torch.Tensor)]
    found = None if node.op == "call_module" else aten_name(node.op, node.target, node.args, node.kwargs)
    if not state.enabled or node.target is operator.getitem or found in CAST_METHODS:
        return _as_it_is
    if node.op == "call_module" or (found is None and tensors):
        return None
    rule = operator_rules(device_type).get(found or "")
    if rule is None:
        return _as_it_is if not tensors or transparent(found or "", device_type) else None
    given = any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))
    if rule == "banned" or (rule == "fp32_dtype" and given):
        return None if rule == "banned" else _as_it_is
    castable = [tensor.dtype for tensor in tensors if is_castable(tensor.dtype)]
    widest = functools.reduce(torch.promote_types, castable, state.dtype)
    dtype = {"lower": state.dtype, "promote": widest}.get(rule, torch.float32)
    return functools.partial(cast_all, dtype=dtype)


def cast_all(value: Any, *, dtype: torch.dtype) -> Any:
    """Every tensor in a value that autocast may cast, in this dtype."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if is_castable(tensor.dtype) else tensor

    return value if isinstance(value, torch.Size) else pytree.tree_map_only(torch.Tensor, cast, value)


def _as_it_is(value: Any) -> Any:
    return value
