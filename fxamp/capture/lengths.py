"""How many parts does the result of a call have, whatever its arguments hold?

``values, indices = x.topk(2)`` gives two for any ``x``: the schema of the operator says so. So do a list of sizes to
split by, and the tensors that ``meshgrid`` is given.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.capture.builtins import known_kind

__all__ = ["chunks_of", "length_of"]

_length = len  # while a model is traced, the builtin is another one

_AS_GIVEN: Final = ("meshgrid", "broadcast_tensors")
_BY_SIZES: Final = ("split", "split_with_sizes", "split_with_sizes_copy")
_BY_PLACES: Final = ("tensor_split", "hsplit", "vsplit", "dsplit")
_HOW: Final = ("split_size_or_sections", "split_size", "split_sizes", "indices_or_sections", "indices", "sections")
_PAIRS: Final = (nn.RNNBase, nn.MultiheadAttention)


def length_of(node: fx.Node, module: Callable[[str], Any]) -> int | None:
    """The number of parts of a node's value, when the call alone tells; None when it does not.

    Args:
        node: the value.
        module: finds a submodule by the target of a call.
    """
    if node.op == "call_module":
        return 2 if isinstance(module(str(node.target)), _PAIRS) else None
    name = _name(node)
    if name in _AS_GIVEN:
        given = node.args[0] if _length(node.args) == 1 and isinstance(node.args[0], list | tuple) else node.args
        return _length(given) if _length(given) > 1 else None  # one may be a traced list of them
    if name in _BY_SIZES or name in _BY_PLACES:
        how = next((node.kwargs[key] for key in _HOW if key in node.kwargs), None)
        how = node.args[1] if _length(node.args) > 1 else how
        if isinstance(how, list | tuple):
            return _length(how) + (name in _BY_PLACES)
        return how if name in _BY_PLACES and isinstance(how, int) else None
    return _of_schema(name, node.args, node.kwargs) if name else None


def chunks_of(node: fx.Node) -> int | None:
    """How many parts a call of ``chunk`` asks for; there may be fewer of a short tensor."""
    asked = node.args[1] if _length(node.args) > 1 else node.kwargs.get("chunks")
    return asked if _name(node) == "chunk" and isinstance(asked, int) else None


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    known = node.op == "call_function" and (getattr(node.target, "__module__", None) or "torch").startswith("torch")
    return getattr(node.target, "__name__", "") if known else ""


def _of_schema(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """How many tensors an operator gives, when it is the same number for each overload that the arguments fit."""
    found = {gives for takes, gives in _overloads(name) if _fits(takes, args, kwargs)}
    return found.pop() if _length(found) == 1 and min(found) > 1 else None


@functools.cache
def _overloads(name: str) -> tuple[tuple[Any, int], ...]:
    packet = getattr(torch.ops.aten, name, None) if not name.startswith("_") else None
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()] if packet is not None else []
    # Anything but tensors counts as one value, of which nothing is known.
    return tuple(
        (schema.arguments, _length(schema.returns) if all(str(r.type) == "Tensor" for r in schema.returns) else 0)
        for schema in schemas
    )


def _fits(takes: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if _length(args) > _length(takes) or any(takes[i].kwarg_only for i in range(_length(args))):
        return False
    given = {takes[i].name: value for i, value in enumerate(args)} | dict(kwargs)
    if not set(given) <= {argument.name for argument in takes}:
        return False
    required = {argument.name for argument in takes if not argument.has_default_value()}
    return required <= set(given) and all(_may_be(given[a.name], str(a.type)) for a in takes if a.name in given)


def _may_be(value: Any, kind: str) -> bool:
    """Whether an argument may be taken for one of this kind; what is not known may."""
    tensor = "Tensor" in kind
    if isinstance(value, fx.Node):
        known = known_kind(value)
        return known is None or (known is torch.Tensor) == tensor or kind in ("Scalar", "number")
    if isinstance(value, numbers.Number):
        return not tensor
    return True
