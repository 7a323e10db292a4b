"""Which values of a traced graph share memory, and which were written to?

Two inputs may be one tensor, and an input may be a parameter or a buffer: these are all one place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxamp.capture.builtins import NUMBERS, known_kind
from fxamp.capture.calls import MODE_CALLS, has_hooks
from fxamp.capture.objects import Rebuilt
from fxamp.policy import DEVICE_TYPES
from fxamp.policy.flow import output_kind
from fxamp.policy.operators import operator_rules
from fxamp.policy.spellings import aten_name
from fxamp.policy.writes import writes_of

__all__ = ["Memory", "is_inplace", "keeps_its_input"]

_GIVEN: Final = "given"
_PYTHONS: Final = (operator.add.__module__, "builtins", "math")
_SETS: Final = (operator.setitem, "__setitem__")
_RESIZING: Final = frozenset(
    "as_strided_ resize_ resize_as_ set_ squeeze_ swapaxes_ swapdims_ t_ transpose_ unsqueeze_".split()
)


class Memory:
    """Follows a graph that is being traced.

    Args:
        tensor: path to a parameter, buffer or constant, or to None when it is something else.
        module: path to a module.
    """

    def __init__(self, tensor: Callable[[str], Any], module: Callable[[str], nn.Module]) -> None:
        self._tensor, self._module = tensor, module
        self._places: dict[fx.Node, frozenset[object]] = {}
        self._writes: list[tuple[fx.Node, frozenset[object]]] = []

    def read(self, graph: fx.Graph) -> None:
        """Goes on to the end of the graph."""
        unseen: list[fx.Node] = []
        for node in reversed(graph.nodes):
            if node in self._places:
                break
            unseen.append(node)
        for node in reversed(unseen):
            self._places[node] = self._own(node)
            if written := self._written(node):
                self._writes.append((node, written))

    def was_written(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether any of the calls that are in the graph wrote to one of these values, or may have."""
        return self._is_among(nodes, self._writes)

    def resizes(self) -> bool:
        """Whether any call that is in the graph gives a value another shape."""
        return any(node.target in _RESIZING and not node._erased for node, _ in self._writes)

    def was_resized(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether any of the calls that are in the graph gave one of these values another shape."""
        return self._is_among(nodes, [write for write in self._writes if write[0].target in _RESIZING])

    def _is_among(self, nodes: Iterable[fx.Node], writes: list[tuple[fx.Node, frozenset[object]]]) -> bool:
        seen: frozenset[object] = frozenset().union(*(self._places[node] for node in nodes))
        return any(not seen.isdisjoint(places) for node, places in writes if not node._erased)

    def _own(self, node: fx.Node) -> frozenset[object]:
        if node.op == "placeholder":
            return frozenset({_GIVEN})
        if node.op == "get_attr":
            tensor = self._tensor(str(node.target))
            return frozenset({_GIVEN} if tensor is None else {_GIVEN, _storage(tensor)})
        own: frozenset[object] = frozenset({node})
        return (
            own
            if known_kind(node) in NUMBERS or _is_fresh(node)
            else own.union(*(self._places[source] for source in node.all_input_nodes))
        )

    def _written(self, node: fx.Node) -> frozenset[object]:
        places = (self._places[source] for source in _written_nodes(node, self._module))
        found: frozenset[object] = frozenset().union(*places)
        if node.op != "call_module":
            return found
        module = self._module(str(node.target))
        return found.union(_storage(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _storage(tensor: torch.Tensor) -> object:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def _written_nodes(node: fx.Node, module: Callable[[str], nn.Module]) -> list[fx.Node]:
    """The values that a call writes to, or may write to."""
    if node.op in ("placeholder", "get_attr", "output") or node.target in MODE_CALLS or node.target is getattr:
        return []
    every = node.all_input_nodes
    if node.op == "call_module":
        return [] if keeps_its_input(module(str(node.target))) else every
    if node.target in _SETS:
        return every[:1]
    if isinstance(node.target, Rebuilt):
        return []
    name = aten_name(node.op, node.target, node.args, node.kwargs)
    if name is None and not _is_known(node.target):
        return every
    inplace = is_inplace(name or "") or node.kwargs.get("inplace") is True
    written = (*writes_of(node.target, node.args, node.kwargs), every[:1] if inplace else ())
    return [leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, fx.Node)]


def _is_known(target: Any) -> bool:
    """Whether a call that is no operator is one of which it is known what it writes to, or a method that only asks."""
    if isinstance(target, str):
        return hasattr(torch.Tensor, target) and not target.endswith("_")
    module = getattr(target, "__module__", None) or ""
    return module in _PYTHONS or (module.startswith("torch") and not getattr(target, "__name__", "").endswith("_"))


def is_inplace(name: str) -> bool:
    """Whether an operator is called as those are that write to their first argument."""
    return name.endswith("_") and not name.endswith("__")


def keeps_its_input(module: nn.Module) -> bool:
    """Whether a module is sure not to write to what it is given."""
    parts = list(module.modules())
    torchs = all(type(part).__module__.startswith("torch.nn.") and not has_hooks(part) for part in parts)
    return torchs and not any(getattr(part, "inplace", False) for part in parts)


def _is_fresh(node: fx.Node) -> bool:
    """Whether a value is sure to share no memory with what it is made of."""
    name = aten_name(node.op, node.target, node.args, node.kwargs)
    if name is None or is_inplace(name):
        return False
    listed = any(name in operator_rules(device) for device in DEVICE_TYPES)
    return listed or output_kind(name, node.target, node.args, node.kwargs) not in (None, "first")
