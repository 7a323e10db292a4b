"""Which operator is this call, and what kind of call is it?

A ``Call`` is what planning needs to know of one node, read once: the ATen operator it reaches, whether
it writes in place, whether it can be seen into.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn
from torch.fx.node import _get_qualified_name

from fxamp.capture.calls import MODE_CALLS, has_hooks
from fxamp.capture.objects import Rebuilt
from fxamp.policy.einsum import REACHES
from fxamp.policy.spellings import aten_name, name_of_target
from fxamp.policy.writes import may_write, writes_of

__all__ = ["Call", "argument_keys", "argument_nodes", "nodes_in", "read_call"]

# Leaf modules that run one operator, which autocast leaves alone.
_LEAF_OPERATORS: Final = (
    (nn.modules.batchnorm._BatchNorm, "batch_norm"),
    (nn.modules.instancenorm._InstanceNorm, "instance_norm"),
    (nn.modules.dropout._DropoutNd, "dropout"),
    (nn.RReLU, "rrelu"),
)

# Calls that only steer what runs, and calls that tell something of a tensor.
_STEERING: Final = MODE_CALLS | frozenset(
    {
        operator.contains,
        operator.not_,
        torch.finfo,
        torch.iinfo,
        torch.can_cast,
        torch.is_floating_point,
        torch.is_complex,
        torch.is_nonzero,
        torch.numel,
        torch.promote_types,
        torch.result_type,
        torch.is_same_size,
        torch.sym_float,
        torch.sym_int,
        torch.sym_max,
        torch.sym_min,
        torch.sym_not,
    }
)
# Methods of a tensor that tell something of it and compute nothing.
_QUERIES: Final = frozenset(
    "size dim ndimension numel nelement element_size stride storage_offset is_contiguous is_floating_point "
    "is_complex is_signed is_conj is_neg is_nonzero get_device data_ptr is_inference is_pinned "
    "register_hook retain_grad tolist item "
    "__len__ __bool__".split()
)
# Attributes of a tensor that are tensors of the same dtype; ``real`` and ``imag`` are only so for real ones.
# Attributes of a tensor that are no tensors; any other may be one, as ``x.max(0).values`` is.
_FACTS: Final = frozenset(
    "shape dtype device ndim requires_grad layout is_leaf is_cuda is_cpu is_meta is_sparse is_quantized "
    "is_nested is_mps names itemsize nbytes grad_fn output_nr".split()
)
_VIEWS: Final = frozenset({"T", "mT", "H", "mH", "data"})
_SCALAR_MODULES: Final = frozenset({math.__name__, builtins.__name__})


@dataclass(frozen=True, slots=True)
class Call:
    """One node, read.

    Attributes:
        op: its name in the user's words.
        aten: the ATen operator it reaches, without a trailing ``_``; "" when none is known.
        steering: it computes nothing with tensors.
        holds: it puts what it is given into an object.
        writes: the values it writes to, or may write to.
        views: it works on views of its arguments, of which autocast keeps no copy.
    """

    op: str
    aten: str = ""
    steering: bool = False
    holds: bool = False
    inplace: bool = False
    writes: tuple[Any, ...] = ()
    views: bool = False


def nodes_in(argument: Any) -> list[fx.Node]:
    """Every node in a nested argument in order, one entry a use."""
    found: list[fx.Node] = []
    _collect(argument, found)
    return found


def _collect(argument: Any, found: list[fx.Node]) -> None:
    """As ``fx.map_arg`` goes through it, without a copy."""
    if isinstance(argument, fx.Node):
        found.append(argument)
    elif isinstance(argument, tuple | list):
        for item in argument:
            _collect(item, found)
    elif isinstance(argument, dict):
        for item in argument.values():
            _collect(item, found)
    elif isinstance(argument, slice):
        for item in (argument.start, argument.stop, argument.step):
            _collect(item, found)


def argument_nodes(node: fx.Node) -> list[fx.Node]:
    """Every node argument of a call in order, one entry a use; a *slot* is a place in this list."""
    found = nodes_in(node.args)
    _collect(node.kwargs, found)
    return found


def argument_keys(node: fx.Node) -> list[int | str]:
    """For each slot of a call the place or the name of the argument that it is in."""
    arguments: tuple[tuple[int | str, Any], ...] = (*enumerate(node.args), *node.kwargs.items())
    return [key for key, argument in arguments for _ in nodes_in(argument)]


def read_call(node: fx.Node, module_of: Callable[[str], Any]) -> Call:
    """What a call_function, call_method or call_module node does."""
    if node.op == "call_module":
        return _module_call(node, module_of(str(node.target)))
    if name_of_target(node.op, node.target) is not None and _ARGUMENTS_THAT_COUNT.isdisjoint(node.kwargs):
        found = _call_by_target(node.op, node.target, getattr(node.target, "__name__", ""))
        if found is not None:
            return found
    return _read(node)


_ARGUMENTS_THAT_COUNT: Final = frozenset({"out", "out_dtype", "inplace"})
_GO_BY_ARGUMENTS: Final = (getattr, operator.setitem, "__setitem__")


@functools.lru_cache(maxsize=2048)
def _call_by_target(opcode: str, target: Any, spelled: str) -> Call | None:
    """What a call does whatever it is given, or None when its arguments count."""
    if target in _GO_BY_ARGUMENTS or may_write(target):
        return None
    call = _read(fx.Graph().create_node(opcode, target))
    return None if call.inplace or call.writes else call


def _read(node: fx.Node) -> Call:
    if isinstance(node.target, Rebuilt):
        return Call(node.target.__name__, steering=True, holds=True)
    op = _spelled(node)
    if node.target in _STEERING if node.op == "call_function" else node.target in _QUERIES:
        return Call(op, steering=True)
    if node.target is getattr:
        name = node.args[1]
        return Call(f"Tensor.{name}", "alias" if name in _VIEWS else "getattr", steering=name in _FACTS)
    if getattr(node.target, "__module__", None) in _SCALAR_MODULES:
        return Call(op, steering=True)
    if node.target is operator.getitem:
        return Call(op, "getitem")
    if node.target is operator.setitem or node.target == "__setitem__":
        return Call(op, "index_put", inplace=True, writes=(node.args[0],))
    found = aten_name(node.op, node.target, node.args, node.kwargs) or ""
    writes = writes_of(node.target, node.args, node.kwargs)
    if node.kwargs.get("out") is not None:
        return Call(op, found, inplace=True, writes=writes)
    if _is_inplace(found) or (found and node.kwargs.get("inplace") is True):
        return Call(op, found.removesuffix("_"), inplace=True, writes=(*writes, _first(node)))
    # What cannot be seen into may write to whatever it gets.
    return Call(op, found, writes=writes if found else (node.args, node.kwargs), views=node.target in REACHES)


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args else next(iter(node.kwargs.values()), None)


def _module_call(node: fx.Node, module: nn.Module) -> Call:
    op = f"nn.{type(module).__name__}" if type(module).__module__.startswith("torch.nn") else type(module).__name__
    if not has_hooks(module):
        for kind, aten in _LEAF_OPERATORS:
            if isinstance(module, kind) and type(module).__module__.startswith("torch.nn."):
                inplace = getattr(module, "inplace", False) is True
                return Call(op, aten, inplace=inplace, writes=(_first(node),) if inplace else ())
    return Call(op, writes=(node.args, node.kwargs))


def _is_inplace(aten: str) -> bool:
    return aten.endswith("_") and not aten.endswith("__")


def _spelled(node: fx.Node) -> str:
    """The call as a user would write it: ``torch.matmul``, ``F.linear``, ``Tensor.view``, ``operator.add``."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    assert callable(node.target)
    return _shortened(_get_qualified_name(node.target))


def _shortened(name: str) -> str:
    for long, short in _SHORT.items():
        if name.startswith(long):
            return short + name[len(long) :]
    return name


_SHORT: Final[Mapping[str, str]] = {
    **{_get_qualified_name(function): "torch.einsum" for function in REACHES},
    "torch.nn.functional.": "F.",
    "torch._C._nn.": "F.",
    "torch._C._linalg.linalg_": "torch.linalg.",
    "torch._C._fft.fft_": "torch.fft.",
    "torch._C._special.special_": "torch.special.",
    "torch.functional.": "torch.",
    "_operator.": "operator.",
    "builtins.": "",
}
