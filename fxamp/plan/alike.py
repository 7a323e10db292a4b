"""Which calls are alike, so that running one of them on fake tensors tells what the others give?

The blocks of a model make the same calls with tensors of the same dtypes and shapes. Fake tensors have nothing else, so
a call of torch's gives for these what it gave for others like them; ``FakeTensorMode`` itself goes by that, for each
kernel. No value may serve two calls where something changes the shape of one in place.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any, Final

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from fxamp.cost.calls import ATOMS
from fxamp.plan.calls import Call, read_call
from fxamp.plan.decision import Decision
from fxamp.plan.results import is_pointwise

__all__ = ["Unlike", "call_key", "keeps_shapes", "tensor_key"]

_CALLS: Final = ("call_function", "call_method", "call_module")


class Unlike(Exception):
    """What a call gives is not told by what can be compared."""


def keeps_shapes(graph: fx.Graph, module_of: Callable[[str], Any]) -> bool:
    """Whether no call of a graph may give a value that it is handed another shape or dtype in place."""
    return all(_keeps_shapes(node, read_call(node, module_of)) for node in graph.nodes if node.op in _CALLS)


def _keeps_shapes(node: fx.Node, call: Call) -> bool:
    # What is written element by element stays as large as it is; ``out=`` becomes as large as it has to.
    within = call.inplace and node.kwargs.get("out") is None
    return not call.writes or (within and (call.aten == "index_put" or is_pointwise(f"{call.aten}_")))


def call_key(
    node: fx.Node, decision: Decision, values: Mapping[fx.Node, Any], module_of: Callable[[str], Any]
) -> Hashable:
    """Equal for calls that give values of the same dtypes and shapes.

    Raises:
        Unlike: when that cannot be told.
    """
    target: Any = node.target
    if node.op == "call_module":
        target = _module_key(module_of(target))
    elif not isinstance(target, _OF_TORCH) and not _is_torchs(target):
        raise Unlike
    casts = tuple([(cast.slot, cast.dtype) for cast in decision.casts])
    given = _key((node.args, node.kwargs), values)
    return node.op, target, decision.op, given, casts, decision.how, decision.state


_OF_TORCH: Final = (str, BuiltinFunctionType, MethodDescriptorType)


def _is_torchs(function: Any) -> bool:
    return isinstance(function, FunctionType) and function.__module__.startswith("torch.")


def _module_key(module: nn.Module) -> Hashable:
    """Of a module of torch's own that has nothing but tensors and plain values."""
    kept, kind = vars(module), type(module)
    if not kind.__module__.startswith("torch.nn.modules.") or "forward" in kept or kept["_modules"]:
        raise Unlike
    tensors = [(name, _key(value, {})) for table in _TABLES for name, value in kept[table].items()]
    plain = [(name, _key(value, {})) for name, value in kept.items() if name not in _NOT_PLAIN]
    return kind, tuple(tensors), tuple(plain)


_TABLES: Final = ("_parameters", "_buffers")
_NOT_PLAIN: Final = (*_TABLES, "_modules", "_non_persistent_buffers_set")


def _key(value: Any, values: Mapping[fx.Node, Any]) -> Hashable:
    kind = type(value)
    if kind is fx.Node:
        return _key(values[value], values)
    if isinstance(value, torch.Tensor):
        return tensor_key(value)
    if isinstance(value, tuple | list):
        return kind, tuple([_key(item, values) for item in value])
    if isinstance(value, dict):
        return kind, tuple([(key, _key(item, values)) for key, item in value.items()])
    if kind is slice:
        return kind, _key((value.start, value.stop, value.step), values)
    if kind not in ATOMS:
        raise Unlike
    return kind, value


def tensor_key(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are alike in all but their values.

    Raises:
        Unlike: when there is more to a tensor, such as a value that is known.
    """
    if type(tensor) not in _PLAIN or tensor.layout != torch.strided or tensor.is_nested:
        raise Unlike
    places = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    if getattr(tensor, "constant", None) is not None or any(type(place) is not int for place in places):
        raise Unlike  # what only data tells is not the same for another tensor
    return (
        type(tensor),
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.untyped_storage().nbytes(),
        tensor.device,
        tensor.requires_grad,
        tensor.is_leaf,
        tensor.is_inference(),
        tensor.is_conj(),
        tensor.is_neg(),
        getattr(tensor, "_is_param", False),
    )


_PLAIN: Final = (FakeTensor, torch.Tensor, nn.Parameter)
