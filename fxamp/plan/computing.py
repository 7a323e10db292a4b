"""What does a call compute with, and in which dtype, after its casts?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxamp.dtypes import is_castable
from fxamp.plan.calls import argument_keys
from fxamp.plan.decision import Cast, Decision
from fxamp.plan.flow import Flow, Value, promoted, tensors_in
from fxamp.policy.fast import float32_arguments
from fxamp.policy.flow import ONE_DTYPE
from fxamp.policy.operators import argument_places, optional_tensors

__all__ = ["castable", "casts_to", "computed_with", "computes_in", "eligible", "gives_dtype", "stay_float32"]


def eligible(node: fx.Node, decision: Decision) -> list[torch.dtype | None]:
    """The dtypes that ``promote`` looks at: not those of arguments that may be None."""
    optional = optional_tensors(decision.aten)
    flows = zip(argument_keys(node), decision.inputs, strict=True)
    return castable(value for key, flow in flows if key not in optional for value in tensors_in(flow))


def castable(values: Iterable[Value]) -> list[torch.dtype | None]:
    """The dtypes of the tensors that a cast may change; None: not known."""
    return [value.dtype for value in values if value.dtype is None or is_castable(value.dtype)]


def computed_with(decision: Decision, casts: tuple[Cast, ...]) -> tuple[Value, ...]:
    """The tensors that a call computes with."""
    if not casts:
        return tensors_in(decision.inputs)
    targets = {cast.slot: cast.dtype for cast in casts}
    given = [(value, targets.get(slot)) for slot, flow in enumerate(decision.inputs) for value in tensors_in(flow)]
    values = [Value(target, v.scalar) if target and v.dtype and casts_to(v.dtype, target) else v for v, target in given]
    if decision.aten not in ONE_DTYPE:
        return tuple(values)  # a soft cast may find float64, or no floating dtype, and pass it on
    one = next(iter(targets.values()))
    known = any(value.dtype == one for value in values)
    return tuple(Value(one, value.scalar) if known and value.dtype is None else value for value in values)


def computes_in(target: torch.dtype | None, inputs: tuple[Value, ...], output: Flow) -> torch.dtype | None:
    """The dtype of the computation: what was cast to, else that of a floating result, else the widest input's."""
    if target is not None and any(value.dtype in (None, target) for value in inputs):
        return target
    given = output.dtype if isinstance(output, Value) else None
    return given if given is not None and given.is_floating_point else promoted(inputs)


def casts_to(dtype: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast changes a tensor of this dtype."""
    return dtype != target and is_castable(dtype)


def gives_dtype(node: fx.Node) -> bool:
    """Whether the user gives a call a dtype."""
    values = (*node.args, *node.kwargs.values())
    return node.kwargs.get("dtype") is not None or any(isinstance(value, torch.dtype) for value in values)


def stay_float32(node: fx.Node, aten: str, device_type: str) -> list[bool]:
    """For each slot of a call in the low dtype whether it may be float32 all the same, as the weights of norms are."""
    kept, places = float32_arguments(aten, device_type), argument_places(aten)
    return [(places.get(key) if isinstance(key, str) else key) in kept for key in argument_keys(node)]
