"""Which weights can be stored in the low dtype for inference?

A parameter whose every use is a cast to one low dtype is stored in that dtype and its casts go. One
that is also used as it is keeps its dtype, and its low copies become buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx, nn

from fxamp.capture import Program, assign
from fxamp.capture.members import find, owns
from fxamp.runtime.folding import folded_linear

__all__ = ["fold_weight_casts"]

_LINEAR: Final = (torch._C._nn.linear, torch.nn.functional.linear)


def fold_weight_casts(program: Program, graphs: Sequence[fx.Graph]) -> dict[str, tuple[str, torch.dtype]]:
    """Replaces the weight casts of the graphs by weights in the low dtype, in place.

    Args:
        program: the graphs run on its modules; the parameters there are replaced, not changed.
        graphs: all graphs that do.

    Returns:
        The low copies of weights that keep their dtype: name of the buffer to path of the weight, and dtype.
    """
    casts, used_as_they_are = _uses(program, graphs)
    tree, copies = program.whole, {}
    names = _names(tree)
    for key, nodes in casts.items():
        weight = program.attribute(_path(nodes[0]))
        dtypes = {node.meta["cast"].dtype for node in nodes}
        if key not in used_as_they_are and len(dtypes) == 1:
            _store(tree, names[key], weight.detach().to(dtypes.pop()))
            places = {node: _path(node) for node in nodes}
        else:
            low = {dtype: _low_copy(program.tree, _path(nodes[0]), weight, dtype) for dtype in dtypes}
            copies.update({name: (_path(nodes[0]), dtype) for dtype, name in low.items()})
            places = {node: low[node.meta["cast"].dtype] for node in nodes}
        for node, place in places.items():
            _replace(node, place, trained=weight.requires_grad)
    return copies


def _uses(program: Program, graphs: Sequence[fx.Graph]) -> tuple[Mapping[int, list[fx.Node]], set[int]]:
    """By the identity of a weight: the casts of it, and whether something else uses it too, such as a module."""
    casts: dict[int, list[fx.Node]] = {}
    others: set[int] = set()
    for node, value in _reads(program, graphs):
        if isinstance(value, nn.Module):
            others.update(map(id, value.parameters()))
        elif isinstance(value, torch.Tensor):
            for user in node.users:
                if _is_weight_cast(user):
                    casts.setdefault(id(value), []).append(user)
                else:
                    others.add(id(value))
    return casts, others


def _reads(program: Program, graphs: Sequence[fx.Graph]) -> Iterator[tuple[fx.Node, Any]]:
    """What the graphs use of the program: tensors, and modules that run as a whole."""
    for graph in graphs:
        for node in graph.nodes:
            owner = node.op == "get_attr" and all(user.target is assign for user in node.users)
            if node.op in ("get_attr", "call_module") and not owner:
                yield node, program.attribute(str(node.target))


def _is_weight_cast(node: fx.Node) -> bool:
    cast = node.meta.get("cast")
    return cast is not None and cast.weight and not cast.leaf_only


def _path(cast: fx.Node) -> str:
    weight = cast.args[0]
    assert isinstance(weight, fx.Node)
    return str(weight.target)


def _replace(node: fx.Node, path: str, *, trained: bool) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        low = graph.create_node("get_attr", path, name=node.name)
    low.meta = {**{k: v for k, v in node.meta.items() if k != "cast"}, "module_of": path}
    weight = node.args[0]
    for user in node.users if trained else ():
        if user.target in _LINEAR:
            user.target = folded_linear
    node.replace_all_uses_with(low)
    graph.erase_node(node)
    if isinstance(weight, fx.Node) and not weight.users:
        graph.erase_node(weight)


def _names(tree: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter; tied weights have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in tree.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _store(tree: nn.Module, names: list[str], low: torch.Tensor) -> None:
    parameter = nn.Parameter(low, requires_grad=False)
    for name in names:
        path, _, last = name.rpartition(".")
        find(tree, path)._parameters[last] = parameter


def _low_copy(tree: nn.Module, path: str, weight: torch.Tensor, dtype: torch.dtype) -> str:
    """The name of a new buffer with the weight in a low dtype."""
    name = f"_frozen_{path.replace('.', '_')}_{str(dtype).removeprefix('torch.')}"
    while owns(tree, name):  # of another weight, ``a_b.c`` and ``a.b.c``
        name += "_"
    tree.register_buffer(name, weight.detach().to(dtype), persistent=False)
    return name
