"""Which ATen operator does a Python call reach?

``torch.matmul``, ``Tensor.matmul``, ``@`` and ``torch.ops.aten.matmul`` are one operator. A builtin of torch and a
method have the operator's name; the rest is in the tables below. A Python function has a row when all that autocast
does in it is what it would do to that one operator, called with the same arguments; the work around it, such as a
broadcast, a view or a division of the result, is none of autocast's business. No answer is always safe: such a
call runs under autocast.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch._jit_internal import boolean_dispatched

from fxamp.errors import PolicyError, nearest
from fxamp.policy.operators import aten_packets, is_aten, packet_of

__all__ = ["CAST_METHODS", "aten_name", "resolve_operator"]

CAST_METHODS: Final = frozenset("float double half bfloat16 int long bool type".split())
"""Methods that are a cast, kept under their own names: the name says to which dtype."""

# Python functions of torch.nn.functional and torch.functional. Third column: an argument that, when it is given and
# not None or False, makes the function reach another operator, the fourth column, or none of its own.
# ``inplace=True`` reaches the operator's ``_`` twin.
_FUNCTIONS: Final = """
F.adaptive_avg_pool2d               adaptive_avg_pool2d
F.adaptive_avg_pool3d               adaptive_avg_pool3d
F.adaptive_max_pool1d               adaptive_max_pool1d     return_indices
F.adaptive_max_pool2d               adaptive_max_pool2d     return_indices
F.adaptive_max_pool3d               adaptive_max_pool3d     return_indices
F.affine_grid                       affine_grid_generator
F.alpha_dropout                     alpha_dropout
F.batch_norm                        batch_norm
F.binary_cross_entropy              binary_cross_entropy
F.binary_cross_entropy_with_logits  binary_cross_entropy_with_logits
F.celu                              celu
F.cosine_embedding_loss             cosine_embedding_loss
F.cross_entropy                     cross_entropy_loss
F.ctc_loss                          ctc_loss
F.dropout                           dropout
F.dropout1d                         feature_dropout
F.dropout2d                         feature_dropout
F.dropout3d                         feature_dropout
F.elu                               elu
F.embedding                         embedding
F.embedding_bag                     embedding_bag
F.feature_alpha_dropout             feature_alpha_dropout
F.fold                              col2im
F.glu                               glu
F.grid_sample                       grid_sampler
F.group_norm                        group_norm
F.hardsigmoid                       hardsigmoid
F.hardswish                         hardswish
F.hardtanh                          hardtanh
F.hinge_embedding_loss              hinge_embedding_loss
F.huber_loss                        huber_loss              weight
F.instance_norm                     instance_norm
F.kl_div                            kl_div
F.l1_loss                           l1_loss                 weight
F.layer_norm                        layer_norm
F.leaky_relu                        leaky_relu
F.log_softmax                       log_softmax
F.margin_ranking_loss               margin_ranking_loss
F.max_pool1d                        max_pool1d              return_indices    max_pool1d_with_indices
F.max_pool1d_with_indices           max_pool1d_with_indices
F.max_pool2d                        max_pool2d              return_indices    max_pool2d_with_indices
F.max_pool2d_with_indices           max_pool2d_with_indices
F.max_pool3d                        max_pool3d              return_indices    max_pool3d_with_indices
F.max_unpool1d                      max_unpool2d
F.max_unpool2d                      max_unpool2d
F.max_unpool3d                      max_unpool3d
F.mish                              mish
F.mse_loss                          mse_loss                weight
F.multi_margin_loss                 multi_margin_loss
F.multilabel_margin_loss            multilabel_margin_loss
F.nll_loss                          nll_loss
F.poisson_nll_loss                  poisson_nll_loss
F.relu                              relu
F.relu6                             relu6
F.rms_norm                          rms_norm
F.rrelu                             rrelu
F.selu                              selu
F.sigmoid                           sigmoid
F.silu                              silu
F.smooth_l1_loss                    smooth_l1_loss
F.soft_margin_loss                  soft_margin_loss
F.softmax                           softmax
F.softmin                           softmax
F.softsign                          div
F.tanh                              tanh
F.tanhshrink                        sub
F.threshold                         threshold
F.triplet_margin_loss               triplet_margin_loss
F.unfold                            im2col
torch.atleast_1d                    atleast_1d
torch.atleast_2d                    atleast_2d
torch.atleast_3d                    atleast_3d
torch.block_diag                    block_diag
torch.broadcast_tensors             broadcast_tensors
torch.cartesian_prod                cartesian_prod
torch.cdist                         cdist
torch.chain_matmul                  chain_matmul
torch.einsum                        einsum
torch.meshgrid                      meshgrid
torch.split                         split
torch.stft                          stft
torch.tensordot                     tensordot
Tensor.split                        split
Tensor.stft                         stft
Tensor.unflatten                    unflatten
"""

# Operators of Python and their methods, as the tensor on the left or on the right takes them.
_OPERATORS: Final = """
abs         abs
add         add
and_        bitwise_and
eq          eq
floordiv    floor_divide
ge          ge
gt          gt
iadd        add_
iand        bitwise_and_
ifloordiv   floor_divide_
imatmul     matmul
imod        remainder_
imul        mul_
inv         bitwise_not
invert      bitwise_not
ior         bitwise_or_
ipow        pow_
isub        sub_
itruediv    div_
ixor        bitwise_xor_
le          le
lshift      __lshift__
lt          lt
matmul      matmul
mod         remainder
mul         mul
ne          ne
neg         neg
or_         bitwise_or
pos         positive
pow         pow
rshift      __rshift__
sub         sub
truediv     div
xor         bitwise_xor
"""

# The methods whose name is not the operator's; ``__add__`` and the like come from the table above.
_METHODS: Final = {
    "cpu": "to",
    "cuda": "to",
    "__div__": "div",
    "__idiv__": "div_",
    "__rdiv__": "reciprocal",
    "__rtruediv__": "reciprocal",
    "__rsub__": "rsub",
    **{name: name for name in CAST_METHODS},
}

# The last arguments of mm, addmm and their kind that choose an overload which autocast does not list.
_UNLISTED_OVERLOAD: Final = "out_dtype"


def aten_name(
    opcode: str, target: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> str | None:
    """The ATen operator that a node of a graph reaches.

    Args:
        opcode: ``"call_function"`` or ``"call_method"``.
        target: the function, or the method's name.
        args: the node's positional arguments: a few functions reach different operators by them
            (``F.pad(mode=)``, ``F.max_pool2d(return_indices=)``, ``1.0 / x``).
        kwargs: its keyword arguments.

    Returns:
        The operator's name without overload, ``"softmax"``, in-place ones with the underscore, ``"add_"``; one of
        ``CAST_METHODS``; or None, when the call reaches no single operator or is not known.

    Example::

        >>> aten_name("call_function", torch.nn.functional.linear), aten_name("call_method", "add_")
        ('linear', 'add_')
    """
    kwargs = kwargs or {}
    if _UNLISTED_OVERLOAD in kwargs:
        return None
    if opcode == "call_method":
        return _method_name(str(target), args, kwargs)
    return _function_name(target, args, kwargs) if opcode == "call_function" else None


def resolve_operator(key: str | Callable[..., Any]) -> str:
    """The ATen operator that a user means.

    Args:
        key: ``torch.softmax``, ``F.softmax``, ``torch.ops.aten.exp``, ``torch.Tensor.exp``, ``operator.add``, or one
            of these spelled out, or an ATen name: ``"torch.softmax"``, ``"aten::exp"``, ``"exp"``.

    Returns:
        The operator's name without overload.

    Raises:
        PolicyError: when it is no ATen operator, with the nearest name that is one.

    Example::

        >>> resolve_operator(torch.softmax), resolve_operator("aten::exp"), resolve_operator("F.cross_entropy")
        ('softmax', 'exp', 'cross_entropy_loss')
    """
    target = _object_named(key) if isinstance(key, str) else key
    found = target if isinstance(target, str) else aten_name("call_function", target)
    if found is None or not is_aten(found):
        raise _unknown(key, known=target is not None and not isinstance(target, str))
    return found


# -- functions -----------------------------------------------------------------------------------------


def _function_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    if isinstance(target, torch._ops.OpOverload):
        return _overload_name(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _known(target._qualified_op_name.removeprefix("aten::"))
    if target in _by_function():
        return _row_name(target, args, kwargs)
    if target is F.pad or target is torch._C._nn.pad:
        return _pad_name(target, args, kwargs)
    if target is torch.norm:
        return _norm_name(target, args, kwargs)
    if target is operator.truediv and args and isinstance(args[0], Number):
        return "reciprocal"  # Tensor.__rtruediv__ is self.reciprocal() * other
    if target is operator.sub and args and isinstance(args[0], Number):
        return "rsub"
    if getattr(target, "__module__", None) == operator.add.__module__:
        return _operators().get(target.__name__)
    return _builtin_name(target, args, kwargs)


def _builtin_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    name = getattr(target, "__name__", "")
    if name and getattr(torch.Tensor, name, None) is target:
        return _method_name(name, args, kwargs)
    builtin = isinstance(target, types.BuiltinFunctionType)
    return _known(name) if builtin and str(target.__module__).startswith("torch") else None


def _overload_name(target: torch._ops.OpOverload[..., Any]) -> str | None:
    arguments = {argument.name for argument in target._schema.arguments}
    packet = target._schema.name.removeprefix("aten::")
    if _UNLISTED_OVERLOAD in arguments or (packet == "norm" and "dtype" not in arguments):
        return None
    return _known(packet)


def _row_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    name, *unless = _by_function()[target]
    if unless and _given(target, unless[0], args, kwargs) not in (None, False):
        return unless[1] if len(unless) > 1 else None
    inplace = "inplace" in _parameters(target) and _given(target, "inplace", args, kwargs) is True
    return f"{name}_" if inplace else name


def _pad_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    given = dict(zip(("input", "pad", "mode"), args, strict=False)) | dict(kwargs)
    mode, sizes = given.get("mode", "constant"), given.get("pad")
    if mode == "constant":
        return "constant_pad_nd"
    prefix = {"reflect": "reflection", "replicate": "replication"}.get(mode)
    return f"{prefix}_pad{len(sizes) // 2}d" if prefix and isinstance(sizes, Sequence) else "pad"


def _norm_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    p = dict(zip(("input", "p"), args, strict=False)).get("p", kwargs.get("p", "fro"))
    return "linalg_vector_norm" if p == "fro" or not isinstance(p, str) else None


def _given(target: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The argument of this name, or None when the call does not give it."""
    position = _parameters(target).index(name) if name in _parameters(target) else len(args)
    return kwargs.get(name, args[position] if position < len(args) else None)


