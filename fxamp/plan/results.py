"""What does a call give back, by rule?

Dtypes that the call names itself (``dtype=``, ``.to(...)``, factories) come first, then what is known of
its ATen operator, then "unknown".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx

from fxamp.plan.flow import NOT_A_TENSOR, UNKNOWN, Flow, Tensors, Value, element, outcome, tensors_in
from fxamp.policy.flow import output_kind

__all__ = ["USER_CASTS", "is_pointwise", "result_of"]

# The user's own casts, with the dtype they name; None: it is in the arguments.
USER_CASTS: Final[Mapping[str, torch.dtype | None]] = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "cfloat": torch.complex64,
    "cdouble": torch.complex128,
    "chalf": torch.complex32,
    "byte": torch.uint8,
    "char": torch.int8,
    "short": torch.int16,
    "int": torch.int32,
    "long": torch.int64,
    "bool": torch.bool,
    "to": None,
    "type": None,
    "type_as": None,
}
_SEQUENCES: Final = frozenset("chunk split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split".split())
_TABLES: Final = frozenset({"embedding", "embedding_bag"})
# Operators whose result is never 0-dim; has the rank of the first input; has at least that rank.
_SHAPED: Final = frozenset(
    "mm bmm addmm baddbmm addbmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "layer_norm rms_norm group_norm batch_norm instance_norm scaled_dot_product_attention cat stack concat flatten "
    "unsqueeze avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d pixel_shuffle pixel_unshuffle "
    "pad im2col col2im".split()
)
_KEEPS_RANK: Final = frozenset(
    "softmax log_softmax dropout alpha_dropout feature_dropout contiguous clone detach transpose permute movedim t "
    "alias tril triu roll flip glu chunk split split_with_sizes narrow".split()
)
_MAY_GROW: Final = frozenset("masked_fill repeat expand expand_as".split())
_DEFAULT_DTYPE: Final = frozenset("zeros ones empty rand randn eye linspace logspace hann_window".split())
_INTEGER: Final = frozenset("randint randperm tril_indices triu_indices".split())


def result_of(
    node: fx.Node,
    aten: str,
    inputs: tuple[Flow, ...],
    cast_inputs: tuple[Value, ...],
    flow_of: Callable[[fx.Node], Flow],
) -> Flow:
    """The flow of a call's result.

    Args:
        node: the call.
        aten: the operator it reaches, or "".
        inputs: what it is given, one a node argument.
        cast_inputs: the tensors it computes with, after casts.
        flow_of: the flow of any earlier node.
    """
    if aten == "getitem":
        base = inputs[0] if inputs else UNKNOWN
        return element(base, node.args[1])
    if aten == "getattr":
        return _field(inputs[0] if inputs else UNKNOWN, str(node.args[1]))
    if aten in USER_CASTS:
        return _cast_result(node, aten, inputs, flow_of)
    named = _named_dtype(node, flow_of)
    if named is not None:
        return Value(named, None)
    if not tensors_in(inputs):
        return _factory_result(node, aten, inputs)
    if aten in _TABLES:
        return _lookup_result(cast_inputs)
    if any(isinstance(value, complex) for value in (*node.args, *node.kwargs.values())):
        return UNKNOWN
    kind = output_kind(aten, node.target, node.args, node.kwargs) if aten else None
    found = _ranked(aten, outcome(kind, cast_inputs), cast_inputs)
    if aten in _SEQUENCES:
        return Tensors(found) if isinstance(found, Value) else UNKNOWN
    return found


def _field(owner: Flow, name: str) -> Flow:
    """A named part of a tuple, such as ``x.max(0).values``."""
    places = {"values": 0, "indices": 1}
    return element(owner, places[name]) if isinstance(owner, tuple) and name in places else UNKNOWN


def _lookup_result(inputs: tuple[Value, ...]) -> Value:
    """A lookup takes a floating table and integers, in either order, and gives rows of the table."""
    tables = {value.dtype for value in inputs if value.dtype is not None and value.dtype.is_floating_point}
    return Value(tables.pop() if len(tables) == 1 else None, False)


def _ranked(aten: str, flow: Flow, inputs: tuple[Value, ...]) -> Flow:
    """The flow, with what is known about being 0-dim."""
    if not isinstance(flow, Value) or (flow.scalar is not None and is_pointwise(aten)):
        return flow
    first = inputs[0].scalar if inputs else None
    if aten in _SHAPED or (aten == "linear" and len(inputs) > 1 and inputs[1].rank == 2):
        return Value(flow.dtype, False)
    if aten in _KEEPS_RANK or (aten in _MAY_GROW and first is False):
        return Value(flow.dtype, first)
    return Value(flow.dtype)


@functools.cache
def is_pointwise(aten: str) -> bool:
    """Whether some overload of an ATen operator works element by element."""
    packet = getattr(torch.ops.aten, aten, None) if aten else None
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def _cast_result(node: fx.Node, aten: str, inputs: tuple[Flow, ...], flow_of: Callable[[fx.Node], Flow]) -> Flow:
    dtype = USER_CASTS[aten]
    source = inputs[0] if inputs else UNKNOWN
    scalar = source.scalar if isinstance(source, Value) else None
    if dtype is not None:
        return Value(dtype, scalar)
    rest = [*node.args[1:], *node.kwargs.values()]
    if aten == "type" and not rest:
        return NOT_A_TENSOR
    for argument in rest:
        found = _dtype_meant(argument, flow_of)
        if found is not _SILENT:
            return Value(found if isinstance(found, torch.dtype) else None, scalar)
    return Value(source.dtype if isinstance(source, Value) else None, scalar)


_SILENT: Final = object()


def _dtype_meant(argument: Any, flow_of: Callable[[fx.Node], Flow]) -> Any:
    """The dtype that an argument of ``.to`` asks for; None when not known, ``_SILENT`` when it asks for none."""
    if isinstance(argument, torch.dtype):
        return argument
    if isinstance(argument, str):
        return _SILENT if not argument.startswith("torch.") else None
    if not isinstance(argument, fx.Node):
        return _SILENT
    if argument.target is getattr:
        owner, name = argument.args
        if name == "dtype" and isinstance(owner, fx.Node):
            flow = flow_of(owner)
            return flow.dtype if isinstance(flow, Value) else None
        if name == "device":
            return _SILENT
    flow = flow_of(argument)
    return flow.dtype if isinstance(flow, Value) else None


def _named_dtype(node: fx.Node, flow_of: Callable[[fx.Node], Flow]) -> torch.dtype | None:
    argument = node.kwargs.get("dtype")
    found = _dtype_meant(argument, flow_of) if argument is not None else None
    return found if isinstance(found, torch.dtype) else None


def _factory_result(node: fx.Node, aten: str, inputs: tuple[Flow, ...]) -> Flow:
    if node.kwargs.get("dtype") is not None:
        return UNKNOWN  # one that is asked of a value whose dtype is not known
    if aten in _DEFAULT_DTYPE:
        return Value(torch.get_default_dtype(), None)
    if aten in _INTEGER:
        return Value(torch.int64, False)
    if aten == "arange":
        constants = [a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node)]
        sure = not inputs and not any(isinstance(a, float) for a in constants)
        return Value(torch.int64 if sure else None, False)
    if node.op == "call_function" and node.target is torch.tensor and isinstance(node.args[0], float):
        return Value(torch.get_default_dtype(), True)
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        return NOT_A_TENSOR
    return UNKNOWN
