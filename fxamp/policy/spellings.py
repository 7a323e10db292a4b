"""Which ATen operator does a Python call reach?

``torch.matmul``, ``Tensor.matmul``, ``@`` and ``torch.ops.aten.matmul`` are one operator. A builtin of torch
and a method have the operator's name; the rest is in ``fxamp.policy.python_table``. A Python function has a
row there when all that autocast does in it is what it would do to that one operator, called with the same
arguments; the work around it, such as a view or a division of the result, is none of autocast's business.
No answer is always safe: such a call runs under autocast.
"""

from __future__ import annotations

import functools
import inspect
import operator
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from numbers import Number
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch._jit_internal import boolean_dispatched

from fxamp.errors import PolicyError, nearest
from fxamp.policy.einsum import REACHES
from fxamp.policy.operators import aten_packets, is_aten, packet_of
from fxamp.policy.python_table import CAST_METHODS, FUNCTIONS, METHODS, OPERATOR_MODULE

__all__ = ["CAST_METHODS", "aten_name", "given_argument", "name_of_target", "resolve_operator"]

# The last argument of mm, addmm and their kind: it chooses an overload that autocast does not list.
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
        The operator's name without overload, ``"softmax"``, in-place ones with the underscore, ``"add_"``;
        one of ``CAST_METHODS``; or None, when the call reaches no single operator or is not known.

    Example::

        >>> aten_name("call_function", torch.nn.functional.linear), aten_name("call_method", "add_")
        ('linear', 'add_')
    """
    kwargs = kwargs or {}
    if _UNLISTED_OVERLOAD in kwargs:
        return None
    found = name_of_target(opcode, target)
    return _name(opcode, target, args, kwargs) if found is None else found or None


def name_of_target(opcode: str, target: Any) -> str | None:
    """The operator that a node reaches whatever its arguments, "" when it reaches none; None: they may tell.

    As long as no argument is ``out_dtype``.
    """
    lasting = isinstance(target, _LASTING) or (isinstance(target, types.FunctionType) and target in _by_function())
    return _fixed_name(opcode, target, getattr(target, "__name__", "")) if lasting else None


@functools.lru_cache(maxsize=2048)
def _fixed_name(opcode: str, target: Any, spelled: str) -> str | None:
    # The name counts too: two builtins of one implementation, as some of torch's are, are equal.
    if opcode == "call_method":
        told = target == "norm"
    elif target in _by_function():
        told = len(_by_function()[target]) > 1 or "inplace" in _parameters(target)
    else:
        told = target in _TOLD_BY_ARGUMENTS or spelled == "norm"
    return None if told else _name(opcode, target, (), {}) or ""


def _name(opcode: str, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    if opcode == "call_method":
        return _method_name(str(target), args, kwargs)
    return _function_name(target, args, kwargs) if opcode == "call_function" else None


def resolve_operator(key: str | Callable[..., Any]) -> str:
    """The ATen operator that a user means.

    Args:
        key: ``torch.softmax``, ``F.softmax``, ``torch.ops.aten.exp``, ``torch.Tensor.exp``, ``operator.add``,
            or one of these spelled out, or an ATen name: ``"torch.softmax"``, ``"aten::exp"``, ``"exp"``.

    Returns:
        The operator's name without overload.

    Raises:
        PolicyError: when it is no ATen operator, with the nearest name that is one.

    Example::

        >>> resolve_operator(torch.softmax), resolve_operator("aten::exp"), resolve_operator("F.nll_loss")
        ('softmax', 'exp', 'nll_loss')
    """
    target = _object_named(key) if isinstance(key, str) else key
    found = target if isinstance(target, str) else aten_name("call_function", target)
    if found is None or not is_aten(found):
        raise _unknown(key, known=target is not None and not isinstance(target, str))
    return found


# Of these nothing of the user's is kept alive: names, and what torch and Python are made of.
_LASTING: Final = (str, types.BuiltinFunctionType, types.MethodDescriptorType, torch._ops.OpOverload)
_TOLD_BY_ARGUMENTS: Final = (
    F.pad,
    torch._C._nn.pad,
    F.interpolate,
    torch.sparse.mm,
    torch.norm,
    operator.truediv,
    operator.sub,
)


# -- functions -----------------------------------------------------------------------------------------


def _function_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    if isinstance(target, torch._ops.OpOverload):
        return _overload_name(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _known(target._qualified_op_name.removeprefix("aten::"))
    if isinstance(target, Hashable) and target in _by_function():
        return _row_name(target, args, kwargs)
    if target is F.pad or target is torch._C._nn.pad:
        return _pad_name(target, args, kwargs)
    if target is F.interpolate:
        return _interpolate_name(args, kwargs)
    if target is torch.sparse.mm and (len(args) > 2 or "reduce" in kwargs):
        return "_sparse_mm_reduce_impl"
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
    if unless and given_argument(target, unless[0], args, kwargs) not in (None, False):
        return unless[1] if len(unless) > 1 else None
    inplace = "inplace" in _parameters(target) and given_argument(target, "inplace", args, kwargs) is True
    return f"{name}_" if inplace else name


def _pad_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    given = dict(zip(("input", "pad", "mode"), args, strict=False)) | dict(kwargs)
    mode, sizes = given.get("mode", "constant"), given.get("pad")
    if mode in ("constant", "circular"):
        return {"constant": "constant_pad_nd", "circular": "_pad_circular"}[mode]
    prefix = {"reflect": "reflection", "replicate": "replication"}.get(mode)
    return f"{prefix}_pad{len(sizes) // 2}d" if prefix and isinstance(sizes, Sequence) else "pad"


_UPSAMPLES: Final = {
    "nearest": "upsample_nearest2d",
    "nearest-exact": "_upsample_nearest_exact2d",
    "linear": "upsample_linear1d",
    "bilinear": "upsample_bilinear2d",
    "trilinear": "upsample_trilinear3d",
    "bicubic": "upsample_bicubic2d",
}


def _interpolate_name(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """One of the operators of a mode: those for 1, 2 and 3 dimensions have the same rule."""
    given = dict(zip(("input", "size", "scale_factor", "mode"), args, strict=False)) | dict(kwargs)
    found = _UPSAMPLES.get(given.get("mode", "nearest"))
    return f"_{found}_aa" if found and given.get("antialias") else found


def _norm_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    p = dict(zip(("input", "p"), args, strict=False)).get("p", kwargs.get("p", "fro"))
    if p == "nuc":
        return "linalg_matrix_norm"
    return "linalg_vector_norm" if p == "fro" or not isinstance(p, str) else None


def given_argument(target: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
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
    if name in METHODS:
        return METHODS[name]
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
    rows = (line.split() for line in FUNCTIONS.strip().splitlines())
    found = {_object_named(spelling): tuple(cells) for spelling, *cells in rows}
    found.pop(None, None)  # a function that this version of torch does not have
    return found | {function: (name,) for function, name in REACHES.items()}


@functools.cache
def _operators() -> Mapping[str, str]:
    names = OPERATOR_MODULE.split()
    return dict(zip(names[::2], names[1::2], strict=True))


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


_EXAMPLE: Final = "name an operator as torch does, such as 'torch.softmax'"


def _unknown(key: str | Callable[..., Any], *, known: bool) -> PolicyError:
    spelled = repr(key) if isinstance(key, str) else getattr(key, "__name__", repr(key))
    if known:
        return PolicyError(f"{spelled} reaches no single ATen operator", hint=_EXAMPLE)
    words = spelled.strip("'").removeprefix("aten::").split(".")
    close = nearest(words[-1], aten_packets())
    prefix = "torch." if words[0] in _ROOTS and close and hasattr(torch, close) else ""
    hint = f"did you mean {prefix + close!r}?" if close else _EXAMPLE
    return PolicyError(f"unknown operator {spelled}: not an ATen operator", hint=hint)