@functools.cache
def _parameters(target: Any) -> tuple[str, ...]:
    branches = boolean_dispatched.get(target)
    return tuple(inspect.signature(branches["if_true"] if branches else target).parameters)


def _known(name: str) -> str | None:
    return name if is_aten(name) else None


# -- methods -------------------------------------------------------------------------------------------


def _method_name(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    if name in _METHODS:
        return _METHODS[name]
    if name == "norm":
        return _norm_name(torch.Tensor.norm, args, kwargs)
    method = getattr(torch.Tensor, name, None)
    if name.startswith("__"):
        return _operators().get(_operator_of(name)) if callable(method) else None
    if isinstance(method, types.FunctionType):
        return _by_function()[method][0] if method in _by_function() else None
    return _known(name) if callable(method) else None


def _operator_of(method: str) -> str:
    """``add`` for ``__add__`` and ``__radd__``, ``iadd`` for ``__iadd__``, ``and_`` for ``__and__``."""
    name = method.strip("_")
    for candidate in (name, f"{name}_", name.removeprefix("r"), f"{name.removeprefix('r')}_"):
        if candidate in _operators():
            return candidate
    return name


# -- tables --------------------------------------------------------------------------------------------


@functools.cache
def _by_function() -> Mapping[Any, tuple[str, ...]]:
    rows = (line.split() for line in _FUNCTIONS.strip().splitlines())
    found = {_object_named(spelling): tuple(cells) for spelling, *cells in rows}
    found.pop(None, None)  # a function that this version of torch does not have
    return found


@functools.cache
def _operators() -> Mapping[str, str]:
    return dict(tuple[str, str](line.split()) for line in _OPERATORS.strip().splitlines())


_ROOTS: Final[Mapping[str, Any]] = {"torch": torch, "F": F, "Tensor": torch.Tensor, "operator": operator}


def _object_named(spelling: str) -> Any:
    """The object that a dotted name stands for, the name itself for an ATen one, or None."""
    name = spelling.removeprefix("aten::")
    root, *path = name.split(".")
    if root not in _ROOTS or not path or name != spelling:
        return packet_of(name)
    found: Any = _ROOTS[root]
    for attribute in path:
        found = getattr(found, attribute, None)
    return found


def _unknown(key: str | Callable[..., Any], *, known: bool) -> PolicyError:
    spelled = repr(key) if isinstance(key, str) else getattr(key, "__name__", repr(key))
    if known:
        return PolicyError(
            f"{spelled} reaches no single ATen operator", hint="name an operator, such as torch.softmax, or a module"
        )
    words = spelled.strip("'").removeprefix("aten::").split(".")
    close = nearest(words[-1], aten_packets())
    prefix = "torch." if words[0] in _ROOTS and close and hasattr(torch, close) else ""
    return PolicyError(
        f"unknown operator {spelled}: not an ATen operator",
        hint=f"did you mean {prefix + close!r}?" if close else "name an operator as torch does, such as 'torch.softmax'",
    )
